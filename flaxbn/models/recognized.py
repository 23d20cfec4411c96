"""Classes that others wrote: where they keep their statistics, and how they are told to evaluate."""

import inspect
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from flaxbn.tracing.jaxpr import Same, as_key


class Recognized(NamedTuple):
    """A class of batch-norm layers.

    Attributes:
        mean, var: the names of its statistics, as variables of `batch_stats` or as attributes.
        evaluation: fields or arguments of its call, and their values in evaluation.
        axis: its feature axis or axes, or the name of the field that holds them.
    """

    mean: str
    var: str
    evaluation: Mapping[str, Any]
    axis: str | int | tuple[int, ...]

    def feature_axis(self, layer: Any) -> int | Sequence[int]:
        """The feature axis, or axes, of a layer: the last one, where it has no such field."""
        return getattr(layer, self.axis, -1) if isinstance(self.axis, str) else self.axis


_lock = threading.Lock()
_table: Mapping[type, Recognized | None] = MappingProxyType({})


def recognize(
    cls: type,
    kind: Literal["batch norm"] | None = "batch norm",
    *,
    mean: str = "mean",
    var: str = "var",
    evaluation: Mapping[str, Any] = MappingProxyType({"use_running_average": True}),
    axis: str | int | Sequence[int] = "axis",
) -> None:
    """Makes a class of layers known that somebody else wrote, so that it is treated as `flax.linen.BatchNorm` is.

    Layers of this class are found wherever models run them, and evaluated by their own code, with statistics that
    flaxbn chooses. It holds for the process, from then on; a class that is recognized again is known by the last word.

    What the class does with its statistics stays its own matter: what `flaxbn.estimate_population_stats` puts into
    `var` is the biased variance, which a class that keeps a deviation there, or 1 / sqrt(var), would misread. Masks are
    seen where the argument is called `mask` and is what `flax.linen.BatchNorm` takes; a class that is told by its own
    means which positions are padding has statistics of the padding, too. For a class that you can edit there is
    `flaxbn.mark`.

    Examples:
        >>> import flax.linen as nn, flaxbn, jax, jax.numpy as jnp, numpy as np
        >>> class Norm(nn.Module):  # somebody else's
        ...     @nn.compact
        ...     def __call__(self, x, training):
        ...         mean = self.variable("batch_stats", "moving_mean", jnp.zeros, x[:1].shape)
        ...         var = self.variable("batch_stats", "moving_var", jnp.ones, x[:1].shape)
        ...         if training:
        ...             mean.value, var.value = x.mean(0, keepdims=True), x.var(0, keepdims=True)
        ...         return (x - mean.value) / jnp.sqrt(var.value + 1e-5)
        >>> flaxbn.recognize(Norm, mean="moving_mean", var="moving_var", evaluation={"training": False})
        >>> model, x = Norm(), np.float32([[1.0], [3.0]])
        >>> variables = model.init(jax.random.key(0), x, training=False)
        >>> stats = flaxbn.estimate_population_stats(
        ...     model, variables, x, batch_size=2, call=lambda m, b: m(b, training=False)
        ... )
        >>> stats["moving_mean"].tolist(), stats["moving_var"].tolist()
        ([[2.0]], [[1.0]])

    Args:
        cls: a class of `flax.linen` or `flax.nnx` modules with a `__call__`, whose first argument is the input.
            Subclasses are known with it, unless they have a `__call__` of their own that does not call this one.
        kind: "batch norm"; or None for a class that keeps something else in `batch_stats`, of which no tool warns.
        mean: the name under which it stores the mean: in the collection `batch_stats`, or as an attribute.
        var: that of the variance. Both have the shape of the feature axes, but for axes of length 1.
        evaluation: how a layer is told to evaluate: the names of fields, or of arguments of its call, and their values.
            What is a field is set there, and an argument of the same name dropped.
        axis: the feature axis, or axes; or the name of the field that holds them. Where there is no such field, it is
            the last axis.

    Raises:
        TypeError: if `cls` is no class with a `__call__`, or another argument is of another type.
        ValueError: if `kind` is another one, or mean and variance have the same name.
    """
    global _table
    if not isinstance(cls, type) or not any("__call__" in vars(one) for one in cls.__mro__):
        raise TypeError(
            f"`cls` must be a class of modules with a `__call__` of its own: got {cls!r}. Pass the class itself, not a "
            "layer of it."
        )
    if kind not in ("batch norm", None):
        raise ValueError(f'`kind` must be "batch norm", or None for what is none: got {kind!r}.')
    entry = None if kind is None else _checked(mean, var, evaluation, axis)
    with _lock:
        _table = MappingProxyType({**_table, cls: entry})


def _checked(mean: Any, var: Any, evaluation: Any, axis: Any) -> Recognized:
    names = {"mean": mean, "var": var}
    wrong = [name for name, value in names.items() if not isinstance(value, str)]
    if wrong:
        raise TypeError(f"`{wrong[0]}` must be the name of a variable: got {type(names[wrong[0]]).__name__}.")
    if mean == var:
        raise ValueError(f"The mean and the variance must be two variables: got {mean!r} for both.")
    if not isinstance(evaluation, Mapping) or not all(isinstance(name, str) for name in evaluation):
        raise TypeError(
            "`evaluation` must map names of fields, or of arguments of the call, to their values in evaluation, as in "
            f"{{'train': False}}: got {type(evaluation).__name__}."
        )
    if not isinstance(axis, str | int):
        axis = tuple(axis)
    return Recognized(mean, var, MappingProxyType(dict(evaluation)), axis)


def known_as(layer: type, function: Callable[..., Any]) -> tuple[Callable[..., Any], Recognized | None] | None:
    """What somebody said of a class of layers whose call runs this function.

    Returns:
        The call, as the class has it, and what is known: None for a class that is no batch norm. None where nobody said
        anything.
    """
    for cls in layer.__mro__:
        if cls in _table and inspect.unwrap(cls.__call__) is function:
            return cls.__call__, _table[cls]
    return None


def recognized_classes() -> tuple[type, ...]:
    """All classes of which somebody said something."""
    return tuple(_table)


def statistics_names() -> tuple[tuple[str, str], ...]:
    """The names of mean and variance that layers may have: those of Flax, and of the classes that are recognized."""
    pairs = (("mean", "var"), *((known.mean, known.var) for known in _table.values() if known is not None))
    return tuple(dict.fromkeys(pairs))


def recognized_key() -> Hashable:
    """All that is recognized, as a key: what was traced under one table does not serve another."""
    return tuple(
        (Same(cls), known and (known.mean, known.var, as_key(dict(known.evaluation)), known.axis))
        for cls, known in _table.items()
    )
