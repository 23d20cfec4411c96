"""Which stored entries each call of a layer reads."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxbn.models.arguments import Model, is_opened_nnx
from flaxbn.models.batch_stats import StoredLayers, stored_layers
from flaxbn.models.leaves import dict_names, leaf_names, leaf_shapes, named_leaves
from flaxbn.models.places import Pair, Path, named_pairs, unnamed
from flaxbn.models.recognized import statistics_names
from flaxbn.tracing.known import UNKNOWN, read_by_taps
from flaxbn.tracing.program import Program

MEAN, VAR = 1, 2  # of the operands of a tap
_STRUCTURES = 64  # of trees that were looked at last


class Reading(NamedTuple):
    """What a traced model reads.

    Attributes:
        layers: those that `batch_stats` holds, by their names or because the model reads them.
        entries: for each tap the numbers of the entries that it reads, stacked as the program's records are. None
            stands for a tap that does not read stored entries as they are: a layer of another model, or statistics
            that are computed on the way.
    """

    layers: StoredLayers
    entries: list[np.ndarray | None]


def check_own_layers(model: Model, program: Program, entries: Sequence[np.ndarray | None]) -> None:
    """For an nnx model, whose modules run by themselves, a `call` that runs another one from outside is an error.

    Raises:
        ValueError: if there are layers, and none of them reads stored entries.
    """
    if is_opened_nnx(model) and entries and all(read is None for read in entries):
        raise ValueError(
            f"`call` must use the model that it is given: {program.layer_names()[0]}, which it runs, is no layer of "
            "that. Its first argument is a copy of the model: `call=lambda m, b: m(b)`, and not a model from outside."
        )


def read_layers(program: Program, variables: Mapping[str, Any], other_leaves: int) -> Reading:
    """What the taps of a program read, whose arguments are the leaves of `variables`, then `other_leaves` more."""
    layers = stored_layers(variables.get("batch_stats", {}), pairs_read(program, variables, other_leaves))
    return Reading(layers, entries_read(program, variables, other_leaves, layers))


def entries_read(
    program: Program, variables: Mapping[str, Any], other_leaves: int, layers: StoredLayers
) -> list[np.ndarray | None]:
    """The entries of these layers that each tap of a program reads, as `Reading.entries`."""
    numbers = {layers.places[path][0]: entries for path, entries in layers.entries.items()}
    return _read(program, variables, other_leaves, numbers, MEAN)


def pairs_read(program: Program, variables: Mapping[str, Any], other_leaves: int) -> list[Pair]:
    """The leaves that taps read as mean and variance and that have other names than those, in their order."""
    batch_stats = variables.get("batch_stats", {})
    candidates = candidates_in(batch_stats)
    if not candidates or not program.tap_inputs():
        return []
    shapes, numbers, total = leaf_shapes(batch_stats), {}, 0
    for path in candidates:
        size = int(np.prod(shapes[path]))
        numbers[path] = np.arange(total + 1, total + 1 + size).reshape(shapes[path])
        total += size
    operands = (_read(program, variables, other_leaves, numbers, operand) for operand in (MEAN, VAR))
    found = [_pair(mean, var, numbers) for mean, var in zip(*operands)]
    return sorted({pair for pair in found if pair is not None}, key=lambda pair: candidates.index(pair[0]))


def candidates_in(batch_stats: Any) -> list[Path]:
    """The leaves that could be the statistics of a layer under other names."""
    leaves, structure = jax.tree.flatten(batch_stats)
    kinds = tuple([(np.shape(leaf), getattr(leaf, "dtype", None)) for leaf in leaves])
    return [*_candidates(leaf_names(batch_stats, structure), kinds, statistics_names())]


@functools.lru_cache(maxsize=_STRUCTURES)
def _candidates(names: tuple[Path, ...], kinds: tuple[Any, ...], known: Any) -> tuple[Path, ...]:
    """Those of leaves of these names, shapes and dtypes; every estimate asks, of hundreds of leaves."""
    shapes = {name: shape for name, (shape, _) in zip(names, kinds)}
    floats = {n: shape for n, (shape, dtype) in zip(names, kinds) if _is_inexact(dtype)}
    return tuple(unnamed(floats, named_pairs(shapes, known).values()))


def float_shapes(batch_stats: Any) -> dict[Path, tuple[int, ...]]:
    """The shapes of the leaves that statistics could be: counters, random keys and numbers of Python are none."""
    return {path: np.shape(leaf) for path, leaf in named_leaves(batch_stats).items() if _is_of(leaf, jnp.inexact)}


def _is_inexact(dtype: Any) -> bool:
    return dtype is not None and bool(jnp.issubdtype(dtype, jnp.inexact))


def _is_of(leaf: Any, kind: Any) -> bool:
    """Whether a leaf is an array of such numbers; those of Python, and random keys, are none."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, kind)


def _pair(mean: np.ndarray | None, var: np.ndarray | None, numbers: Mapping[Path, np.ndarray]) -> Pair | None:
    """The two leaves of which a tap reads the same entries, as mean and as variance, if one thing holds them."""
    if mean is None or var is None or not mean.size or mean.shape != var.shape:
        return None
    owners = [next((p for p, own in numbers.items() if np.isin(read, own).all()), None) for read in (mean, var)]
    first, second = owners
    if first is None or second is None or first == second or first[:-1] != second[:-1]:
        return None
    same = numbers[first].shape == numbers[second].shape
    return (first, second) if same and np.all(mean - numbers[first].min() == var - numbers[second].min()) else None


def _read(
    program: Program, variables: Mapping[str, Any], other_leaves: int, numbers: Mapping[Path, np.ndarray], operand: int
) -> list[np.ndarray | None]:
    """For each tap the numbers among these that one of its operands reads; two numberings tell them from constants."""
    total = sum(own.size for own in numbers.values())

    def seen(first: int) -> Sequence[Any]:
        with jax.ensure_compile_time_eval():
            return read_by_taps(program, known_leaves(variables, numbers, other_leaves, first), operand)[1]

    return [_entries(*pair, total) for pair in zip(seen(0), seen(total))]


def known_leaves(
    variables: Mapping[str, Any], numbers: Mapping[Path, np.ndarray], other_leaves: int, first: int = 0
) -> list[Any]:
    """The arguments of a traced model: numbers in the place of some leaves of `batch_stats`, and else nothing known."""

    def known(path: Any, leaf: Any) -> Any:
        names = dict_names(path)
        if names[:1] != ("batch_stats",) or names[1:] not in numbers or not _is_of(leaf, jnp.number):
            return UNKNOWN
        return np.asarray(numbers[names[1:]] + first, leaf.dtype)

    leaves = [known(path, leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]]
    return leaves + [UNKNOWN] * other_leaves


def _entries(read: Any, shifted: Any, total: int) -> np.ndarray | None:
    """The entries in what a tap reads, none where they are constants or rounded."""
    if read is UNKNOWN or shifted is UNKNOWN:
        return None
    entries, again = (np.real(np.asarray(a)) for a in (read, shifted))
    return entries.astype(np.int64) if np.all(again - total == entries) else None
