"""What a pass over data ends with: merged moments, and where they are not finite."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flaxbn.arithmetic.moments import Moments
from flaxbn.layers.names import layer_name
from flaxbn.models.batch_stats import StoredLayers, as_tree, collect, name_unseen
from flaxbn.models.places import Path


class Result(NamedTuple):
    """The merged moments of a chunk of batches, in host memory.

    Attributes:
        entries: for each call the numbers of the stored entries that it reads; the same list in results of one program.
        steps: the numbers of the batches.
        moments: for each call those of all these batches.
        first_bad: for each call the first place in `steps` whose moments are not finite, or -1.
        first_single: likewise the first place where a channel has a single value; empty where that is looked at by
            nobody.
    """

    entries: list[np.ndarray]
    steps: Sequence[int]
    moments: list[Moments]
    first_bad: Sequence[int]
    first_single: Sequence[int] = ()


class NotFiniteError(ValueError):
    """Moments of a layer that hold NaN or infinities."""

    def __init__(self, layer: str, step: int) -> None:
        self.layer, self._step = layer, step
        super().__init__(
            f"Batch statistics must be finite: those of '{layer}' are not in batch {step} (counted from 0), so its "
            "input holds NaN or infinite values, or overflows."
        )

    def __reduce__(self) -> Any:
        """Pickled as it is made, for other processes."""
        return type(self), (self.layer, self._step)


def merged_by_layer(results: Sequence[Result], layers: StoredLayers) -> dict[Path, Moments]:
    """The moments of all layers, those of several calls merged; what is not finite is an error."""
    check_finite(results, layers)
    return collect([c for r in results for c in zip(r.entries, r.moments)], layers)


def checked_tree(moments: Mapping[Path, Moments], wanted: StoredLayers, *, keep_unseen: bool) -> Any:
    """The tree of the wanted layers' moments; what saw no data is an error."""
    unseen = [name_unseen(path, moments[path]) for path in wanted.entries if not np.all(moments[path].count > 0)]
    if unseen and not keep_unseen:
        raise ValueError(
            f"Every batch-norm layer in `batch_stats` must see data: {', '.join(unseen)} saw none. Run it in `call`, "
            "as part of the module that `call` is given, give data of each domain, leave it out by `only`, or keep its "
            "stored statistics by `keep_unseen=True`. (A layer whose statistics are computed from what is stored, not "
            "read, counts as not seen. So does one of a class that flaxbn does not know: `flaxbn.recognize`, or "
            "`flaxbn.mark` in its code, makes it known.)"
        )
    return as_tree({path: moments[path] for path in wanted.entries})


def check_finite(results: Sequence[Result], layers: StoredLayers) -> None:
    """Moments that are not finite are an error, which names layer and batch."""
    for result in results:
        for entries, bad in zip(result.entries, result.first_bad):
            if bad >= 0:
                raise NotFiniteError(layer_name(layers.layer_of(entries)), result.steps[bad])


def check_several(results: Sequence[Result], layers: StoredLayers) -> None:
    """A batch in which a layer sees a single value is an error: its own variance is 0, and its output constant."""
    for result in results:
        for entries, single in zip(result.entries, result.first_single):
            if single >= 0:
                raise ValueError(
                    f"Each layer normalizes by the batch, which needs more than one value per channel: a mask, domains "
                    f"or weights leave one to '{layer_name(layers.layer_of(entries))}' in batch {result.steps[single]} "
                    "(counted from 0), so its output would be constant. Use larger batches, or leave out such a one; "
                    'or `method="exact"`, which normalizes by all batches.'
                )


def check_population(result: Result, layers: StoredLayers) -> None:
    """A population of a single value, of a domain say, is an error: its variance is 0."""
    for entries, moments in zip(result.entries, result.moments):
        if np.any((moments.count == 1) & (moments.var == 0)):
            raise ValueError(
                f"A population needs more than one value per channel: '{layer_name(layers.layer_of(entries))}' has a "
                "channel that sees a single one in all data, whose variance is 0. Give more data, of each domain; or "
                "leave the layer out by `only`."
            )


def warn_called_twice(results: Sequence[Result], layers: StoredLayers) -> None:
    """Warns of layers whose calls were merged."""
    total = max(int(e.max()) for e in layers.entries.values()) + 1
    calls: dict[int, np.ndarray] = {}
    seen: dict[tuple[int, int], Any] = {}
    for result in results:
        for i, moments in enumerate(result.moments):
            seen[id(result.entries), i] = seen.get((id(result.entries), i), False) | (moments.count > 0)
    entries = {id(result.entries): result.entries for result in results}
    for (program, i), used in seen.items():
        counter = calls.setdefault(program, np.zeros(total, int))
        np.add.at(counter, entries[program][i][used], 1)
    twice = [p for p, e in layers.entries.items() if any(counter[e].max() > 1 for counter in calls.values())]
    if twice:
        names = ", ".join(f"'{layer_name(path)}'" for path in twice)
        warnings.warn(
            f"{names}: called more than once in a forward pass. The calls are merged, but one mean and variance cannot "
            "normalize each of them: give each call a layer of its own.",
            stacklevel=3,
        )
