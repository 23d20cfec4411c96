"""Any Flax model as a program whose batch-norm statistics are chosen from outside.

The model's evaluation is traced once. Where a batch-norm layer runs, a primitive `(x, mean, var) -> (mean', var')`
stands between the stored statistics and the layer's own evaluation code. A reader (`OnTap`) then decides what `mean'`
and `var'` are while the traced program is interpreted: the stored ones, or those of the batch.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import DenyList
from jax.extend import core as jex
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec
from jaxtyping import Array

from flaxbn import linen
from flaxbn.moments import widen

Call = Callable[[Any, Any], Any]


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

_LAYER_CALLS = {inspect.unwrap(call): call for call in (nn.BatchNorm.__call__, linen.BatchNorm.__call__)}
_DROPOUT_CALL = inspect.unwrap(nn.Dropout.__call__)
_observing = jax.make_user_context(None)


def trace(
    model: nn.Module, variables: Mapping[str, Any], batch: Any, call: Call, rngs: Mapping[str, Array] | None
) -> tuple["Program", Callable[[list[Any]], Any]]:
    """Traces the evaluation of `model` on `batch`: the program, and what makes its outputs those of `call`.

    The arguments may be abstract. Everything but the parameters is mutable in the trace, and what the model changes
    is dropped. `nn.Dropout` layers are off.
    """
    returned: list[Any] = []

    def forward(variables: Any, batch: Any, rngs: Any) -> list[Any]:
        with nn.intercept_methods(_interceptor()), _observing(True):
            output, _ = model.apply(variables, batch, rngs=rngs, method=call, mutable=DenyList("params"))
        leaves, structure = jax.tree.flatten(output)
        returned.append((structure, [None if is_array(leaf) else leaf for leaf in leaves]))
        return [leaf for leaf in leaves if is_array(leaf)]

    closed = jax.make_jaxpr(forward)(variables, batch, rngs)
    structure, leaves = returned[0]

    def finish(arrays: list[Any]) -> Any:
        given = iter(arrays)
        return jax.tree.unflatten(structure, [next(given) if leaf is None else leaf for leaf in leaves])

    return Program(closed.jaxpr, closed.consts), finish


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, traced or not; other leaves are kept as they are."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _interceptor() -> Callable[..., Any]:
    inside = False

    def intercept(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        nonlocal inside
        function = inspect.unwrap(getattr(context.orig_method, "func", context.orig_method))
        if function is _DROPOUT_CALL:
            return kwargs["inputs"] if "inputs" in kwargs else args[0]
        if inside or function not in _LAYER_CALLS or context.module.is_initializing():
            return next_call(*args, **kwargs)
        given = inspect.signature(function).bind(context.module, *args, **kwargs).arguments
        inside = True
        try:
            options = {k: given[k] for k in ("mask", "domain") if given.get(k) is not None}
            return _evaluate_layer(context.module, _LAYER_CALLS[function], given["x"], **options)
        finally:
            inside = False

    return intercept


def _evaluate_layer(layer: Any, function: Callable[..., Any], x: Any, mask: Any = None, domain: Any = None) -> Array:
    """The layer's own evaluation, with the statistics that come out of the tap."""
    x = jnp.asarray(x)
    name = f"{type(layer).__name__} '{'/'.join(layer.path)}'"
    if not layer.has_variable("batch_stats", "mean"):
        raise ValueError(
            f"{name} has no stored statistics: `variables` must hold its 'mean' and 'var' in 'batch_stats'. Inside a "
            "lifted transformation, list 'batch_stats' in its `variable_axes`, `variable_broadcast` or "
            "`variable_carry`."
        )
    stored = {key: nn.meta.unbox(layer.get_variable("batch_stats", key)) for key in ("mean", "var")}
    features = linen.feature_axes(x.ndim, layer.axis)
    axes = tuple(axis for axis in range(x.ndim) if axis not in features)
    others = [] if mask is None else [_mask_weights(function, mask, x, features)]
    numbers = linen.domain_of(domain, getattr(layer, "num_domains", None), x.shape, features)
    if numbers is not None:
        others.append(numbers)
    groups = layer.axis_index_groups
    params = {
        "axes": axes,
        "layer": name,
        "lanes": 0,
        "axis_name": layer.axis_name if _is_bound(layer.axis_name) else None,
        "axis_index_groups": None if groups is None else tuple(map(tuple, groups)),
        "has_weights": mask is not None,
        "has_domain": numbers is not None,
    }
    mean, var = tap_p.bind(x, stored["mean"], stored["var"], *others, **params)
    variables = {"params": layer.variables.get("params", {}), "batch_stats": {"mean": mean, "var": var}}
    evaluated = layer.clone(parent=None, name=None, use_running_average=True)
    options = {"mask": mask, "domain": domain}
    return evaluated.apply(variables, x, **{k: v for k, v in options.items() if v is not None}, method=function)


