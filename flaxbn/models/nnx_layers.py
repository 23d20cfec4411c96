"""What the layers of an nnx model do while it is traced, and what they are called.

`flax.nnx` is imported where such a layer runs: nobody who has none loads it.
"""

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from flaxbn.layers.names import layer_name
from flaxbn.models.recognized import Recognized, known_as
from flaxbn.models.recognized_calls import chosen, told_to_evaluate
from flaxbn.models.taps import chosen_statistics

_PLACE = "_flaxbn_place"
"""The attribute of a layer, in the copy of a model that is traced, which says where in the model it is."""


@dataclass(frozen=True)
class _Place:
    """Where a layer is; all are equal, so that models may stack their layers, which do not differ by their names."""

    path: tuple[str, ...] = field(compare=False)


def put_place(layer: Any, path: Sequence[Any]) -> None:
    """Tells a layer where it is in its model."""
    setattr(layer, _PLACE, _Place(tuple(map(str, path))))


def path_of(layer: Any) -> tuple[str, ...] | None:
    """Where a layer is in its model; None where nobody has told."""
    place = getattr(layer, _PLACE, None)
    return None if place is None else place.path


def nnx_label(layer: Any) -> str:
    """The class and path of an nnx module, for messages; the class where the path is not known."""
    path = path_of(layer)
    return type(layer).__name__ if path is None else f"{type(layer).__name__} '{layer_name(path)}'"


def is_dropout(cls: type) -> bool:
    """Whether a class whose calls are seen is that of dropout."""
    from flax import nnx

    return cls is nnx.Dropout


def evaluate_nnx_layer(
    dropout: Collection[str],
    cls: type,
    function: Callable[..., Any],
    layer: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """A call while a model is traced: dropout is off, batch normalization has the statistics that come out of its tap.

    Args:
        dropout: the collections of random keys whose dropout layers run as they are.
        cls: the class whose `__call__` runs; `layer` may be of a subclass.
        function: that `__call__`.
        layer: the layer.
        args: the arguments of the call.
        kwargs: its keywords.
    """
    from flax import nnx

    given = inspect.signature(function).bind(layer, *args, **kwargs).arguments
    if is_dropout(cls):
        return function(layer, *args, **kwargs) if layer.rng_collection in dropout else given["inputs"]
    said = known_as(type(layer), inspect.unwrap(function))
    if said is not None:
        return (
            function(layer, *args, **kwargs)
            if said[1] is None
            else _evaluate_known(said[1], function, layer, args, kwargs)
        )
    x = jnp.asarray(given["x"])
    options = {name: given.get(name) for name in ("mask", "domain")}
    mean, var = chosen_statistics(
        layer, nnx_label(layer), x, layer.mean[...], layer.var[...], **options, own_masks=cls is not nnx.BatchNorm
    )
    evaluated = _with_statistics(layer, mean=mean, var=var)
    options = {name: value for name, value in options.items() if value is not None}
    return function(evaluated, x, use_running_average=True, **options)


def _evaluate_known(known: Recognized, function: Callable[..., Any], layer: Any, args: Any, kwargs: Any) -> Any:
    """A call of a layer of a recognized class, in evaluation, with the statistics that come out of its tap."""
    label = nnx_label(layer)
    fields, given = told_to_evaluate(layer, label, partial(hasattr, layer), known, function, args, kwargs)
    mean, var = (getattr(layer, name)[...] for name in (known.mean, known.var))
    statistics = chosen(layer, label, known, given.args[1], mean, var, given.arguments.get("mask"))
    evaluated = _with_statistics(layer, **dict(zip((known.mean, known.var), statistics)))
    for name, value in fields.items():
        setattr(evaluated, name, value)
    return function(evaluated, *given.args[1:], **given.kwargs)


def _with_statistics(layer: Any, **statistics: Array) -> Any:
    """A copy of a layer with other statistics: the layer itself may be one whose change a transformation would see."""
    from flax import nnx

    graphdef, state = nnx.split(layer)
    own: Any = state
    for name, value in statistics.items():
        own[name] = own[name].replace(value)
    return nnx.merge(graphdef, own)
