"""The `batch_stats` tree as numbered entries of named layers: which entry a call reads, and where its moments go.

A layer is whatever holds a mean and a variance of one shape, and each channel of each layer has a number of its own.
A call of a layer inside a scan, a vmap or a shared module reads some of these, in any order: run on the numbers in the
place of the means, a traced model tells which. Moments of calls then merge by number, and come back as a tree.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Array

from flaxbn.arithmetic.moments import Moments, is_moments, merge_numbered, widen
from flaxbn.data.placement import placed_as
from flaxbn.layers.names import layer_name, layer_path
from flaxbn.models.leaves import dict_names, leaf_names, named_leaves
from flaxbn.models.places import Pair, Path, named_pairs, path_of, places_of
from flaxbn.models.recognized import statistics_names

_STRUCTURES = 64  # of trees that were looked at last


class StoredLayers(NamedTuple):
    """The batch-norm layers of a `batch_stats` tree.

    Attributes:
        entries: for each layer the numbers of its channels, an int array of the shape of its mean. Numbers start at
            1 and are unique in the tree.
        total: how many numbers there are.
        places: for each layer the paths of its mean and its variance.
    """

    entries: dict[Path, np.ndarray]
    total: int
    places: dict[Path, Pair]

    def layer_of(self, numbers: np.ndarray) -> Path:
        """The layer that holds the least of these numbers."""
        least = numbers.min()
        return next(path for path, own in self.entries.items() if own.size and own.flat[0] <= least <= own.flat[-1])


def stored_layers(batch_stats: Any, read: Iterable[Pair] = ()) -> StoredLayers:
    """Numbers the channels of all layers, which hold a mean and a variance of one shape.

    Args:
        batch_stats: the tree.
        read: the leaves that layers read as mean and variance, and that nobody would know by their names.

    Raises:
        ValueError: if there are 2**23 channels or more. The numbers, and the numbers plus their total, go through
            float32 in the place of means, and float32 tells integers apart below 2**24.
    """
    leaves, structure = jax.tree.flatten(batch_stats)
    names = leaf_names(batch_stats, structure)
    return _numbered(names, tuple(map(np.shape, leaves)), tuple(read), statistics_names())


@functools.lru_cache(maxsize=_STRUCTURES)
def _numbered(paths: tuple[Path, ...], of_leaves: tuple[Any, ...], read: tuple[Pair, ...], names: Any) -> StoredLayers:
    """The layers of a tree of these leaves; every estimate asks for them a few times, of hundreds of leaves."""
    shapes = dict(zip(paths, of_leaves))
    places = named_pairs(shapes, names) | {path_of(pair): pair for pair in read}
    _check_distinct(paths, places)
    entries, total = {}, 0
    for path, (mean, _) in places.items():
        size = int(np.prod(shapes[mean]))
        entries[path] = np.arange(total + 1, total + 1 + size).reshape(shapes[mean])
        entries[path].flags.writeable = False
        total += size
    if total >= 2**23:
        raise ValueError(
            f"`batch_stats` must hold fewer than {2**23} channels, to number them in float32: got {total}."
        )
    return StoredLayers(entries, total, places)


def with_wide_statistics(variables: Mapping[str, Any]) -> Mapping[str, Any]:
    """`variables` with the statistics of all layers in float32 or wider, as the tracer computes with them."""
    if "batch_stats" not in variables:
        return variables
    leaves, structure = jax.tree.flatten(variables["batch_stats"])
    if all(getattr(leaf, "dtype", None) == np.float32 for leaf in leaves):
        return variables
    statistics = {place for pair in stored_layers(variables["batch_stats"]).places.values() for place in pair}
    names = leaf_names(variables["batch_stats"], structure)
    wide = [leaf.astype(widen(leaf.dtype)) if name in statistics else leaf for name, leaf in zip(names, leaves)]
    return {**variables, "batch_stats": jax.tree.unflatten(structure, wide)}


def all_entries(layers: StoredLayers) -> np.ndarray:
    """The numbers of all entries, which `flat_statistics` and `collect` use as places, less 1."""
    return np.arange(1, layers.total + 1)


def flat_statistics(batch_stats: Any, layers: StoredLayers) -> tuple[np.ndarray, np.ndarray]:
    """The stored means and variances of all entries: entry n at place n - 1, in host memory, by one transfer."""
    leaves = named_leaves(batch_stats)
    fields = [[leaves[pair[i]] for pair in layers.places.values()] for i in range(2)]
    return jax.device_get(_end_to_end(fields))


@jax.jit
def _end_to_end(fields: Sequence[Sequence[Array]]) -> tuple[Array, ...]:
    return tuple(jnp.concatenate([jnp.ravel(a) for a in field]) for field in fields)


def collect(contributions: Iterable[tuple[np.ndarray, Moments]], layers: StoredLayers) -> dict[Path, Moments]:
    """Merges moments of calls into those of the entries that the calls read.

    Args:
        contributions: for each call the numbers that it reads, and moments of the same shape.
        layers: where the numbers belong.

    Returns:
        For each layer the moments of its channels, in float64; of count 0 where no call read them.
    """
    parts = list(contributions)
    entries = np.concatenate([np.zeros(0, np.int64), *(np.ravel(e) for e, _ in parts)]) - 1
    fields = (np.concatenate([np.zeros(0), *(np.ravel(m[i]) for _, m in parts)]) for i in range(3))
    merged = merge_numbered(Moments(*fields), entries, layers.total)  # type: ignore[arg-type]
    by_layer, end = {}, 0
    for path, e in layers.entries.items():  # whose numbers go on from one layer to the next, but for those left out
        begin = int(e.flat[0]) - 1 if e.size else end
        end = begin + e.size
        by_layer[path] = Moments(*(field[begin:end].reshape(e.shape) for field in merged))
    complex_entries = [np.ravel(e) for e, m in parts if np.iscomplexobj(m.mean)]
    if complex_entries:  # in one array with those, the means of real layers became complex, too
        is_complex = {path: np.isin(e, np.concatenate(complex_entries)).any() for path, e in layers.entries.items()}
        by_layer = {p: m if is_complex[p] else m._replace(mean=m.mean.real) for p, m in by_layer.items()}
    return by_layer


def as_tree(moments: Mapping[Path, Moments]) -> Any:
    """The nested form of moments by path: a Moments in the place of each layer's variables."""
    return moments[()] if () in moments else unflatten_dict(dict(moments))


