"""What a pass over data ends with: merged moments, and where they are not finite."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from flaxbn.arithmetic.moments import Moments
from flaxbn.layers.names import layer_name
from flaxbn.models.batch_stats import StoredLayers, all_seen, as_tree, collect, name_unseen
from flaxbn.models.places import Path
from flaxbn.models.unseen import frames_within


@dataclass(frozen=True)
class Result:
    """The merged moments of a chunk of batches, in host memory.

    Those of all calls lie end to end: what is asked of hundreds of layers is asked of one array. Where somebody wants
    to know of which call something is, it is taken apart.

    Attributes:
        entries: for each call the numbers of the stored entries that it reads; the same list in results of one program.
        steps: the numbers of the batches.
        joined: the moments of all these batches, in float64, of one channel after the other.
        bad: for each channel the first place in `steps` whose moments are not finite, or infinity.
        single: likewise the first place where it has a single value; of length 0 where nobody looks at that.
        is_complex: for each call whether its means are complex: where one's are, all are kept so.
    """

    entries: list[np.ndarray]
    steps: Sequence[int]
    joined: Moments
    bad: np.ndarray
    single: np.ndarray
    is_complex: Sequence[bool]

    @classmethod
    def of_calls(
        cls, entries: list[np.ndarray], steps: Sequence[int], moments: Sequence[Moments], first_bad: Sequence[int]
    ) -> "Result":
        """From the moments of each call, and the first place in `steps` where they are not finite, or -1."""
        joined = Moments(*(_end_to_end([one[i] for one in moments]) for i in range(3)))  # type: ignore[arg-type]
        bad = np.repeat(np.where(np.asarray(first_bad) < 0, np.inf, first_bad), [e.size for e in entries])
        return cls(entries, steps, joined, bad, np.zeros(0), [bool(np.iscomplexobj(one.mean)) for one in moments])

    @cached_property
    def numbers(self) -> np.ndarray:
        """The entries, end to end."""
        return _end_to_end(self.entries).astype(np.int64)

    @property
    def moments(self) -> list[Moments]:
        """For each call those of its channels."""
        found = []
        for at, entries, is_complex in zip(self._places(), self.entries, self.is_complex):
            count, mean, var = (field[at].reshape(entries.shape) for field in self.joined)
            found.append(Moments(count, mean if is_complex else mean.real, var))
        return found

    @property
    def first_bad(self) -> list[int]:
        """For each call the first place in `steps` whose moments are not finite, or -1."""
        return [earliest(self.bad[at]) for at in self._places()]

    @property
    def first_single(self) -> list[int]:
        """Likewise the first place where a channel has a single value."""
        return [earliest(self.single[at]) for at in self._places()]

    def _places(self) -> Iterator[slice]:
        end = 0
        for entries in self.entries:
            begin, end = end, end + entries.size
            yield slice(begin, end)


def _end_to_end(arrays: Sequence[Any]) -> np.ndarray:
    return np.concatenate([np.zeros(0), *map(np.ravel, arrays)])


def earliest(places: np.ndarray) -> int:
    """The least of some places, or -1 where all are infinity."""
    least = np.min(places, initial=np.inf)
    return -1 if np.isinf(least) else int(least)


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
    parts: list[tuple[np.ndarray, Moments]] = []
    for result in results:
        apart = any(result.is_complex)
        parts += zip(result.entries, result.moments) if apart else [(result.numbers, result.joined)]
    return collect(parts, layers)


def checked_tree(moments: Mapping[Path, Moments], wanted: StoredLayers, *, keep_unseen: bool) -> Any:
    """The tree of what `checked` gives."""
    return as_tree(checked(moments, wanted, keep_unseen=keep_unseen))


def checked(moments: Mapping[Path, Moments], wanted: StoredLayers, *, keep_unseen: bool) -> dict[Path, Moments]:
    """The wanted layers' moments; what saw no data is an error."""
    found = {path: moments[path] for path in wanted.entries}
    if not keep_unseen and not all_seen(found.values()):
        unseen = [name_unseen(path, one) for path, one in found.items() if not np.all(one.count > 0)]
        raise ValueError(
            f"Every batch-norm layer in `batch_stats` must see data: {', '.join(unseen)} saw none. Run it in `call`, "
            "as part of the module that `call` is given, give data of each domain, leave it out by `only`, or keep its "
            "stored statistics by `keep_unseen=True`. (A layer whose statistics are computed from what is stored, not "
            "read, counts as not seen. So does one of a class that flaxbn does not know: `flaxbn.recognize`, or "
            "`flaxbn.mark` in its code, makes it known.)"
        )
    return found


def check_finite(results: Sequence[Result], layers: StoredLayers) -> None:
    """Moments that are not finite are an error, which names layer and batch."""
    for result in (r for r in results if not np.isinf(r.bad).all()):
        for entries, bad in zip(result.entries, result.first_bad):
            if bad >= 0:
                raise NotFiniteError(layer_name(layers.layer_of(entries)), result.steps[bad])


def check_several(results: Sequence[Result], layers: StoredLayers) -> None:
    """A batch in which a layer sees a single value is an error: its own variance is 0, and its output constant."""
    for result in (r for r in results if not np.isinf(r.single).all()):
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
    """Warns of layers whose calls were merged: some of their entries were read by two calls of one program."""
    seen: dict[int, Any] = {}
    numbers = {id(result.entries): result.numbers for result in results}
    for result in results:
        seen[id(result.entries)] = seen.get(id(result.entries), False) | (result.joined.count > 0)
    calls = [np.bincount(numbers[program][used]) for program, used in seen.items()]
    if all(counter.max(initial=0) < 2 for counter in calls):
        return
    many = np.concatenate([np.flatnonzero(counter > 1) for counter in calls])
    twice = [path for path, entries in layers.entries.items() if np.isin(entries, many).any()]
    if twice:
        names = ", ".join(f"'{layer_name(path)}'" for path in twice)
        warnings.warn(
            f"{names}: called more than once in a forward pass. The calls are merged, but one mean and variance cannot "
            "normalize each of them: give each call a layer of its own.",
            stacklevel=frames_within() + 1,
        )
