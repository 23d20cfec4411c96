"""The primitive that stands between the stored statistics of a batch-norm layer and its evaluation.

`(x, mean, var) -> (mean', var')`, an identity unless a reader of the traced program decides otherwise.

It passes through whatever jax does to a model before readers see it. Under vmap its batching rule keeps track of what
lies where: an axis of lanes either has statistics of its own or is reduced like any other. Differentiated it is an
error, since a gradient taken before statistics are chosen would be that of other statistics.

Its operands are `x`, `mean`, `var`, then the layer's weights where `has_weights` says so, and its domain where
`has_domain` does. Its other parameters are fields of `Tap`, and `channel_rank`: how many trailing axes of the
statistics are channels of the layer itself, whatever vmap puts in front of them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec
from jaxtyping import Array

from flaxbn.arithmetic.moments import widen


class Tap(NamedTuple):
    """What reaches the primitive at one call of one layer.

    Attributes:
        x: the layer's input.
        mean, var: the statistics that it reads.
        weights: the layer's mask as float weights of the rank of `x`, or None.
        domain: the domain number of all of `x`, or of each example along its leading axis, or None.
        axes: the axes of `x` over which it reduces, counted without its lanes.
        lanes: how many leading axes of all fields are lanes of vmap with statistics of their own, in a layer with
            domains; other layers have them among the channels.
        axis_name, axis_index_groups: the mapped axis outside of the program over which the layer synchronizes.
        site: the number of the call in the order of the program.
        layer: the layer's class and path, for messages.
    """

    x: Array
    mean: Array
    var: Array
    weights: Array | None
    domain: Array | None
    axes: tuple[int, ...]
    lanes: int
    axis_name: Any
    axis_index_groups: Any
    site: int
    layer: str


OnTap = Callable[[Tap], tuple[Array, Array, Any]]
"""A reader: from a tap, the statistics to normalize by, and a record, any tree of arrays (None for nothing)."""

tap_p = jex.Primitive("batch_norm_statistics")
tap_p.multiple_results = True
owned_p = jex.Primitive("owned_by_a_known_layer")
"""Says of its operand, which goes through as it is, that a layer holds it whose use of it is known."""
observing = jax.make_user_context(None)
"""Says during a trace what looks on, so that jax's cache of traced functions does not hand one look to another."""


def is_looking() -> bool:
    """Whether a model is being traced whose statistics are to be chosen: who looks says so by a tuple."""
    return isinstance(observing.value, tuple)


def is_bound(axis_name: Any) -> bool:
    """Whether a transformation that is under way maps this axis; jax has no other way to ask than to use it."""
    try:
        return axis_name is not None and bool(jax.lax.axis_size(axis_name))
    except NameError:
        return False


def bind_tap(
    x: Array,
    mean: Array,
    var: Array,
    features: tuple[int, ...],
    *,
    layer: str,
    weights: Array | None = None,
    domain: Array | None = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
) -> tuple[Array, Array]:
    """Puts a tap between stored statistics and the evaluation of a layer.

    Args:
        x: the layer's input.
        mean: the stored mean, of the shape of the feature axes of `x`, behind an axis of domains where there are some.
        var: the stored variance.
        features: the feature axes of `x`; over all others the layer reduces.
        layer: its class and path.
        weights: its mask as weights of the rank of `x`.
        domain: the domain number of `x`, or of each example.
        axis_name: what it synchronizes over; nothing where no transformation that is under way maps that axis.
        axis_index_groups: within which groups.

    Returns:
        The statistics to evaluate by.
    """
    mean, var = tap_p.bind(
        *(a for a in (x, mean, var, weights, domain) if a is not None),
        axes=tuple(axis for axis in range(x.ndim) if axis not in features),
        layer=layer,
        lanes=0,
        channel_rank=len(features),
        axis_name=axis_name if is_bound(axis_name) else None,
        axis_index_groups=None if axis_index_groups is None else tuple(map(tuple, axis_index_groups)),
        has_weights=weights is not None,
        has_domain=domain is not None,
    )
    return mean, var


