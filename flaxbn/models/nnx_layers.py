"""What the layers of an nnx model do while it is traced, and what they are called.

`flax.nnx` is imported where such a layer runs: nobody who has none loads it.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from flaxbn.layers.names import layer_name
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
    cls: type, function: Callable[..., Any], layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A call while a model is traced: dropout is off, batch normalization has the statistics that come out of its tap.

    Args:
        cls: the class whose `__call__` runs; `layer` may be of a subclass.
        function: that `__call__`.
        layer: the layer.
        args: the arguments of the call.
        kwargs: its keywords.
    """
    from flax import nnx

    given = inspect.signature(function).bind(layer, *args, **kwargs).arguments
    if is_dropout(cls):
        return given["inputs"]
    x = jnp.asarray(given["x"])
    options = {name: given.get(name) for name in ("mask", "domain")}
    mean, var = chosen_statistics(
        layer, nnx_label(layer), x, layer.mean[...], layer.var[...], **options, own_masks=cls is not nnx.BatchNorm
    )
    evaluated = _with_statistics(layer, mean, var)
    options = {name: value for name, value in options.items() if value is not None}
    return function(evaluated, x, use_running_average=True, **options)


def _with_statistics(layer: Any, mean: Array, var: Array) -> Any:
    """A copy of a layer with other statistics: the layer itself may be one whose change a transformation would see."""
    from flax import nnx

    graphdef, state = nnx.split(layer)
    own: Any = state
    own["mean"], own["var"] = own["mean"].replace(mean), own["var"].replace(var)
    return nnx.merge(graphdef, own)
