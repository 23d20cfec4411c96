"""What a pass over data ends with: merged moments, and where they are not finite."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from flaxbn.arithmetic.moments import Moments, merge_along
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
    """

    entries: list[np.ndarray]
    steps: Sequence[int]
    moments: list[Moments]
    first_bad: Sequence[int]


class Pending(NamedTuple):
    """The same on the device, where it may not be computed yet; `moments` and `first_bad` as `pack` packs them."""

    entries: list[np.ndarray]
    steps: Sequence[int]
    packed: list[Array]
    is_complex: list[bool]


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


def merge_steps(steps: list[Moments]) -> tuple[list[Moments], Array]:
    """For each tap its moments along the leading axis merged, and where the first ones lie that are not finite."""

    def first_bad(moments: Moments) -> Array:
        finite = jnp.isfinite(moments.mean) & jnp.isfinite(moments.var)
        finite = jnp.all(finite.reshape(len(finite), -1), 1)
        return jnp.where(jnp.all(finite), -1, jnp.argmin(finite))

    return [merge_along(m) for m in steps], jnp.asarray([first_bad(m) for m in steps])


def pack(moments: Sequence[Moments], first_bad: Any) -> list[Array]:
    """All moments, and a number for each, as one array of real numbers, and if need be one of complex means.

    Every array that leaves a device is a transfer of its own, and takes as long for one number as for thousands.
    """
    real = [field for m in moments for field in m if not jnp.iscomplexobj(field)]
    complex_means = [m.mean for m in moments if jnp.iscomplexobj(m.mean)]
    kinds = [[*real, jnp.asarray(first_bad, jnp.float32)], *([complex_means] if complex_means else [])]
    return [jnp.concatenate([jnp.ravel(array) for array in kind]) for kind in kinds]


def fetched(results: Sequence[Pending]) -> list[Result]:
    """The results in host memory, by one transfer."""
    packed = jax.device_get([result.packed for result in results])
    return [_unpack(result, *arrays) for result, arrays in zip(results, packed)]


def _unpack(result: Pending, real: np.ndarray, complex_means: np.ndarray | None = None) -> Result:
    kinds, places = (real, complex_means), [0, 0]

    def take(kind: int, shape: tuple[int, ...]) -> Any:
        begin = places[kind]
        places[kind] += math.prod(shape)
        return kinds[kind][begin : places[kind]].reshape(shape)  # type: ignore[index]

    shapes = [entries.shape for entries in result.entries]
    moments = [Moments(take(0, s), take(int(c), s), take(0, s)) for s, c in zip(shapes, result.is_complex)]
    return Result(result.entries, result.steps, moments, real[places[0] :].astype(int).tolist())


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
            "give data of each domain, leave it out by `only`, or keep its stored statistics by `keep_unseen=True`. (A "
            "layer whose statistics are computed from what is stored, not read, counts as not seen. So does one of a "
            "class that flaxbn does not know: `flaxbn.recognize`, or `flaxbn.mark` in its code, makes it known.)"
        )
    return as_tree({path: moments[path] for path in wanted.entries})


def check_finite(results: Sequence[Result], layers: StoredLayers) -> None:
    """Moments that are not finite are an error, which names layer and batch."""
    for result in results:
        for entries, bad in zip(result.entries, result.first_bad):
            if bad >= 0:
                raise NotFiniteError(layer_name(layers.layer_of(entries)), result.steps[bad])


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