def as_tap(params: Mapping[str, Any], values: Sequence[Any], site: int) -> Tap:
    """The operands and parameters of one equation of the primitive, by name.

    Args:
        params: the equation's parameters.
        values: its operands.
        site: the number of the call.
    """
    x, mean, var, *others = values
    weights = others.pop(0) if params["has_weights"] else None
    domain = others.pop(0) if params["has_domain"] else None
    axis_name, groups = params["axis_name"], params["axis_index_groups"]
    return Tap(x, mean, var, weights, domain, params["axes"], params["lanes"], axis_name, groups, site, params["layer"])


def _tap_value(x: Array, mean: Array, var: Array, *others: Array, **params: Any) -> list[Array]:
    """The stored statistics, in the dtype that the statistics of `x` have: what runs where no reader decides."""
    del others, params
    return [jnp.asarray(a, dtype) for a, dtype in zip((mean, var), _statistics_dtypes(x, mean))]


@tap_p.def_abstract_eval
def _tap_shapes(x: Any, mean: Any, var: Any, *others: Any, **params: Any) -> list[Any]:
    """The types of the statistics, which vary over the mapped axes that `x` varies over, and are not split."""
    del others, params
    whole = x.sharding and x.sharding.update(spec=PartitionSpec(*[None] * mean.ndim))
    return [
        x.update(shape=a.shape, dtype=dtype, weak_type=False, sharding=whole)
        for a, dtype in zip((mean, var), _statistics_dtypes(x, mean))
    ]


def _statistics_dtypes(x: Any, mean: Any) -> tuple[Any, Any]:
    """Of mean and variance: wide enough for what is measured in `x` and for what is stored; variances are real."""
    dtype = jnp.promote_types(widen(x.dtype), mean.dtype)
    return dtype, jnp.finfo(dtype).dtype


def _tap_jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    """Refuses: what depends on statistics that are not chosen yet has no derivative yet."""
    del primals, tangents
    raise NotImplementedError(
        f"{params['layer']}: `call` must not differentiate the model, since statistics are chosen after it is traced. "
        "Compute the gradient outside, as in `jax.grad(lambda v: loss(flaxbn.apply(model, v, batch, ...)))`."
    )


def _tap_batch(axis: Any, args: Sequence[Array], dims: Sequence[int | None], **params: Any) -> Any:
    """Under vmap: lanes with statistics of their own are channels; lanes that share theirs are positions to reduce.

    So are lanes over which the layer synchronizes, in whose statistics all lanes then take part.
    """
    outside = _without(axis.name, params)
    synchronized = outside != params
    if all(d is None for d in dims):
        return tap_p.bind(*args, **outside), [None, None]
    _, mean_dim, var_dim, *_ = dims
    if mean_dim is None and var_dim is None:
        return _batch_shared(args, dims, axis.size, outside), [None, None]
    if synchronized:  # each lane sees the input of all
        args, dims, outside = _shared_among(args, dims, axis.size, outside)
    return _batch_own(args, dims, axis.size, outside), [0, 0]