def _is_bound(axis_name: Any) -> bool:
    """Whether a transformation that is under way maps this axis."""
    try:
        return axis_name is not None and bool(jax.lax.axis_size(axis_name))
    except NameError:
        return False


def _mask_weights(function: Callable[..., Any], mask: Any, x: Array, features: tuple[int, ...]) -> Array:
    if function is linen.BatchNorm.__call__:
        return linen.position_weights(mask, x.shape, features).astype(jnp.float32)
    mask = jnp.asarray(mask, bool)
    return mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape).astype(jnp.float32)


class Program:
    """A traced evaluation, in pieces: runs of plain equations, and single equations with taps inside."""

    def __init__(self, jaxpr: Any, consts: Sequence[Any]) -> None:
        self.jaxpr = jaxpr
        self.consts = list(consts)
        self.pieces = list(_pieces(jaxpr))
        self._inner: dict[int, Program] = {}

    def tap_inputs(self) -> list[Any]:
        """The abstract input of each tap, in the order of the program."""
        return [e.invars[0].aval for e in _tap_equations(self.jaxpr)]

    def layer_names(self) -> list[str]:
        """The layer of each tap, in the order of the program."""
        return [e.params["layer"] for e in _tap_equations(self.jaxpr)]

    def run(self, args: Sequence[Any], on_tap: OnTap, site: int = 0) -> tuple[list[Any], list[Any]]:
        """Interprets the program: its outputs, and the record of each tap in the order of the program.

        Inside a scan records are stacked along a leading axis, one for each step; in a branch of a `cond` that is
        not taken they are zeros. Taps are numbered from `site`.
        """
        env = dict(zip((*self.jaxpr.constvars, *self.jaxpr.invars), (*self.consts, *args)))
        records: list[Any] = []
        for piece in self.pieces:
            values = [_read(env, v) for v in piece.invars]
            if isinstance(piece, _Plain):
                outputs = piece.function(*values)
            else:
                outputs, found = self._run_tapped(piece, values, on_tap, site + len(records))
                records += found
            env.update(zip(piece.outvars, outputs))
        return [_read(env, v) for v in self.jaxpr.outvars], records

    def read_by_taps(self, args: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """What reaches the `mean` of each tap where only some arguments are known: the others are `UNKNOWN`.

        Computes what the known arguments determine and nothing else; returns the outputs and the means, stacked as
        the records of `run` are. All branches of a `cond` are read.
        """
        consts = (UNKNOWN if isinstance(c, jax.core.Tracer) else c for c in self.consts)
        env = dict(zip((*self.jaxpr.constvars, *self.jaxpr.invars), (*consts, *args)))
        means: list[Any] = []
        for eqn in self.jaxpr.eqns:
            values = [_read(env, v) for v in eqn.invars]
            if eqn.primitive is tap_p:
                means.append(values[1])
                outputs = [UNKNOWN] * len(eqn.outvars)
            elif _has_tap(eqn):
                outputs, found = self._read_tapped(eqn, values)
                means += found
            elif eqn.primitive.name in _TYPE_CHANGES:
                outputs = values
            elif eqn.effects or any(v is UNKNOWN for v in values):
                outputs = [UNKNOWN] * len(eqn.outvars)
            else:
                outputs = _evaluate(eqn, values, self.jaxpr.debug_info)
            env.update(zip(eqn.outvars, outputs))
        return [_read(env, v) for v in self.jaxpr.outvars], means

    def _run_tapped(self, eqn: Any, values: list[Any], on_tap: OnTap, site: int) -> tuple[list[Any], list[Any]]:
        if eqn.primitive is tap_p:
            mean, var, record = on_tap(_tap(eqn.params, values, site))
            return [_of_type(a, v.aval) for a, v in zip((mean, var), eqn.outvars)], [record]
        programs = self._programs(eqn)
        kind = _kind(eqn)
        if kind == "cond":
            return _run_cond(programs, values, on_tap, site)
        if kind == "scan":
            return _run_scan(eqn, programs[0], values, on_tap, site)
        if kind == "remat":
            return _run_remat(eqn, programs[0], values, on_tap, site)
        outputs, records = programs[0].run(values, on_tap, site)
        if kind == "custom":
            outputs = [_without_gradient(a, eqn.primitive.name) for a in outputs]
        return outputs, records

    def _read_tapped(self, eqn: Any, values: list[Any]) -> tuple[list[Any], list[Any]]:
        programs = self._programs(eqn)
        kind = _kind(eqn)
        if kind == "cond":
            return _read_cond(programs, values)
        if kind == "scan":
            return _read_scan(eqn, programs[0], values)
        return programs[0].read_by_taps(values)

    def _programs(self, eqn: Any) -> list["Program"]:
        jaxprs = _subjaxprs(eqn)
        for jaxpr in jaxprs:
            if id(jaxpr) not in self._inner:
                self._inner[id(jaxpr)] = Program(_opened(jaxpr), getattr(jaxpr, "consts", ()))
        return [self._inner[id(jaxpr)] for jaxpr in jaxprs]


def _tap(params: Mapping[str, Any], values: Sequence[Any], site: int) -> Tap:
    x, mean, var, *others = values
    weights = others.pop(0) if params["has_weights"] else None
    domain = others.pop(0) if params["has_domain"] else None
    axis_name = params["axis_name"]
    if axis_name is not None and not _is_bound(axis_name):
        raise ValueError(
            f"{params['layer']} synchronizes over the axis {axis_name!r} of a transformation inside the model, which "
            "statistics chosen from outside cannot follow. Map the model over that axis from outside."
        )
    groups = params["axis_index_groups"]
    return Tap(x, mean, var, weights, domain, params["axes"], params["lanes"], axis_name, groups, site, params["layer"])


def _of_type(a: Any, aval: Any) -> Array:
    """`a` in the dtype of `aval`, varying over the mapped axes that it varies over."""
    missing = tuple(sorted(_varying(aval) - _varying(jax.typeof(a))))
    a = a.astype(aval.dtype)
    return jax.lax.pcast(a, missing, to="varying") if missing else a


def _varying(aval: Any) -> frozenset[Any]:
    """The mapped axes of `jax.shard_map` over which a type varies."""
    return frozenset(aval.mat.varying)


class _Unknown:
    """A value that the known arguments do not determine."""


UNKNOWN = _Unknown()


class _Plain(NamedTuple):
    """A run of equations without taps, as one function."""

    function: Callable[..., Any]
    invars: list[Any]
    outvars: list[Any]


def _pieces(jaxpr: Any) -> Iterator[Any]:
    last_use = {v: i for i, e in enumerate(jaxpr.eqns) for v in e.invars if _is_variable(v)}
    last_use |= {v: len(jaxpr.eqns) for v in jaxpr.outvars if _is_variable(v)}
    tapped = [i for i, e in enumerate(jaxpr.eqns) if _has_tap(e)]
    begin = 0
    for end in (*tapped, len(jaxpr.eqns)):
        eqns = jaxpr.eqns[begin:end]
        if eqns:
            made = dict.fromkeys(v for e in eqns for v in e.outvars)
            read = dict.fromkeys(v for e in eqns for v in e.invars if _is_variable(v) and v not in made)
            kept = [v for v in made if last_use.get(v, -1) >= end]
            yield _Plain(_as_function(eqns, list(read), kept, jaxpr.debug_info), list(read), kept)
        if end < len(jaxpr.eqns):
            yield jaxpr.eqns[end]
        begin = end + 1


def _as_function(eqns: Sequence[Any], invars: list[Any], outvars: list[Any], debug_info: Any) -> Callable[..., Any]:
    jaxpr = jex.Jaxpr(
        constvars=[],
        invars=invars,
        outvars=outvars,
        eqns=list(eqns),
        effects=set().union(*(e.effects for e in eqns)),
        debug_info=debug_info.with_unknown_names(),
    )
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, []))


