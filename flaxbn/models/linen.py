"""Any Flax model, of Linen or nnx, as a program whose batch-norm statistics are chosen from outside.

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
import numpy as np
from flax.core import DenyList
from jaxtyping import Array

from flaxbn.layers.linen import BatchNorm
from flaxbn.layers.names import layer_label
from flaxbn.models.arguments import Model, model_name
from flaxbn.models.nnx_calls import intercept_nnx
from flaxbn.models.nnx_layers import evaluate_nnx_layer
from flaxbn.models.taps import chosen_statistics
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
    model: Model,
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
    return model.apply(variables, batch, rngs=rngs, method=call_or_default(call), mutable=DenyList("params"))[0]


def trace(
    model: Model, variables: Mapping[str, Any], batch: Any, call: Call | None, rngs: Mapping[str, Array] | None
) -> tuple["Program", Callable[[list[Any]], Any]]:
    """Traces the evaluation of `model` on `batch`: the program, and what makes its outputs those of `call`.

    The arguments may be abstract. The model runs as in `evaluate`, but dropout layers are off.
    """
    returned: list[Any] = []

    def forward(variables: Any, batch: Any, rngs: Any) -> list[Any]:
        with nn.intercept_methods(_interceptor()), intercept_nnx(evaluate_nnx_layer), observing(True):
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


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, traced or not; other leaves are kept as they are."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


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
    own = function is BatchNorm.__call__
    mean, var = chosen_statistics(layer, name, x, **stored, mask=mask, domain=domain, own_masks=own)
    variables = {"params": layer.variables.get("params", {}), "batch_stats": {"mean": mean, "var": var}}
    evaluated = layer.clone(parent=None, name=None, use_running_average=True)
    options = {"mask": mask, "domain": domain}
    return evaluated.apply(variables, x, **{k: v for k, v in options.items() if v is not None}, method=function)


def check_layers(program: Program, model: Model) -> None:
    """A traced model without batch-norm layers is an error."""
    if not program.tap_inputs():
        raise ValueError(
            f"`model` must run a batch-norm layer (BatchNorm of flax.linen, flax.nnx, flaxbn or flaxbn.nnx, a "
            f"BatchRenorm, or a subclass): {model_name(model)} ran none in `call`."
        )
