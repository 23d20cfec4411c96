"""Whether the layers that a call runs are in evaluation mode."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from flaxbn.layers.names import layer_label
from flaxbn.models.arguments import Model
from flaxbn.models.linen import DROPOUT_CALL, LAYER_CALLS, Call, evaluate, running_function
from flaxbn.models.nnx_calls import intercept_nnx
from flaxbn.models.nnx_layers import is_dropout, nnx_label
from flaxbn.models.recognized import Recognized, known_as
from flaxbn.tracing.primitive import observing


def check_evaluation(model: Model, variables: Mapping[str, Any], batch: Any, call: Call | None) -> None:
    """A batch-norm layer that normalizes by the batch or updates its average, or dropout that is on, is an error.

    What a layer was told is looked at where it runs, since a model may tell each of its layers something else; the
    model is traced for that, and nothing is computed.

    Raises:
        ValueError: naming the first such layer, and what it does.
    """

    def intercept(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        _check(layer_label(context.module), _linen_deed(context, args, kwargs), _TURN_OFF)
        return next_call(*args, **kwargs)

    def look(cls: type, function: Callable[..., Any], layer: Any, args: Any, kwargs: Any) -> Any:
        given = inspect.signature(function).bind(layer, *args, **kwargs).arguments
        _check(nnx_label(layer), _training_deed(layer, given, drops=is_dropout(cls)), _TURN_OFF_NNX)
        return function(layer, *args, **kwargs)

    def forward(variables: Any, batch: Any) -> None:
        with nn.intercept_methods(intercept), intercept_nnx(look), observing("modes"):
            evaluate(model, variables, batch, call)

    jax.eval_shape(forward, variables, batch)


_NORMALIZES = "normalizes by the batch, so that a prediction depends on the other examples"
_TURN_OFF = "with `call=lambda m, b: m(b, train=False)` if that is what the model calls it"
_TURN_OFF_NNX = "by `model.eval()` before the model is split, and where `call` gives layers their mode, there"


def _check(label: str, done: str, turn_off: str) -> None:
    """What a layer does in training only, if it does any, is an error."""
    if done:
        raise ValueError(
            f"Every layer must be in evaluation mode: {label} {done}. Turn training off, {turn_off}; where the stored "
            "statistics are not those of the data, compute them first, with `flaxbn.estimate_population_stats`."
        )


def _linen_deed(context: nn.module.InterceptorContext, args: Any, kwargs: Any) -> str:
    """What the layer of an intercepted call does in training only; empty for one in evaluation, and for others."""
    function, layer = running_function(context), context.module
    said = known_as(type(layer), function)
    if said is not None:
        trains = said[1] is not None and not layer.is_initializing() and _is_in_training(said[1], context, args, kwargs)
        return _NORMALIZES if trains else ""
    if function not in (*LAYER_CALLS, DROPOUT_CALL) or layer.is_initializing():
        return ""
    given = inspect.signature(function).bind(layer, *args, **kwargs).arguments
    return _training_deed(layer, given, drops=function is DROPOUT_CALL)


def _training_deed(layer: Any, given: Mapping[str, Any], *, drops: bool) -> str:
    """What a layer does in training only, dropout or batch normalization, given its arguments; empty in evaluation."""

    def is_false(option: str) -> bool:
        value = getattr(layer, option) if given.get(option) is None else given[option]
        return value is not None and not value

    if drops:
        return "drops values at random" if is_false("deterministic") and layer.rate > 0 else ""
    if getattr(layer, "frozen", False):
        return ""
    if is_false("use_running_average"):
        return _NORMALIZES
    return "updates its running average" if given.get("update_running_average") else ""


def _is_in_training(
    known: Recognized, context: nn.module.InterceptorContext, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool:
    """Whether a layer of a recognized class is told something else than to evaluate, as far as that is no tracer."""
    given = inspect.signature(running_function(context)).bind(context.module, *args, **kwargs)
    given.apply_defaults()

    def told(name: str) -> Any:
        value = given.arguments.get(name)
        return getattr(context.module, name, None) if value is None else value

    values = ((told(name), wanted) for name, wanted in known.evaluation.items())
    return any(not isinstance(value, jax.core.Tracer) and value != wanted for value, wanted in values)
