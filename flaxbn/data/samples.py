"""What a batch holds: arrays, which mostly share an axis of samples, and what is no array, a name say.

What is no array is no argument of a compiled program: it is part of the structure of a batch, by value.
"""

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_static
class Static:
    """A leaf that is no array, as a node without leaves; equal to one that holds the same, if that can be told."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self._key = _key(value)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Static) and self._key is not None and self._key == other._key)

    def __hash__(self) -> int:
        return id(self) if self._key is None else hash(self._key)


def _key(value: Any) -> Hashable | None:
    """What tells a value from others, or None where it could change or hold anything."""
    if isinstance(value, np.ndarray):
        parts = [_key(item) for item in value.ravel().tolist()]
        return None if None in parts else (value.shape, value.dtype.str, tuple(parts))
    return (type(value), value) if isinstance(value, str | bytes | bool | np.generic) else None


def hide(batch: Any, *, numbers: bool = False) -> Any:
    """A batch whose leaves are arrays and numbers; others, Python's bools among them, are part of its structure.

    So are all of Python's `numbers` where that is asked for.
    """

    def hidden(leaf: Any) -> Any:
        is_number = isinstance(leaf, int | float | complex) and not isinstance(leaf, bool) and not numbers
        return leaf if is_number or isinstance(leaf, jax.ShapeDtypeStruct) or is_array(leaf) else Static(leaf)

    return jax.tree.map(hidden, batch)


def gather_names(batch: Any) -> Any:
    """A batch whose lists of names are arrays of names, which have an axis of samples like all others.

    Examples:
        >>> gather_names({"site": ["north", "south"]})["site"].shape
        (2,)
    """

    def is_list_of_names(node: Any) -> bool:
        return isinstance(node, list | tuple) and bool(node) and all(isinstance(item, str | bytes) for item in node)

    def gathered(node: Any) -> Any:
        return np.asarray(node) if is_list_of_names(node) else node

    return jax.tree.map(gathered, batch, is_leaf=is_list_of_names)


def show(batch: Any) -> Any:
    """The inverse of `hide`: a batch as users give it."""

    def is_static(node: Any) -> bool:
        return isinstance(node, Static)

    return jax.tree.map(lambda node: node.value if is_static(node) else node, batch, is_leaf=is_static)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array that jax can hold, traced or not: of numpy, it may be one of names."""
    if not isinstance(leaf, np.ndarray | np.generic):
        return isinstance(leaf, jax.Array)
    return leaf.dtype == bool or jnp.issubdtype(leaf.dtype, np.number)


def is_names(leaf: Any) -> bool:
    """Whether a leaf is an array of numpy that jax cannot hold."""
    return isinstance(leaf, np.ndarray) and not is_array(leaf)


def check_numbers(name: str, arrays: Any, cure: str, where: str = "") -> None:
    """Arrays of names or objects cannot be cut or kept on a device: an error that names the first.

    Args:
        name: what the user calls the argument.
        arrays: the argument.
        cure: what to do about it.
        where: under which condition they must be numbers.

    Raises:
        TypeError: if there is one.
    """
    for path, leaf in jax.tree_util.tree_flatten_with_path(arrays)[0]:
        dtype = np.asarray(leaf).dtype if isinstance(leaf, str | bytes) else getattr(leaf, "dtype", None)
        if isinstance(dtype, np.dtype) and dtype.kind in "OSU":
            raise TypeError(
                f"`{name}` must hold arrays of numbers{where}: got {dtype} at "
                f"{name}{jax.tree_util.keystr(path)}. {cure}"
            )


def common_length(arrays: Any) -> int | None:
    """The length of the leading axis that all leaves of `arrays` share; None where there is none."""
    lengths = {shape[0] if (shape := np.shape(leaf)) else None for leaf in jax.tree.leaves(arrays)}
    return lengths.pop() if len(lengths) == 1 else None


def count_samples(arrays: Any) -> int:
    """The length of the leading axis that all leaves of `arrays` share.

    Raises:
        ValueError: if there is none.
    """
    found = common_length(arrays)
    if found is None:
        received = ", ".join(str(np.shape(leaf)) for leaf in jax.tree.leaves(arrays)) or "no arrays"
        of_all = any(not np.shape(leaf) for leaf in jax.tree.leaves(arrays))
        repeat = " What is said once of a whole batch, a name say, repeat for each sample: `numpy.full(n, name)`."
        raise ValueError(
            f"A batch must be a pytree of arrays with a common leading sample axis: got {received}. Samples are "
            "counted, cut, weighted and split over devices along it; an iterable of batches that needs none of that "
            f"(`num_samples`, `sample_weight`, `sharding`) may hold anything.{repeat if of_all else ''}"
        )
    return found