def by_path(moments: Any) -> dict[Path, Any]:
    """The leaves of a tree of Moments, which those are, by the dictionary keys on their path."""
    found = jax.tree_util.tree_flatten_with_path(moments, is_leaf=is_moments)[0]
    return {dict_names(path): value for path, value in found}


def moments_by_path(moments: Any, layers: StoredLayers) -> dict[Path, Moments]:
    """A tree of earlier moments by path.

    Raises:
        ValueError: if they are not of exactly these layers, in their shapes.
    """
    found = by_path(moments)
    shapes = {path: np.shape(value.mean) if is_moments(value) else None for path, value in found.items()}
    wanted = {path: entries.shape for path, entries in layers.entries.items()}
    if shapes != wanted:
        raise ValueError(
            "`earlier` must be a tree of Moments of the same layers and shapes: got "
            f"{ {layer_name(path): shape for path, shape in shapes.items()} } where "
            f"{ {layer_name(path): shape for path, shape in wanted.items()} } are estimated."
        )
    return found


def replace_statistics(batch_stats: Any, moments: Any, *, keep_unseen: bool) -> Any:
    """`batch_stats` with `mean` and `var` of the layers in the tree `moments` replaced, and all else as it was.

    Each leaf keeps its dtype, and where it was put on particular devices, its place.

    Args:
        batch_stats: the old tree.
        moments: a tree as `population_moments` returns.
        keep_unseen: whether channels without data keep what they have, where it is an error otherwise.

    Raises:
        ValueError: if `moments` do not fit, a channel saw no data, or a value overflows the dtype that it is stored in.
        TypeError: if a mean is complex and the stored one is not.
    """
    return replace_layers(batch_stats, by_path(moments), keep_unseen=keep_unseen)


def replace_layers(batch_stats: Any, found: Mapping[Path, Any], *, keep_unseen: bool) -> Any:
    """`replace_statistics` by moments of layers by path."""
    leaves, structure = jax.tree.flatten(batch_stats)
    names = leaf_names(batch_stats, structure)
    stored = dict(zip(names, leaves))
    pairs = {path: places_of(path, stored) for path in found}
    _check_places(found, stored, pairs)
    seen = all_seen(found.values())
    if not seen and not keep_unseen:
        _raise_unseen(found)
    fields = {
        name: (field, value.count)
        for path, value in found.items()
        for name, field in zip(pairs[path] or (), (value.mean, value.var))
    }
    places = [i for i, name in enumerate(names) if name in fields]
    old, own = [leaves[i] for i in places], [names[i] for i in places]
    with np.errstate(over="ignore"):  # `_check_finite` looks at it
        new = [_replaced(leaf, *fields[name], seen=seen) for name, leaf in zip(own, old)]
    _check_finite(own, new)
    for i, leaf in zip(places, placed_as(new, old)):
        leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves)


