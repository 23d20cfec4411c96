"""The primitive that stands between the stored statistics of a batch-norm layer and its evaluation.

`(x, mean, var) -> (mean', var')`, an identity unless a reader of the traced program decides otherwise.
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
        axes: the axes of `x` over which it reduces.
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


def is_bound(axis_name: Any) -> bool:
    """Whether a transformation that is under way maps this axis."""
    try:
        return axis_name is not None and bool(jax.lax.axis_size(axis_name))
    except NameError:
        return False


def as_tap(params: Mapping[str, Any], values: Sequence[Any], site: int) -> Tap:
    """The operands and parameters of one equation of the primitive."""
    x, mean, var, *others = values
    weights = others.pop(0) if params["has_weights"] else None
    domain = others.pop(0) if params["has_domain"] else None
    axis_name = params["axis_name"]
    if axis_name is not None and not is_bound(axis_name):
        raise ValueError(
            f"{params['layer']} synchronizes over the axis {axis_name!r} of a transformation inside the model, which "
            "statistics chosen from outside cannot follow. Map the model over that axis from outside."
        )
    groups = params["axis_index_groups"]
    return Tap(x, mean, var, weights, domain, params["axes"], params["lanes"], axis_name, groups, site, params["layer"])


def _tap_value(x: Array, mean: Array, var: Array, *others: Array, **params: Any) -> list[Array]:
    """The stored statistics, in the dtype that the statistics of `x` have."""
    del others, params
    return [jnp.asarray(a, dtype) for a, dtype in zip((mean, var), _statistics_dtypes(x, mean))]


@tap_p.def_abstract_eval
def _tap_shapes(x: Any, mean: Any, var: Any, *others: Any, **params: Any) -> list[Any]:
    """The types of the statistics, which vary over the mapped axes that `x` varies over."""
    del others, params
    whole = x.sharding and x.sharding.update(spec=PartitionSpec(*[None] * mean.ndim))
    return [
        x.update(shape=a.shape, dtype=dtype, weak_type=False, sharding=whole)
        for a, dtype in zip((mean, var), _statistics_dtypes(x, mean))
    ]


def _statistics_dtypes(x: Any, mean: Any) -> tuple[Any, Any]:
    dtype = jnp.promote_types(widen(x.dtype), mean.dtype)
    return dtype, jnp.finfo(dtype).dtype


def _tap_jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    del primals, tangents
    raise NotImplementedError(
        f"{params['layer']}: `call` must not differentiate the model, since statistics are chosen after it is traced. "
        "Compute the gradient outside, as in `jax.grad(lambda v: loss(flaxbn.apply(model, v, batch, ...)))`."
    )


def _tap_batch(args: Sequence[Array], dims: Sequence[int | None], **params: Any) -> Any:
    """Under vmap: lanes with statistics of their own are channels; lanes that share theirs are positions to reduce."""
    size = next(a.shape[d] for a, d in zip(args, dims) if d is not None)

    def lanes_at(place: int, a: Array, d: int | None) -> Array:
        if d is None:
            a, d = jnp.broadcast_to(a, (size, *a.shape)), 0
        return jnp.moveaxis(a, d, place)

    (x, mean, var, *others), (x_dim, mean_dim, var_dim, *other_dims) = args, dims
    own = mean_dim is not None or var_dim is not None
    place = 0 if own else params["lanes"]
    moved = tuple(axis + 1 for axis in params["axes"])
    if own:
        mean, var = lanes_at(0, mean, mean_dim), lanes_at(0, var, var_dim)
        params |= {"lanes": params["lanes"] + 1} if params["has_domain"] else {"axes": moved}
    elif params["has_domain"] and others[-1].ndim - (other_dims[-1] is not None) > place:
        x, *others = (lanes_at(place, a, d) for a, d in zip((x, *others), (x_dim, *other_dims)))
        lengths = x.shape[: place + 2]
        others = [jnp.broadcast_to(a, (*lengths, *a.shape[place + 2 :])) for a in others]
        x, *others = (a.reshape(*lengths[:place], -1, *a.shape[place + 2 :]) for a in (x, *others))
        return tap_p.bind(x, mean, var, *others, **params), [None, None]
    else:
        params["axes"] = (0, *moved)
        if params["has_domain"] and other_dims[-1] is None:
            x, *weights = (lanes_at(place, a, d) for a, d in zip((x, *others[:-1]), (x_dim, *other_dims)))
            return tap_p.bind(x, mean, var, *weights, others[-1], **params), [None, None]
    x, *others = (lanes_at(place, a, d) for a, d in zip((x, *others), (x_dim, *other_dims)))
    return tap_p.bind(x, mean, var, *others, **params), [0, 0] if own else [None, None]


tap_p.def_impl(_tap_value)
mlir.register_lowering(tap_p, mlir.lower_fun(_tap_value, multiple_results=True))
ad.primitive_jvps[tap_p] = _tap_jvp
batching.primitive_batchers[tap_p] = _tap_batch
