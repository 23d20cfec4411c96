"""The leaves of a tree of variables by the keys of dictionaries on their paths."""

import functools
from typing import Any

import jax
import numpy as np

from flaxbn.models.places import Path

_STRUCTURES = 64  # of trees that were looked at last


def named_leaves(tree: Any) -> dict[Path, Any]:
    """The leaves of a tree by the dictionary keys on their path, in the order of the tree."""
    leaves, structure = jax.tree.flatten(tree)
    return dict(zip(leaf_names(tree, structure), leaves))


def leaf_names(tree: Any, structure: Any) -> tuple[Path, ...]:
    """The dictionary keys on the path of each leaf of a tree, whose structure is given."""
    try:
        return _names_of(structure)
    except Exception:  # a box that looks at what is put into it, or whose metadata have no hash
        return _names_in(tree)


@functools.lru_cache(maxsize=_STRUCTURES)
def _names_of(structure: Any) -> tuple[Path, ...]:
    return _names_in(jax.tree.unflatten(structure, range(structure.num_leaves)))


def _names_in(tree: Any) -> tuple[Path, ...]:
    return tuple(dict_names(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0])


def dict_names(path: Any) -> Path:
    """The dictionary keys of a tree path; a box around the leaf adds none."""
    return tuple(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))


def leaf_shapes(batch_stats: Any) -> dict[Path, tuple[int, ...]]:
    """The shape of each leaf, by the dictionary keys on its path."""
    return {names: np.shape(leaf) for names, leaf in named_leaves(batch_stats).items()}
