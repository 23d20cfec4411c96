"""Where in `batch_stats` a layer keeps its mean and its variance, whatever they are called there."""

from collections.abc import Container, Iterable, Mapping
from typing import Any

from flaxbn.models.recognized import statistics_names

Path = tuple[str, ...]
"""The keys on the way to a layer in `batch_stats`; empty for a model that is a single layer."""
Pair = tuple[Path, Path]
"""The paths of two leaves, a mean and a variance."""


def named_pairs(shapes: Mapping[Path, tuple[int, ...]], names: Iterable[tuple[str, str]]) -> dict[Path, Pair]:
    """The leaves that are a mean and a variance by these names, of one shape, by the path of what holds them."""
    found: dict[Path, Pair] = {}
    for mean, var in names:
        for path, shape in shapes.items():
            other = (*path[:-1], var)
            if path[-1:] == (mean,) and shapes.get(other) == shape:
                found.setdefault(path[:-1], (path, other))
    return found


def path_of(pair: Pair) -> Path:
    """The path of a layer whose statistics have other names: that of what holds them, and both names.

    They stand in it, so that a tree of moments tells where it belongs: `("norm", "mu,sigma2")`.
    """
    mean, var = pair
    return (*mean[:-1], f"{mean[-1]},{var[-1]}")


def places_of(path: Path, leaves: Container[Path]) -> Pair | None:
    """The mean and the variance of the layer at `path` among these leaves; None where there is none."""
    for mean, var in statistics_names():
        if (*path, mean) in leaves and (*path, var) in leaves:
            return (*path, mean), (*path, var)
    *holder, names = path or ("",)
    mean, _, var = names.rpartition(",")
    pair = (*holder, mean), (*holder, var)
    return pair if all(place in leaves for place in pair) else None


def unnamed(shapes: Mapping[Path, tuple[int, ...]], pairs: Iterable[Pair]) -> list[Path]:
    """The leaves that a mean and a variance could be, under other names: those that lie beside one of their shape."""
    taken = {place for pair in pairs for place in pair}
    groups: dict[Any, list[Path]] = {}
    for path, shape in shapes.items():
        if path and path not in taken:
            groups.setdefault((path[:-1], shape), []).append(path)
    return [path for group in groups.values() if len(group) > 1 for path in group]