def _without(axis_name: Any, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a tap outside of a vmap over this axis, over which the layer then synchronizes no more.

    Raises:
        ValueError: if it synchronizes within groups of its lanes.
    """
    names = params["axis_name"]
    names = names if isinstance(names, tuple) else (names,)
    if axis_name is None or axis_name not in names:
        return params
    if params["axis_index_groups"] is not None:
        raise ValueError(
            f"{params['layer']} synchronizes within groups of the axis {axis_name!r}, which the model maps itself: "
            "statistics chosen from outside can be those of all its lanes only. Leave `axis_index_groups` out, or map "
            "the model over that axis from outside."
        )
    return params | {"axis_name": tuple(name for name in names if name != axis_name) or None}


def _batch_own(args: Sequence[Array], dims: Sequence[int | None], size: int, params: dict[str, Any]) -> Any:
    """Lanes with statistics of their own lie in front of everything.

    There they are one more axis of channels, but for domains: which row of the statistics an example reads then depends
    on its lane, so that lanes are counted and mapped over.
    """
    if params["has_domain"]:
        params = params | {"lanes": params["lanes"] + 1}
    else:
        params = params | {"axes": _moved(params["axes"])}
    return tap_p.bind(*(_with_lanes(a, d, size, 0) for a, d in zip(args, dims)), **params)


def _batch_shared(args: Sequence[Array], dims: Sequence[int | None], size: int, params: dict[str, Any]) -> Any:
    """Lanes that share statistics."""
    args, _, params = _shared_among(args, dims, size, params)
    return tap_p.bind(*args, **params)


def _shared_among(
    args: Sequence[Array], dims: Sequence[int | None], size: int, params: dict[str, Any]
) -> tuple[list[Array], list[int | None], dict[str, Any]]:
    """Lanes as positions, behind lanes that have statistics of their own: more examples, or one more axis to reduce.

    They are examples where each example has a domain number, which only the leading axis may have. A number for the
    whole input may vary by lane: then the new axis, which leads, becomes that of examples.

    Returns:
        The operands, where the lanes of each are now (only those of the statistics are as they were), and the
        parameters.
    """
    x, mean, var, *others = args
    x_dim, mean_dim, var_dim, *other_dims = dims
    place = params["lanes"]

    def with_lanes(a: Array, d: int | None) -> Array:
        return _with_lanes(a, d, size, place)

    kept: list[int | None] = [None, mean_dim, var_dim, *[None] * len(others)]
    if params["has_domain"] and _rank(others[-1], other_dims[-1]) > place:
        lanes = [with_lanes(a, d) for a, d in zip((x, *others), (x_dim, *other_dims))]
        x, *others = _among_examples(lanes, place)
        return [x, mean, var, *others], kept, params
    one_domain = params["has_domain"] and other_dims[-1] is None  # it stays the number of the whole input
    moving = len(others) - one_domain
    moved = [with_lanes(a, d) for a, d in zip(others[:moving], other_dims)]
    params = params | {"axes": (0, *_moved(params["axes"]))}
    return [with_lanes(x, x_dim), mean, var, *moved, *others[moving:]], kept, params


def _rank(a: Array, dim: int | None) -> int:
    """The rank of an operand as the layer sees it, within a lane."""
    return a.ndim - (dim is not None)


def _moved(axes: tuple[int, ...]) -> tuple[int, ...]:
    """The same axes, behind a new one."""
    return tuple(axis + 1 for axis in axes)


def _with_lanes(a: Array, dim: int | None, size: int, place: int) -> Array:
    """An operand with its lanes at `place`; one without them is the same in all."""
    if dim is None:
        a, dim = jnp.broadcast_to(a, (size, *a.shape)), 0
    return jnp.moveaxis(a, dim, place)


def _among_examples(operands: list[Array], place: int) -> list[Array]:
    """The axis at `place` merged with that of examples behind it, in all operands; the first has their lengths."""
    lengths = operands[0].shape[: place + 2]
    whole = [jnp.broadcast_to(a, (*lengths, *a.shape[place + 2 :])) for a in operands]
    return [a.reshape(*lengths[:place], -1, *a.shape[place + 2 :]) for a in whole]


tap_p.def_impl(_tap_value)
mlir.register_lowering(tap_p, mlir.lower_fun(_tap_value, multiple_results=True))
ad.primitive_jvps[tap_p] = _tap_jvp
batching.fancy_primitive_batchers[tap_p] = _tap_batch

owned_p.def_impl(lambda x: x)
owned_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(owned_p, lambda context, x: [x])
ad.deflinear2(owned_p, lambda cotangent, x: [cotangent])
batching.defvectorized(owned_p)
