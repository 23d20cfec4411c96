"""A layer of a recognized class, evaluated by its own code with the statistics that come out of a tap."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import DenyList
from flax.errors import ModifyScopeVariableError
from jaxtyping import Array

from flaxbn.layers.arguments import feature_axes
from flaxbn.layers.names import layer_label
from flaxbn.models.mark import check_statistics, through_tap
from flaxbn.models.recognized import Recognized
from flaxbn.tracing.primitive import owned_p


def evaluate_recognized(layer: nn.Module, known: Recognized, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What the call of a layer returns in evaluation.

    All of its collections are handed over, the statistics in the shape in which they are stored.

    Args:
        layer: the layer.
        known: what is known of its class.
        method: its call.
        args: what it is called with.
        kwargs: the same, by name.

    Raises:
        ValueError: if the layer has no statistics, or those of another shape; or if it is not told to evaluate.
    """
    is_field = getattr(layer, "__dataclass_fields__", {}).__contains__
    fields, given = told_to_evaluate(layer, layer_label(layer), is_field, known, method, args, kwargs)
    check_stored(layer, known.mean, known.var)
    own_all(layer, (known.mean, known.var))
    mean, var = _chosen(layer, known, given.args[1], given.arguments.get("mask"))
    variables = {collection: dict(held) for collection, held in layer.variables.items()}
    variables["batch_stats"] |= {known.mean: mean, known.var: var}

    def call(module: Any) -> Any:
        return method(module, *given.args[1:], **given.kwargs)

    evaluated = layer.clone(parent=None, name=None, **fields)
    try:
        return evaluated.apply(variables, method=call, mutable=DenyList(["params", "batch_stats"]))[0]
    except ModifyScopeVariableError as error:
        raise ValueError(
            f"{layer_label(layer)} must not update its statistics in evaluation, as it does with "
            f"{dict(known.evaluation)}. Say by `evaluation` in `flaxbn.recognize` how the class is told to evaluate."
        ) from error


def own_all(layer: nn.Module, statistics: Sequence[str] = (), *, below: bool = True) -> None:
    """Says of what a layer holds in `batch_stats` that its use is known, but for its statistics; `below` it, too."""
    held = {name: value for name, value in layer.variables.get("batch_stats", {}).items() if name not in statistics}
    for leaf in jax.tree.leaves(held if below else [value for value in held.values() if hasattr(value, "shape")]):
        owned_p.bind(jnp.asarray(leaf))


def told_to_evaluate(
    layer: Any,
    label: str,
    is_field: Callable[[str], bool],
    known: Recognized,
    method: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> tuple[dict[str, Any], inspect.BoundArguments]:
    """The fields of a layer that are to be set so that it evaluates, and the arguments of the call."""
    signature = inspect.signature(inspect.unwrap(method))
    given, required = signature.bind_partial(layer, *args, **kwargs), inspect.Parameter.empty
    fields = {}
    for name, value in known.evaluation.items():
        parameter = signature.parameters.get(name)
        if is_field(name):
            fields[name] = value
            given.arguments.pop(name, None)
            if parameter is not None and parameter.default is required:
                given.arguments[name] = value
        elif parameter is not None:
            given.arguments[name] = value
        else:
            raise ValueError(
                f"{label} must have a field or an argument {name!r}, by which `flaxbn.recognize` says "
                f"that it is told to evaluate: its call has the arguments {list(signature.parameters)[1:]}. Say by "
                "`evaluation` how the class is told."
            )
    return fields, given


def check_stored(layer: nn.Module, *names: str) -> None:
    """A layer without stored statistics is an error."""
    if not all(layer.has_variable("batch_stats", name) for name in names):
        raise ValueError(
            f"{layer_label(layer)} has no stored statistics: `variables` must hold its "
            f"{' and '.join(map(repr, names))} in 'batch_stats'. Inside a lifted transformation, list 'batch_stats' in "
            "its `variable_axes`, `variable_broadcast` or `variable_carry`."
        )


def _chosen(layer: nn.Module, known: Recognized, x: Any, mask: Any) -> tuple[Array, Array]:
    mean, var = (nn.meta.unbox(layer.get_variable("batch_stats", name)) for name in (known.mean, known.var))
    return chosen(layer, layer_label(layer), known, x, mean, var, mask)


def chosen(
    layer: Any, label: str, known: Recognized, x: Any, mean: Array, var: Array, mask: Any
) -> tuple[Array, Array]:
    """The statistics that come out of the tap of a layer, of Linen or nnx, in the shape of the stored ones."""
    features = feature_axes(jnp.ndim(x), known.feature_axis(layer))
    check_statistics(f"The statistics of {label}", mean, var, jnp.shape(x), features)
    return through_tap(
        x,
        mean,
        var,
        features,
        layer=label,
        weights=None if mask is None else flax_mask(mask, jnp.ndim(x)),
        axis_name=getattr(layer, "axis_name", None),
        axis_index_groups=getattr(layer, "axis_index_groups", None),
    )


def flax_mask(mask: Any, ndim: int) -> Array:
    """A mask of Flax's layer, whose values are true or false, as weights of the rank of the input."""
    mask = jnp.asarray(mask, bool)
    return mask.reshape((1,) * (ndim - mask.ndim) + mask.shape).astype(jnp.float32)
