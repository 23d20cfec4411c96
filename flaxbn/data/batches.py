"""Data, as arrays or as a stream, cut into batches."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import jax
import numpy as np


def count_samples(arrays: Any) -> int:
    """The length of the leading axis that all leaves of `arrays` share."""
    leaves = jax.tree.leaves(arrays)
    shapes = [np.shape(leaf) for leaf in leaves]
    if not shapes or any(not shape or shape[0] != (shapes[0] or (0,))[0] for shape in shapes):
        received = ", ".join(map(str, shapes)) or "no arrays"
        raise ValueError(f"A batch must be a pytree of arrays with a common leading sample axis: got {received}.")
    return shapes[0][0]


def check_arrays(batches: Any, batch_size: int | None) -> None:
    """Arrays come with a batch size, and streams without: anything else is an error."""
    is_arrays = isinstance(batches, Mapping) or hasattr(batches, "shape")
    is_arrays |= isinstance(batches, tuple) and all(hasattr(a, "shape") for a in batches)
    if batch_size is None and (is_arrays or not isinstance(batches, Iterable)):
        raise TypeError(
            f"`batches` must be an iterable of batches where `batch_size` is not given: got {_described(batches)}. To "
            "have arrays cut into batches, pass `batch_size`; to pass one batch, pass a list of it."
        )
    if batch_size is not None and isinstance(batches, Iterator | list):
        raise TypeError(
            f"`batches` must be a pytree of arrays where `batch_size` is given: got {_described(batches)}. Leave "
            "`batch_size` out for an iterator, whose batches are taken as they are."
        )


def check_positive(name: str, value: int | None) -> None:
    """An option that counts must be a positive integer."""
    if value is not None and (not isinstance(value, int | np.integer) or value < 1):
        raise ValueError(f"`{name}` must be a positive integer: got {value!r}.")


def chosen_samples(arrays: Any, num_samples: int | None) -> int:
    """How many samples of the arrays are used."""
    samples = count_samples(arrays)
    _check_enough(samples, num_samples)
    return samples if num_samples is None else num_samples


def evenly_spaced(arrays: Any, num_samples: int | None) -> Any:
    """`num_samples` samples, evenly spaced over the whole; all where it is None."""
    samples = count_samples(arrays)
    chosen_samples(arrays, num_samples)
    if num_samples is None:
        return arrays
    chosen = np.arange(num_samples, dtype=np.int64) * samples // num_samples
    return jax.tree.map(lambda a: a[chosen], arrays)


def strided_rows(samples: int, batch_size: int) -> list[np.ndarray]:
    """Sample indices of all batches, in groups of batches of one size: int arrays (batches, size).

    With `K = ceil(n / batch_size)` batches, batch k holds the samples k, k + K, k + 2K, ...: all batches are of nearly
    equal size, and data sorted by class is mixed.
    """
    count = max(-(-samples // batch_size), 1)
    larger = samples % count
    rows = [np.arange(k, samples, count, dtype=np.int32) for k in range(count)]
    return [np.stack(group) for group in (rows[:larger], rows[larger:]) if group and samples]


def stream(batches: Iterable[Any], num_samples: int | None) -> Iterator[Any]:
    """The batches of an iterable, cut off exactly at `num_samples` samples."""
    seen = 0
    for batch in batches:
        size = count_samples(batch)
        if num_samples is not None:
            size = min(size, num_samples - seen)
            batch = jax.tree.map(lambda a, size=size: a[:size], batch)
        if size:
            yield batch
        seen += size
        if seen == num_samples:
            return
    _check_enough(seen, num_samples)


def abstract(batch: Any, size: int | None = None) -> Any:
    """The shapes and dtypes that a batch has on a device, with `size` samples if given."""

    def shape(a: Any) -> jax.ShapeDtypeStruct:
        a = a if isinstance(a, jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic) else np.asarray(a)
        dtype = jax.dtypes.canonicalize_dtype(a.dtype, allow_extended_dtype=True)
        return jax.ShapeDtypeStruct((a.shape[0] if size is None else size, *a.shape[1:]), dtype)

    return jax.tree.map(shape, batch)


def known_batches(batches: Any, num_samples: int | None) -> list[Any]:
    """The batches of a sized iterable, in shapes and dtypes; of one that is no sequence only the first is read."""
    if not isinstance(batches, Sized) or isinstance(batches, Iterator):
        raise TypeError(
            f"A plan needs to know all batches beforehand: got {_described(batches)}, whose length is unknown. Give "
            "arrays and a `batch_size`, a list of batches, or an iterable with a length."
        )
    if not isinstance(batches, Sequence):
        batches = [next(iter(batches))] * len(batches) if len(batches) else []  # type: ignore[call-overload]
    sizes = [count_samples(batch) for batch in batches]
    ends = np.cumsum(sizes) if num_samples is None else np.minimum(np.cumsum(sizes), num_samples)
    _check_enough(int(ends[-1]) if sizes else 0, num_samples)
    return [abstract(batch, size) for batch, size in zip(batches, np.diff(ends, prepend=0).tolist()) if size]


def _check_enough(seen: int, num_samples: int | None) -> None:
    if seen == 0 and jax.process_count() == 1:
        raise ValueError("The data must hold at least one sample: saw none.")
    if num_samples is not None and seen < num_samples:
        raise ValueError(f"The data must hold `num_samples={num_samples}` samples: saw {seen}.")


def _described(batches: Any) -> str:
    if isinstance(batches, Iterator):
        return type(batches).__name__
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batches) if hasattr(leaf, "shape")]
    return f"{type(batches).__name__} of arrays of shapes {shapes}" if shapes else type(batches).__name__
