"""What data look like, for messages: keys, shapes and dtypes, as code that reaches them, and never what they hold."""

import json
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

_SHOWN = 5
"""So many parts of a batch are listed, so that a message stays on one screen."""


class Part(NamedTuple):
    """One part of a batch.

    Attributes:
        code: the expression that reaches it, `batch["image"]`.
        value: itself, an array traced or not, or anything else.
    """

    code: str
    value: Any


def parts_of(batch: Any, name: str = "batch") -> list[Part]:
    """The arrays of a batch, and what else it holds; a list of names or numbers is one part."""
    found = jax.tree_util.tree_flatten_with_path(batch, is_leaf=_is_list_of_values)[0]
    return [Part(name + "".join(map(_step, path)), value) for path, value in found]


def described(batch: Any, name: str = "batch") -> str:
    """The parts of a batch, one a line, as a message shows them.

    Examples:
        >>> import numpy as np
        >>> print(described({"image": np.zeros((2, 8, 8, 1), np.float32), "site": ["north", "south"]}))
          batch["image"]: float32 (2, 8, 8, 1)
          batch["site"]: list of 2 str

    Args:
        batch: the batch, a pytree of anything.
        name: what it is called.
    """
    parts = parts_of(batch, name)
    lines = [f"  {part.code}: {kind_of(part.value)}" for part in parts[:_SHOWN]] or [f"  {name}: nothing"]
    if len(parts) > _SHOWN:
        lines.append(f"  and {len(parts) - _SHOWN} more")
    return "\n".join(lines)


def kind_of(value: Any) -> str:
    """The dtype and shape of an array, or the type of anything else."""
    if _is_list_of_values(value):
        return f"{type(value).__name__} of {len(value)} {type(value[0]).__name__}"
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None:
        return type(value).__name__
    known = isinstance(value, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)
    return f"{'' if known else type(value).__name__ + ' '}{dtype} {_shape(shape)}"


def main_input(batch: Any, name: str = "batch", *, without: Collection[str] = ()) -> str | None:
    """The part that a model most likely takes: the array with the most axes, of floats rather than integers.

    Examples:
        >>> import numpy as np
        >>> main_input((np.zeros((2, 8, 8, 1), np.uint8), np.ones(2, np.float32)))
        'batch[0]'

    Args:
        batch: the batch, a pytree of anything.
        name: what it is called.
        without: code of parts that are taken for something else.

    Returns:
        The code that reaches it; None where there is no array.
    """

    def rank(part: Part) -> tuple[int, bool]:
        return len(part.value.shape), part.value.dtype.kind not in "iu"

    arrays = [part for part in parts_of(batch, name) if part.code not in without and _is_of_numbers(part.value)]
    return max(arrays, key=rank).code if arrays else None


def _is_of_numbers(value: Any) -> bool:
    """Whether this is an array that a model could take; bfloat16 and its like are of the kind V."""
    return hasattr(value, "shape") and getattr(getattr(value, "dtype", None), "kind", " ") in "fciuV"


def _is_list_of_values(node: Any) -> bool:
    """Whether a node is a list of what is no part by itself, names or numbers."""
    is_list = isinstance(node, list | tuple) and len(node) > 1 and not hasattr(node, "_fields")
    return is_list and all(isinstance(item, str | bytes | int | float) for item in node)


def _step(key: Any) -> str:
    """One step on the way to a part, as code."""
    if isinstance(key, jax.tree_util.GetAttrKey):
        return f".{key.name}"
    at = getattr(key, "idx", getattr(key, "key", None))
    return f"[{json.dumps(at, ensure_ascii=False) if isinstance(at, str) else repr(at)}]"


def _shape(shape: Sequence[Any]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
