"""What layers are called."""

from collections.abc import Sequence
from typing import Any


def layer_path(path: Sequence[str]) -> str:
    """The path of a layer in `batch_stats` as one string, for `only` and for files."""
    return "/".join(path)


def layer_name(path: Sequence[str]) -> str:
    """The same for people, to whom the empty path of a model that is a single layer would say nothing."""
    return layer_path(path) or "(the model itself)"


def layer_label(layer: Any) -> str:
    """The class and path of a Linen module, for messages."""
    return f"{type(layer).__name__} '{layer_name(layer.path)}'"
