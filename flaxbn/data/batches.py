"""Data, opened once: arrays that are cut into batches, or a stream of batches as they come."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxbn.data.placement import array_types, to_auto
from flaxbn.data.samples import check_numbers, common_length, gather_names, hide
from flaxbn.data.samples import count_samples as count_samples


class Source(NamedTuple):
    """A batch that has not been read yet.

    Attributes:
        shape: its arrays as shapes and dtypes.
        read: gives the arrays, or with a number at most so many of their samples; may be called again.
    """

    shape: Any
    read: Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Arrays:
    """Samples in memory, cut into batches.

    Attributes:
        arrays: a tree of numpy or jax arrays, whose leading axis is that of the samples; they stay where they are.
        chosen: the rows of the samples that are used; None for all.
        groups: for each batch its samples, as places among those used, in groups of batches of one size: int arrays
            (batches, size).
    """

    arrays: Any
    chosen: np.ndarray | None
    groups: tuple[np.ndarray, ...]

    def take(self, places: np.ndarray) -> Any:
        """Some of the samples that are used, by an int array of any shape, which becomes the leading axes."""
        rows = places if self.chosen is None else self.chosen[places]
        return jax.tree.map(lambda a: jnp.take(a, rows, axis=0) if isinstance(a, jax.Array) else a[rows], self.arrays)

    def on_device(self) -> Any:
        """All samples that are used, on the default device, or where they are."""
        if self.chosen is None:
            return jax.tree.map(jnp.asarray, self.arrays)
        return jax.tree.map(jnp.asarray, self.take(np.arange(len(self.chosen))))

    def shapes(self) -> list[Any]:
        """Each batch as shapes and dtypes."""
        return [abstract(self.arrays, len(rows)) for rows in self._batches()]

    def sources(self) -> list[Source]:
        """Each batch, to be read when it is needed."""
        return [Source(abstract(self.arrays, len(rows)), partial(self._first, rows)) for rows in self._batches()]

    def _first(self, rows: np.ndarray, samples: int | None = None) -> Any:
        return self.take(rows[:samples])

    def length(self) -> int:
        """How many batches there are."""
        return sum(map(len, self.groups))

    def peeked(self) -> tuple[Any, "Arrays"]:
        """The first batch as shapes and dtypes (None without any), and all of the data."""
        return abstract(self.arrays, self.groups[0].shape[1]) if self.groups else None, self

    def __iter__(self) -> Iterator[Any]:
        """The batches themselves."""
        return map(self.take, self._batches())

    def _batches(self) -> list[np.ndarray]:
        return [rows for group in self.groups for rows in group]


@dataclass(frozen=True, eq=False)
class Stream:
    """Batches of an iterable, which is read once, cut off exactly at `num_samples` samples.

    A batch is copied when it arrives: loaders fill one buffer again and again, and jax on a CPU may use it in place.
    It may hold anything beside samples, as `hide` leaves it; only where samples are counted must they have an axis.
    """

    batches: Iterable[Any]
    num_samples: int | None = None

    def __iter__(self) -> Iterator[Any]:
        """The batches as they come."""
        seen = 0
        for batch in map(hide, self.batches):
            check_not_deleted("batches", batch)
            size = common_length(batch)
            if self.num_samples is not None:
                size = min(count_samples(batch), self.num_samples - seen)
                batch = jax.tree.map(lambda a, size=size: a[:size], batch)
            if size != 0:
                yield to_auto(jax.tree.map(_received, batch))
            seen += 1 if size is None else size
            if seen == self.num_samples:
                return
        _check_enough(seen, self.num_samples)

    def length(self) -> int | None:
        """How many batches there are, at most; None where only reading tells."""
        if not isinstance(self.batches, Sized) or isinstance(self.batches, Iterator):
            return None
        try:
            return len(self.batches)
        except Exception:  # loaders have a `__len__` that raises, whatever they like, where they do not know
            return None

    def peeked(self) -> tuple[Any, "Stream"]:
        """The first batch, which is read, as shapes and dtypes (None without any), and all of the data."""
        batches = iter(self)
        first = list(islice(batches, 1))
        return abstract(first[0]) if first else None, Stream(chain(first, batches))

    def pick(self, numbers: Sequence[int]) -> list[Any]:
        """Some batches of a sequence, by their numbers, received as those that come by themselves."""
        return [*Stream([self.batches[number] for number in numbers])]  # type: ignore[index]

    def shapes(self) -> list[Any]:
        """Each batch as shapes and dtypes; of an iterable that is no sequence only the first is read."""
        batches = self.batches
        if not isinstance(batches, Sized) or isinstance(batches, Iterator):
            raise TypeError(
                f"A plan needs to know all batches beforehand: got {_described(batches)}, whose length is unknown. "
                "Give arrays and a `batch_size`, a list of batches, or an iterable with a length."
            )
        if isinstance(batches, Sequence):
            batches = [
                abstract(hide(batch)) for batch in batches
            ]  # one that reads its batches when asked is asked once
        else:
            batches = [hide(next(iter(batches)))] * len(batches) if len(batches) else []
        if self.num_samples is None:
            some = [abstract(batch) for batch in batches if common_length(batch) != 0]
            _check_enough(len(some), None)
            return some
        ends = np.minimum(np.cumsum([count_samples(batch) for batch in batches]), self.num_samples)
        _check_enough(int(ends[-1]) if len(ends) else 0, self.num_samples)
        return [abstract(batch, size) for batch, size in zip(batches, np.diff(ends, prepend=0).tolist()) if size]

    def sources(self) -> Iterator[Source]:
        """Each batch as it comes; it is read now and held."""
        return (Source(abstract(batch), partial(_held, batch)) for batch in self)


def open_batches(
    batches: Any, batch_size: int | None, num_samples: int | None = None, *, in_order: bool = False
) -> Arrays | Stream:
    """What a user gives as data, checked and cut.

    Args:
        batches: with `batch_size`, a pytree of arrays with a common leading sample axis; without, an iterable of such
            pytrees, which are batches as they are.
        batch_size: the largest number of samples in a batch.
        num_samples: use this many samples: of arrays evenly spaced ones, of an iterable the first.
        in_order: let consecutive samples make a batch of exactly `batch_size`, and the rest a smaller one, as in a
            training that does not shuffle. Otherwise, with `K = ceil(n / batch_size)`, batch k holds the samples k,
            k + K, k + 2K, ...: all batches are of nearly equal size, and data sorted by class is mixed.

    Raises:
        TypeError: if `batches` does not fit `batch_size`, or holds names that would have to be cut.
        ValueError: if a number is not positive, arrays have no common leading axis, or there are too few samples.
    """
    check_positive("batch_size", batch_size)
    check_positive("num_samples", num_samples)
    _check_kind(batches, batch_size)
    if batch_size is not None:
        check_not_deleted("batches", batches)
    if batch_size is None:
        return Stream(batches, num_samples)
    arrays = to_auto(jax.tree.map(_as_array, gather_names(batches)))
    if not in_order:
        check_numbers("batches", arrays, _NAMES, " where `batch_size` is given")
    samples = count_samples(arrays)
    _check_enough(samples, num_samples)
    chosen = None if num_samples is None else np.arange(num_samples, dtype=np.int64) * samples // num_samples
    cut = consecutive_rows if in_order else strided_rows
    return Arrays(arrays, chosen, cut(num_samples or samples, batch_size))


_NAMES = (
    "Leave that array out, or number what it names, `names, numbers = numpy.unique(array, return_inverse=True)`; or "
    "give an iterable of batches, in which names may stand."
)


def strided_rows(samples: int, batch_size: int) -> tuple[np.ndarray, ...]:
    """The rows of batches that take every K-th sample, larger batches first: `(batches, size)` for each size."""
    count = max(-(-samples // batch_size), 1)
    larger = samples % count
    rows = [np.arange(k, samples, count, dtype=np.int32) for k in range(count)]
    return tuple(np.stack(group) for group in (rows[:larger], rows[larger:]) if group and samples)


def consecutive_rows(samples: int, batch_size: int) -> tuple[np.ndarray, ...]:
    """The rows of batches of consecutive samples, and of a smaller last one: `(batches, size)` for each size."""
    full = samples // batch_size * batch_size
    rows = np.arange(samples, dtype=np.int32)
    return tuple(group for group in (rows[:full].reshape(-1, batch_size), rows[None, full:]) if group.size)


def check_positive(name: str, value: int | None) -> None:
    """An option that counts must be a positive integer."""
    if value is not None and (not isinstance(value, int | np.integer) or value < 1):
        raise ValueError(f"`{name}` must be a positive integer: got {value!r}.")


def abstract(batch: Any, size: int | None = None) -> Any:
    """The shapes and dtypes that a batch has on a device, with `size` samples if given."""

    def shape(a: Any) -> jax.ShapeDtypeStruct:
        a = a if isinstance(a, jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic) else np.asarray(a)
        dtype = jax.dtypes.canonicalize_dtype(a.dtype, allow_extended_dtype=True)
        return jax.ShapeDtypeStruct(a.shape if size is None else (size, *a.shape[1:]), dtype)

    return jax.tree.map(shape, batch)


def _check_kind(batches: Any, batch_size: int | None) -> None:
    """Arrays come with a batch size, and streams without: anything else is an error."""
    is_arrays = isinstance(batches, Mapping) or hasattr(batches, "shape")
    is_arrays |= isinstance(batches, tuple) and all(hasattr(a, "shape") for a in batches)
    if batch_size is None and (is_arrays or not isinstance(batches, Iterable)):
        cure = (
            "A function that makes batches must be called: pass what it returns."
            if inspect.isroutine(batches)
            else "To have arrays cut into batches, pass `batch_size`; to pass one batch, pass a list of it."
        )
        raise TypeError(
            f"`batches` must be an iterable of batches where `batch_size` is not given: got {_described(batches)}. "
            f"{cure}"
        )
    is_loader = isinstance(batches, Iterable) and not hasattr(batches, "shape") and jax.tree_util.all_leaves([batches])
    if batch_size is not None and (is_loader or isinstance(batches, Iterator | list)):
        raise TypeError(
            f"`batches` must be a pytree of arrays where `batch_size` is given: got {_described(batches)}. Leave "
            "`batch_size` out for a loader or an iterator, whose batches are taken as they are."
        )


def _check_enough(seen: int, num_samples: int | None) -> None:
    """Too few samples are an error; none are one where no other process can have some."""
    if seen == 0 and jax.process_count() == 1:
        raise ValueError(
            "The data must hold at least one sample: saw none. A generator that was read once has nothing more: make a "
            "new one for each call, or give a list of batches."
        )
    if num_samples is not None and seen < num_samples:
        raise ValueError(f"The data must hold `num_samples={num_samples}` samples: saw {seen}.")


def check_not_deleted(name: str, tree: Any) -> None:
    """Arrays that were donated to a compiled function are gone: an error that says so.

    Raises:
        ValueError: naming the argument, as which `tree` was given.
    """
    leaves = jax.tree.leaves(tree)
    concrete = {kind for kind in array_types(leaves) if not issubclass(kind, jax.core.Tracer)}
    if any(type(leaf) in concrete and leaf.is_deleted() for leaf in leaves):
        raise ValueError(
            f"`{name}` must hold arrays that are still there: got one that was deleted, as jax does with arrays that "
            "are donated to a compiled function (`donate_argnums`, `donate_argnames`). Give what that function "
            "returned, or a copy made before."
        )


def _as_array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | np.ndarray) else np.asarray(leaf)


def _received(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else np.array(leaf)


def _held(batch: Any, samples: int | None = None) -> Any:
    check_not_deleted("batches", batch)  # whoever made it may have gone on
    return batch if samples is None else jax.tree.map(lambda a: a[:samples], batch)


def _described(batches: Any) -> str:
    if isinstance(batches, Iterator):
        return type(batches).__name__
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batches) if hasattr(leaf, "shape")]
    return f"{type(batches).__name__} of arrays of shapes {shapes}" if shapes else type(batches).__name__