def _evaluate(eqn: Any, values: Sequence[Any], debug_info: Any) -> list[Any]:
    read = {v: a for v, a in zip(eqn.invars, values) if _is_variable(v)}
    return _as_function([eqn], list(read), list(eqn.outvars), debug_info)(*read.values())


def _run_cond(programs: list[Program], values: list[Any], on_tap: OnTap, site: int) -> tuple[list[Any], list[Any]]:
    index, *operands = values
    sites = [site + sum(len(p.layer_names()) for p in programs[:i]) for i in range(len(programs))]

    def run(i: int, *operands: Any) -> tuple[list[Any], list[Any]]:
        return programs[i].run(operands, on_tap, sites[i])

    shapes = [jax.eval_shape(lambda *a, i=i: run(i, *a)[1], *operands) for i in range(len(programs))]

    def branch(i: int, *operands: Any) -> tuple[list[Any], list[Any]]:
        outputs, found = run(i, *operands)
        records = [jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), others) for others in shapes]
        records[i] = found
        return outputs, [*chain.from_iterable(records)]

    return jax.lax.switch(index, [partial(branch, i) for i in range(len(programs))], *operands)


def _read_cond(programs: list[Program], values: list[Any]) -> tuple[list[Any], list[Any]]:
    _, *operands = values
    outputs, means = zip(*(p.read_by_taps(operands) for p in programs))
    return [_agreed(values) for values in zip(*outputs)], [*chain.from_iterable(means)]


def _agreed(values: Sequence[Any]) -> Any:
    if any(v is UNKNOWN for v in values):
        return UNKNOWN
    return values[0] if all(np.array_equal(values[0], v) for v in values[1:]) else UNKNOWN