def all_seen(moments: Iterable[Moments]) -> bool:
    """Whether every channel of all layers saw data; looked at end to end, since there are hundreds of layers."""
    counts = [np.ravel(one.count) for one in moments]
    return not counts or bool((np.concatenate(counts) > 0).all())


def _replaced(old: Any, new: Any, count: Any, *, seen: bool) -> np.ndarray:
    """One leaf: the new mean or variance where there is data, what is stored elsewhere."""
    value = np.asarray(new).astype(old.dtype)
    return value if seen else np.where(np.asarray(count) > 0, value, old)


def _check_finite(names: Sequence[Path], values: Sequence[np.ndarray]) -> None:
    """What is finite in float64 may not be in the dtype that it is stored in: an error that names the layer."""
    kinds = {value.dtype for value in values}
    if all(np.isfinite(np.concatenate([v.ravel() for v in values if v.dtype == kind])).all() for kind in kinds):
        return
    for name, value in zip(names, values):
        if not np.isfinite(value).all():
            raise ValueError(
                f"The population statistics of '{layer_name(name[:-1])}' must be finite in the dtype in which "
                f"`batch_stats` stores them: its {name[-1]} overflows {value.dtype}. Store it in float32."
            )


def _check_places(moments: Mapping[Path, Any], stored: Mapping[Path, Any], pairs: Mapping[Path, Pair | None]) -> None:
    """Each place must be a layer of what is stored, in its shape and of its kind of numbers."""
    for path, value in moments.items():
        pair = pairs[path]
        old = None if pair is None else stored[pair[0]]
        if not is_moments(value) or old is None or np.shape(old) != np.shape(value.mean):
            received = f"moments of shape {np.shape(value.mean)}" if is_moments(value) else type(value).__name__
            place = "nothing" if old is None else f"a mean of shape {np.shape(old)}"
            raise ValueError(
                f"`moments` must be a tree of Moments with the layers and shapes of `batch_stats`: got {received} at "
                f"'{layer_name(path)}', where `batch_stats` holds {place}."
                + ("" if is_moments(value) else " The moments come first: `to_batch_stats(moments, batch_stats)`.")
            )
        if np.iscomplexobj(value.mean) and not np.iscomplexobj(old):
            raise TypeError(
                f"The stored mean of '{layer_name(path)}' must be complex, as its population mean is: it is "
                f"{old.dtype}. Convert that leaf of `batch_stats` to complex64 first."
            )


def _raise_unseen(moments: Mapping[Path, Moments]) -> None:
    """A layer that has not seen data in every channel is an error."""
    for path, value in moments.items():
        if not np.all(np.asarray(value.count) > 0):
            raise ValueError(
                f"`moments` must have seen data in every channel: {name_unseen(path, value)} saw none. To keep what is "
                "stored there, pass `keep_unseen=True`."
            )


def name_unseen(path: Path, moments: Moments) -> str:
    """Names a layer that saw no data, and the rows of its leading axis (of domains, or of a scan) if some did."""
    missing = ~(np.asarray(moments.count) > 0)
    rows = missing.reshape(len(missing), -1).any(1)
    place = f"'{layer_name(path)}'"
    return f"{place} (at {np.flatnonzero(rows).tolist()})" if missing.ndim > 1 and not missing.all() else place


def select(layers: StoredLayers, only: Callable[[str], bool] | None) -> StoredLayers:
    """The layers that `only` accepts, by their path joined by "/"; all where it is None. Numbers stay as they are.

    Raises:
        ValueError: if there are layers, and it accepts none.
    """
    wanted = {path: entries for path, entries in layers.entries.items() if only is None or only(layer_path(path))}
    if layers.entries and not wanted:
        known = ", ".join(f"'{layer_name(path)}'" for path in layers.entries)
        raise ValueError(f"`only` must accept at least one batch-norm layer: it accepts none of {known}.")
    return layers._replace(entries=wanted)


def _check_distinct(paths: Sequence[Path], places: Mapping[Path, Pair]) -> None:
    """Layers are known by the keys of dictionaries: what lies in lists would count as one layer."""
    count = Counter(paths)
    same = [path for path, pair in places.items() if any(count[place] > 1 for place in pair)]
    if same:
        raise ValueError(
            f"Each layer in `batch_stats` must have a name of its own: {', '.join(map(repr, map(layer_name, same)))} "
            "names several, in a list or tuple. Put them into a dictionary."
        )
