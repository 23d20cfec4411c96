"""Any Flax model, of Linen or nnx, as a program whose batch-norm statistics are chosen from outside.

The model's evaluation is traced once. Where a batch-norm layer runs, a primitive `(x, mean, var) -> (mean', var')`
stands between the stored statistics and the layer's own evaluation code. A reader (`OnTap`) then decides what `mean'`
and `var'` are while the traced program is interpreted: the stored ones, or those of the batch.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import DenyList
from jaxtyping import Array

from flaxbn.data.samples import is_array as is_array
from flaxbn.data.samples import show
from flaxbn.layers.linen import BatchNorm
from flaxbn.layers.names import layer_label
from flaxbn.models.arguments import Model, is_opened_nnx, model_class
from flaxbn.models.first_call import explained_call
from flaxbn.models.leaves import named_leaves
from flaxbn.models.mark import running_module
from flaxbn.models.nnx_calls import intercept_nnx
from flaxbn.models.nnx_layers import evaluate_nnx_layer
from flaxbn.models.places import Path
from flaxbn.models.recognized import known_as, recognized_key
from flaxbn.models.recognized_calls import check_stored, evaluate_recognized, own_all
from flaxbn.models.taps import chosen_statistics
from flaxbn.models.unseen import what_is_held
from flaxbn.tracing.jaxpr import with_outputs
from flaxbn.tracing.primitive import observing
from flaxbn.tracing.program import Program

Call = Callable[[Any, Any], Any]
"""How a model is run for evaluation, `(module, batch) -> output`."""

LAYER_CALLS = {inspect.unwrap(call): call for call in (nn.BatchNorm.__call__, BatchNorm.__call__)}
DROPOUT_CALL = inspect.unwrap(nn.Dropout.__call__)
SPECTRAL_CALL = inspect.unwrap(nn.SpectralNorm.__call__)
"""Of a class of Flax that keeps something in `batch_stats`, and is no batch norm."""


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
    return _applied(model, variables, batch, call, rngs)[0]


def _applied(model: Model, variables: Any, batch: Any, call: Call | None, rngs: Any) -> tuple[Any, Any]:
    """What `call` returns, and the variables afterwards."""
    batch = show(batch)
    with explained_call(model_class(model), call, batch, variables, is_nnx=is_opened_nnx(model)):
        output, after = model.apply(
            variables, batch, rngs=rngs, method=call or _call_directly, mutable=DenyList("params")
        )
    return output, after


class Traced(NamedTuple):
    """A traced evaluation.

    Attributes:
        program: its arguments are the leaves of (variables, batch, rngs), its outputs the arrays that `call` returns.
        finish: makes of the program's outputs what `call` returns.
        written: for each leaf of `batch_stats` that is another one after the call, by its path, what it then is, as a
            variable of the program; where transformations hand all collections through, such leaves may be unchanged.
        silenced: the collections that dropout layers of Linen, which are off, would draw from.
    """

    program: Program
    finish: Callable[[list[Any]], Any]
    written: dict[Path, Any]
    silenced: frozenset[str]


def trace(
    model: Model,
    variables: Mapping[str, Any],
    batch: Any,
    call: Call | None,
    rngs: Mapping[str, Array] | None,
    *,
    dropout: Collection[str] = (),
) -> Traced:
    """Traces the evaluation of `model` on `batch`.

    The arguments may be abstract. The model runs as in `evaluate`.

    Args:
        model: the model, as `open_model` gives it.
        variables: all of its collections.
        batch: what `call` is given.
        call: how the model is run; None: on the batch alone.
        rngs: random keys by collection, or None.
        dropout: the collections of random keys whose dropout layers run as `call` runs them; all others are off.
    """
    returned: list[Any] = []
    silenced: set[str] = set()

    def forward(variables: Any, batch: Any, rngs: Any) -> list[Any]:
        look = intercept_nnx(partial(evaluate_nnx_layer, dropout))
        with nn.intercept_methods(_interceptor(dropout, silenced)), look, observing(("trace", recognized_key())):
            output, after = _applied(model, variables, batch, call, rngs)
        leaves, structure = jax.tree.flatten(output)
        before = named_leaves(variables.get("batch_stats", {}))
        stored = named_leaves(after.get("batch_stats", {}))
        written = {path: leaf for path, leaf in stored.items() if path in before and leaf is not before[path]}
        returned.append((structure, [None if is_array(leaf) else leaf for leaf in leaves], list(written)))
        return [leaf for leaf in leaves if is_array(leaf)] + list(written.values())

    closed = jax.make_jaxpr(forward)(variables, batch, rngs)
    structure, leaves, written = returned[0]

    def finish(arrays: list[Any]) -> Any:
        given = iter(arrays)
        return jax.tree.unflatten(structure, [next(given) if leaf is None else leaf for leaf in leaves])

    outvars = closed.jaxpr.outvars
    count = len(outvars) - len(written)
    return Traced(
        Program(with_outputs(closed.jaxpr, outvars[:count]), closed.consts),
        finish,
        dict(zip(written, outvars[count:])),
        frozenset(silenced),
    )


def running_function(context: nn.module.InterceptorContext) -> Any:
    """The function that runs in an intercepted call, by which a layer is known: its class may be a subclass."""
    return inspect.unwrap(getattr(context.orig_method, "func", context.orig_method))


def _interceptor(dropout: Collection[str], silenced: set[str]) -> Callable[..., Any]:
    inside = False

    def intercept(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        nonlocal inside
        function, layer = running_function(context), context.module
        if function is DROPOUT_CALL and layer.rng_collection not in dropout:
            silenced.add(layer.rng_collection)
            return kwargs["inputs"] if "inputs" in kwargs else args[0]
        known = None if inside else _evaluation_of(layer, function)
        if known is None:
            with running_module(layer):
                return next_call(*args, **kwargs)
        inside = True
        try:
            return known(args, kwargs)
        finally:
            inside = False

    return intercept


def _evaluation_of(layer: nn.Module, function: Any) -> Callable[[Any, Any], Any] | None:
    """How a layer evaluates behind a tap, from the arguments of its call; None for one that runs as it is."""
    said = known_as(type(layer), function)
    if (said is None and function not in (*LAYER_CALLS, SPECTRAL_CALL)) or layer.is_initializing():
        return None
    method, known = said or (None, None)
    if method is not None and known is not None:
        return partial(evaluate_recognized, layer, known, method)
    if said is not None or function is SPECTRAL_CALL:
        own_all(layer, below=False)
        return None

    def evaluated(args: Any, kwargs: Any) -> Array:
        given = inspect.signature(function).bind(layer, *args, **kwargs).arguments
        options = {k: given[k] for k in ("mask", "domain") if given.get(k) is not None}
        return _evaluate_layer(layer, LAYER_CALLS[function], given["x"], **options)

    return evaluated


def _evaluate_layer(layer: Any, function: Callable[..., Any], x: Any, mask: Any = None, domain: Any = None) -> Array:
    """The layer's own evaluation, with the statistics that come out of the tap."""
    x = jnp.asarray(x)
    check_stored(layer, "mean", "var")
    stored = {key: nn.meta.unbox(layer.get_variable("batch_stats", key)) for key in ("mean", "var")}
    own = function is BatchNorm.__call__
    mean, var = chosen_statistics(layer, layer_label(layer), x, **stored, mask=mask, domain=domain, own_masks=own)
    variables = {"params": layer.variables.get("params", {}), "batch_stats": {"mean": mean, "var": var}}
    evaluated = layer.clone(parent=None, name=None, use_running_average=True)
    options = {"mask": mask, "domain": domain}
    return evaluated.apply(variables, x, **{k: v for k, v in options.items() if v is not None}, method=function)


def check_layers(program: Program, model: Model, variables: Mapping[str, Any]) -> None:
    """A traced model without batch-norm layers is an error, which lists what else it holds."""
    if not program.tap_inputs():
        raise ValueError(
            f"`model` must run a batch-norm layer (BatchNorm of flax.linen, flax.nnx, flaxbn or flaxbn.nnx, a "
            f"BatchRenorm, or a subclass): {model_class(model).__name__} ran none in `call`. {what_is_held(variables)}"
        )