def _run_scan(eqn: Any, program: Program, values: list[Any], on_tap: OnTap, site: int) -> tuple[list[Any], list[Any]]:
    consts, carry, xs = _scan_operands(eqn, program, values)

    def body(carry: list[Any], xs: list[Any]) -> Any:
        outputs, records = program.run([*consts, *carry, *xs], on_tap, site)
        return outputs[: len(carry)], (outputs[len(carry) :], records)

    length, reverse = eqn.params["length"], eqn.params["reverse"]
    carry, (ys, records) = jax.lax.scan(body, carry, xs, length=length, reverse=reverse, unroll=eqn.params["unroll"])
    return [*carry, *ys], records


def _read_scan(eqn: Any, program: Program, values: list[Any]) -> tuple[list[Any], list[Any]]:
    consts, carry, xs = _scan_operands(eqn, program, values)
    steps = range(eqn.params["length"])
    ys: dict[int, list[Any]] = {}
    means: dict[int, list[Any]] = {}
    for i in reversed(steps) if eqn.params["reverse"] else steps:
        outputs, means[i] = program.read_by_taps([*consts, *carry, *(x if x is UNKNOWN else x[i] for x in xs)])
        carry, ys[i] = outputs[: len(carry)], outputs[len(carry) :]
    return [*carry, *_stacked(ys)], _stacked(means)


def _stacked(steps: Mapping[int, list[Any]]) -> list[Any]:
    columns = zip(*(steps[i] for i in sorted(steps)))
    return [UNKNOWN if any(a is UNKNOWN for a in column) else np.stack(column) for column in columns]


def _scan_operands(eqn: Any, program: Program, values: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Constants, carries and scanned inputs, told apart by rank: the parameters' names differ between jax versions."""
    inner = program.jaxpr
    carries = sum(out.aval.ndim == v.aval.ndim for out, v in zip(eqn.outvars, inner.outvars))
    scanned = sum(v.aval.ndim > i.aval.ndim for v, i in zip(eqn.invars, inner.invars))
    begin = len(values) - scanned - carries
    return values[:begin], values[begin : begin + carries], values[begin + carries :]


def _run_remat(eqn: Any, program: Program, values: list[Any], on_tap: OnTap, site: int) -> tuple[list[Any], list[Any]]:
    def run(*values: Any) -> tuple[list[Any], list[Any]]:
        return program.run(values, on_tap, site)

    return jax.checkpoint(run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])(*values)


def _without_gradient(x: Array, rule: str) -> Array:
    """`x`, whose differentiation is an error: a rule of the model's own around a batch-norm layer would be lost."""

    @jax.custom_jvp
    def identity(x: Array) -> Array:
        return x

    @identity.defjvp
    def differentiate(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            f"A batch-norm layer lies inside a function with a differentiation rule of its own (`{rule}`), which is "
            "lost where statistics are chosen from outside: its gradient is not available."
        )

    return identity(x)


_TYPE_CHANGES = ("pvary", "pcast")  # within jax.shard_map: identities

_KINDS = {
    "jit": "inline",
    "pjit": "inline",
    "closed_call": "inline",
    "core_call": "inline",
    "checkpoint": "remat",
    "remat": "remat",
    "remat2": "remat",
    "custom_jvp_call": "custom",
    "custom_vjp_call": "custom",
    "custom_vjp_call_jaxpr": "custom",
    "scan": "scan",
    "cond": "cond",
}


def _kind(eqn: Any) -> str:
    name = eqn.primitive.name
    if name not in _KINDS:
        inside = next(e for j in _subjaxprs(eqn) for e in _tap_equations(_opened(j)))
        raise ValueError(
            f"A batch-norm layer must not lie inside `{name}`, where its statistics cannot be chosen from outside: "
            f"got {inside.params['layer']}. Use `nn.scan` in the place of a `while` loop, and call the model outside "
            "of `shard_map`."
        )
    return _KINDS[name]


def _subjaxprs(eqn: Any) -> list[Any]:
    values = (v for p in eqn.params.values() for v in (p if isinstance(p, tuple | list) else (p,)))
    return [v for v in values if hasattr(_opened(v), "eqns")]


def _opened(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _tap_equations(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        if eqn.primitive is tap_p:
            yield eqn
        for inner in _subjaxprs(eqn):
            yield from _tap_equations(_opened(inner))


def _has_tap(eqn: Any) -> bool:
    return eqn.primitive is tap_p or any(True for j in _subjaxprs(eqn) for _ in _tap_equations(_opened(j)))


def _is_variable(v: Any) -> bool:
    return not isinstance(v, jex.Literal)


def _read(env: Mapping[Any, Any], v: Any) -> Any:
    return env[v] if _is_variable(v) else v.val
