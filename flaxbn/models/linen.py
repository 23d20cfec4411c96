"""Any Flax model as a program whose batch-norm statistics are chosen from outside.

The model's evaluation is traced once. Where a batch-norm layer runs, a primitive `(x, mean, var) -> (mean', var')`
stands between the stored statistics and the layer's own evaluation code. A reader (`OnTap`) then decides what `mean'`
and `var'` are while the traced program is interpreted: the stored ones, or those of the batch.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import DenyList
from jaxtyping import Array

from flaxbn.data.samples import is_array as is_array
from flaxbn.data.samples import show
from flaxbn.layers.arguments import domain_of, feature_axes, position_weights
from flaxbn.layers.linen import BatchNorm
from flaxbn.layers.names import layer_label
from flaxbn.tracing.primitive import is_bound, tap_p
from flaxbn.tracing.program import Program

Call = Callable[[Any, Any], Any]
"""How a model is run for evaluation, `(module, batch) -> output`."""

LAYER_CALLS = {inspect.unwrap(call): call for call in (nn.BatchNorm.__call__, BatchNorm.__call__)}
DROPOUT_CALL = inspect.unwrap(nn.Dropout.__call__)
observing = jax.make_user_context(None)
"""Says during a trace what looks on, so that jax's cache of traced functions does not hand one look to another."""


def call_or_default(call: Call | None) -> Call:
    """How the user runs the model, by default `module(batch)`."""
    return call or _call_directly


def _call_directly(module: Any, batch: Any) -> Any:
    return module(batch)


def evaluate(
    model: nn.Module,
    variables: Mapping[str, Any],
    batch: Any,
    call: Call | None,
    rngs: dict[str, Array] | None = None,
) -> Any:
    """What `call` returns for a batch.

    Everything but the parameters is mutable, so that models which write a cache, or carry `batch_stats` through a scan,
    run as they are; what they change is dropped.

    Args:
        model: the model.
        variables: its variables.
        batch: what `call` takes.
        call: `(module, batch) -> output`; by default `module(batch)`.
        rngs: random keys by name, as in `model.apply`.
    """
    batch = show(batch)
    return model.apply(variables, batch, rngs=rngs, method=call_or_default(call), mutable=DenyList("params"))[0]


def trace(
    model: nn.Module, variables: Mapping[str, Any], batch: Any, call: Call | None, rngs: Mapping[str, Array] | None
) -> tuple["Program", Callable[[list[Any]], Any]]:
    """Traces the evaluation of `model` on `batch`: the program, and what makes its outputs those of `call`.

    The arguments may be abstract. The model runs as in `evaluate`, but `nn.Dropout` layers are off.
    """
    returned: list[Any] = []

    def forward(variables: Any, batch: Any, rngs: Any) -> list[Any]:
        with nn.intercept_methods(_interceptor()), observing(True):
            output = evaluate(model, variables, batch, call, rngs)
        leaves, structure = jax.tree.flatten(output)
        returned.append((structure, [None if is_array(leaf) else leaf for leaf in leaves]))
        return [leaf for leaf in leaves if is_array(leaf)]

    closed = jax.make_jaxpr(forward)(variables, batch, rngs)
    structure, leaves = returned[0]

    def finish(arrays: list[Any]) -> Any:
        given = iter(arrays)
        return jax.tree.unflatten(structure, [next(given) if leaf is None else leaf for leaf in leaves])

    return Program(closed.jaxpr, closed.consts), finish


def running_function(context: nn.module.InterceptorContext) -> Any:
    """The function that runs in an intercepted call, by which a layer is known: its class may be a subclass."""
    return inspect.unwrap(getattr(context.orig_method, "func", context.orig_method))


def _interceptor() -> Callable[..., Any]:
    inside = False

    def intercept(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        nonlocal inside
        function = running_function(context)
        if function is DROPOUT_CALL:
            return kwargs["inputs"] if "inputs" in kwargs else args[0]
        if inside or function not in LAYER_CALLS or context.module.is_initializing():
            return next_call(*args, **kwargs)
        given = inspect.signature(function).bind(context.module, *args, **kwargs).arguments
        inside = True
        try:
            options = {k: given[k] for k in ("mask", "domain") if given.get(k) is not None}
            return _evaluate_layer(context.module, LAYER_CALLS[function], given["x"], **options)
        finally:
            inside = False

    return intercept


def _evaluate_layer(layer: Any, function: Callable[..., Any], x: Any, mask: Any = None, domain: Any = None) -> Array:
    """The layer's own evaluation, with the statistics that come out of the tap."""
    x = jnp.asarray(x)
    name = layer_label(layer)
    if not layer.has_variable("batch_stats", "mean"):
        raise ValueError(
            f"{name} has no stored statistics: `variables` must hold its 'mean' and 'var' in 'batch_stats'. Inside a "
            "lifted transformation, list 'batch_stats' in its `variable_axes`, `variable_broadcast` or "
            "`variable_carry`."
        )
    stored = {key: nn.meta.unbox(layer.get_variable("batch_stats", key)) for key in ("mean", "var")}
    features = feature_axes(x.ndim, layer.axis)
    axes = tuple(axis for axis in range(x.ndim) if axis not in features)
    others = [] if mask is None else [_mask_weights(function, mask, x, features)]
    numbers = domain_of(domain, getattr(layer, "num_domains", None), x.shape, features)
    if numbers is not None:
        others.append(numbers)
    groups = layer.axis_index_groups
    params = {
        "axes": axes,
        "layer": name,
        "lanes": 0,
        "channel_rank": len(features),
        "axis_name": layer.axis_name if is_bound(layer.axis_name) else None,
        "axis_index_groups": None if groups is None else tuple(map(tuple, groups)),
        "has_weights": mask is not None,
        "has_domain": numbers is not None,
    }
    mean, var = tap_p.bind(x, stored["mean"], stored["var"], *others, **params)
    variables = {"params": layer.variables.get("params", {}), "batch_stats": {"mean": mean, "var": var}}
    evaluated = layer.clone(parent=None, name=None, use_running_average=True)
    options = {"mask": mask, "domain": domain}
    return evaluated.apply(variables, x, **{k: v for k, v in options.items() if v is not None}, method=function)


def _mask_weights(function: Callable[..., Any], mask: Any, x: Array, features: tuple[int, ...]) -> Array:
    if function is BatchNorm.__call__:
        return position_weights(mask, x.shape, features).astype(jnp.float32)
    mask = jnp.asarray(mask, bool)
    return mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape).astype(jnp.float32)


def check_layers(program: Program, model: nn.Module) -> None:
    """A traced model without batch-norm layers is an error."""
    if not program.tap_inputs():
        raise ValueError(
            f"`model` must run a batch-norm layer (flax.linen.BatchNorm, flaxbn.BatchNorm or flaxbn.BatchRenorm, or a "
            f"subclass): {type(model).__name__} ran none in `call`."
        )
