"""Whether the layers that a call runs are in evaluation mode."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from flaxbn.layers.names import layer_label
from flaxbn.models.linen import DROPOUT_CALL, LAYER_CALLS, Call, evaluate, running_function
from flaxbn.models.recognized import Recognized, known_as
from flaxbn.tracing.primitive import observing


def check_evaluation(model: nn.Module, variables: Mapping[str, Any], batch: Any, call: Call | None) -> None:
    """A batch-norm layer that normalizes by the batch or updates its average, or dropout that is on, is an error.

    What a layer was told is looked at where it runs, since a model may tell each of its layers something else; the
    model is traced for that, and nothing is computed.

    Raises:
        ValueError: naming the first such layer, and what it does.
    """

    def intercept(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        done = _training_deed(context, args, kwargs)
        if done:
            raise ValueError(
                f"Every layer must be in evaluation mode: {layer_label(context.module)} {done}. Turn training "
                "off, with `call=lambda m, b: m(b, train=False)` if that is what the model calls it; where the stored "
                "statistics are not those of the data, compute them first, with `flaxbn.estimate_population_stats`."
            )
        return next_call(*args, **kwargs)

    def forward(variables: Any, batch: Any) -> None:
        with nn.intercept_methods(intercept), observing("modes"):
            evaluate(model, variables, batch, call)

    jax.eval_shape(forward, variables, batch)


def _training_deed(context: nn.module.InterceptorContext, args: Any, kwargs: Any) -> str:
    """What the layer of an intercepted call does in training only; empty for one in evaluation, and for others."""
    function, layer = running_function(context), context.module
    said = known_as(type(layer), function)
    if said is not None:
        trains = said[1] is not None and not layer.is_initializing() and _is_in_training(said[1], context, args, kwargs)
        return "normalizes by the batch, so that a prediction depends on the other examples" if trains else ""
    if function not in (*LAYER_CALLS, DROPOUT_CALL) or layer.is_initializing():
        return ""
    given = inspect.signature(function).bind(layer, *args, **kwargs).arguments

    def is_false(option: str) -> bool:
        value = getattr(layer, option) if given.get(option) is None else given[option]
        return value is not None and not value

    if function is DROPOUT_CALL:
        return "drops values at random" if is_false("deterministic") and layer.rate > 0 else ""
    if is_false("use_running_average"):
        return "normalizes by the batch, so that a prediction depends on the other examples"
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
