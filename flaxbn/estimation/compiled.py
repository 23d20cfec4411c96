"""What a compiled pass over data depends on, and how long it is kept."""

import inspect
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.sharding import NamedSharding
from jaxtyping import Array

from flaxbn.models.batch_stats import Path
from flaxbn.models.linen import Call


class Key:
    """A model as a key of compiled passes: by value where it can be hashed, by identity where it cannot."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        try:
            self._hash = hash(model)
            self.by_value = True
        except TypeError:
            self._hash = id(model)
            self.by_value = False

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Key):
            return NotImplemented
        if self.model is other.model:
            return True
        return self.by_value and other.by_value and type(self.model) is type(other.model) and self.model == other.model


class PassOptions(NamedTuple):
    """What a compiled pass depends on, besides shapes."""

    key: Key
    call: Call | None
    sample_weight: Callable[[Any], Array] | None
    wanted: frozenset[Path]
    sharding: NamedSharding | None
    by_device: bool
    tracing: tuple[Any, ...]

    @property
    def is_lasting(self) -> bool:
        """Whether nothing in it can change behind the back of equal ones."""
        return self.key.by_value and not any(inspect.ismethod(f) for f in (self.call, self.sample_weight))


class Shapes(NamedTuple):
    """The structure and the leaves' shapes of (variables, batch, rngs), as a key.

    `present` is the number of samples that are no padding, where there is padding.
    """

    structure: Any
    leaves: tuple[tuple[tuple[int, ...], Any], ...]
    present: int | None

    def abstract(self, *, grow: int = 0) -> Any:
        """The arguments as abstract arrays, the batch longer by `grow` samples."""
        leaves = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in self.leaves]
        variables, batch, rngs = jax.tree.unflatten(self.structure, leaves)
        batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct((a.shape[0] + grow, *a.shape[1:]), a.dtype), batch)
        return variables, batch, rngs


def shapes_of(variables: Any, batch: Any, rngs: Any, *, present: int | None) -> Shapes:
    """The key of these arguments, which may be abstract."""
    leaves, structure = jax.tree.flatten((variables, batch, rngs))
    return Shapes(structure, tuple((a.shape, a.dtype) for a in leaves), present)


class Compiled(dict[Hashable, Any]):
    """What `make(options, shapes)` compiles for one estimate, by shapes; some of it outlives the estimate.

    What is compiled for a model that can change behind the back of an equal one is not kept.
    """

    def __init__(self, make: Callable[[PassOptions, Any], Any], options: PassOptions) -> None:
        self._make = _make_lasting if options.is_lasting else _make_once
        self._arguments = make, options

    def __missing__(self, shapes: Hashable) -> Any:
        self[shapes] = self._make(*self._arguments, shapes)
        return self[shapes]


def _make_once(make: Callable[[PassOptions, Any], Any], options: PassOptions, shapes: Hashable) -> Any:
    return make(options, shapes)


_make_lasting = lru_cache(maxsize=16)(_make_once)  # each holds its compiled program, tens of MB for a deep model
