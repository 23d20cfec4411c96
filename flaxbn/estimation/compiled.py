"""What a compiled pass over data depends on, and how long it is kept."""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.sharding import NamedSharding
from jaxtyping import Array

from flaxbn.models.batch_stats import Path
from flaxbn.models.linen import Call

_KEPT = 16


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


class Setting(NamedTuple):
    """What a compiled pass depends on, besides shapes."""

    key: Key
    call: Call | None
    sample_weight: Callable[[Any], Array] | None
    wanted: frozenset[Path]
    sharding: NamedSharding | None
    by_device: bool
    options: tuple[Any, ...]

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


_kept: OrderedDict[Any, Any] = OrderedDict()


class Compiled(dict[Hashable, Any]):
    """What `make(setting, shapes)` compiles for one estimate, by shapes.

    The last 16 of the process outlive it, if nothing in their settings can change.
    """

    def __init__(self, make: Callable[[Setting, Any], Any], setting: Setting) -> None:
        self._make = make
        self._setting = setting

    def __missing__(self, shapes: Hashable) -> Any:
        key = (self._make, self._setting, shapes)
        if self._setting.is_lasting and key in _kept:
            _kept.move_to_end(key)
            self[shapes] = _kept[key]
        else:
            self[shapes] = self._make(self._setting, shapes)
            if self._setting.is_lasting:
                _kept[key] = self[shapes]
                while len(_kept) > _KEPT:
                    _kept.popitem(last=False)
        return self[shapes]
