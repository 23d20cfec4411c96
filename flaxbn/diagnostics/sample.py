"""Some batches of training data, to look at: drawn from all over where that can be, and drawn anew.

A look at the statistics needs a few dozen batches, not all data. Which they are must not depend on chance, or two looks
at the same model would differ; so everything that is drawn here is drawn by the same seed each time.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxbn.data.batches import Stream, check_positive, count_samples, open_batches, strided_rows
from flaxbn.data.samples import gather_names, hide, show
from flaxbn.models.user_functions import run_explained


def some_batches(batches: Any, batch_size: int | None, num_batches: int) -> list[Any]:
    """At least two batches of one size, at most `num_batches`, composed as in training.

    Of arrays batches of consecutive samples, drawn at random, always the same, in their order; of a sequence of batches
    likewise. Of another iterable the first ones, since it may have no end. A smaller last one is left out.

    Args:
        batches: a pytree of arrays with `batch_size`, an iterable of batches without.
        batch_size: how many consecutive samples are normalized together.
        num_batches: how many batches are wanted.

    Raises:
        ValueError: if there are fewer than two batches, or of several sizes.
        TypeError: if `batches` does not fit `batch_size`.
    """
    check_positive("num_batches", num_batches)
    data = open_batches(batches, batch_size, in_order=True)
    if isinstance(data, Stream):
        return _full_batches(data, num_batches)
    full = data.groups[0]
    if full.shape[1] != batch_size or min(len(full), num_batches) < 2:
        raise ValueError(
            f"Two batches are needed at least: got {count_samples(batches)} samples, `batch_size={batch_size}` and "
            f"`num_batches={num_batches}`."
        )
    return [data.take(full[number]) for number in _drawn(len(full), num_batches)]


def _drawn(count: int, num_batches: int) -> list[int]:
    """At most `num_batches` of the numbers from 0 to `count - 1`, in ascending order."""
    return np.sort(np.random.default_rng(0).permutation(count)[:num_batches]).tolist()


def _from_all_over(data: Stream, num_batches: int) -> list[Any]:
    """Of a sequence of batches all, or some drawn at random, but for a smaller last one: it may be sorted."""
    batches: Sequence[Any] = data.batches  # type: ignore[assignment]
    if len(batches) <= num_batches:
        return [*data] if len(batches) else []
    last_is_smaller = count_samples(hide(batches[-1])) < count_samples(hide(batches[0]))
    return data.pick(_drawn(len(batches) - last_is_smaller, num_batches))


def _full_batches(data: Stream, num_batches: int) -> list[Any]:
    if isinstance(data.batches, Sequence):
        some = _from_all_over(data, num_batches)
    else:
        some = [*itertools.islice(data, num_batches)]
    sizes = [count_samples(batch) for batch in some]
    if any(size != sizes[0] for size in sizes[:-1]) or sizes[-1:] > sizes[:1]:
        raise ValueError(
            "Batches must be of one size, that of training, but for a smaller last one, which is left out: got "
            f"{sorted(set(sizes))} samples. Give batches of one size."
        )
    full = [gather_names(show(batch)) for batch, size in zip(some, sizes) if size == sizes[0] > 0]
    if len(full) < 2:
        raise ValueError(
            f"Two batches of one size are needed at least: got batches of {sizes} samples and "
            f"`num_batches={num_batches}`."
        )
    return full


def labels_of(domain: Callable[[Any], Any], batch: Any) -> np.ndarray:
    """The labels of the examples of a batch, numbers or names, by a function of the user.

    Raises:
        ValueError: if it does not give one for each.
    """
    labels = np.asarray(run_explained("domain", "`batch -> labels`, one for each example", domain, batch=batch))
    if labels.shape != (count_samples(batch),):
        raise ValueError(
            f"`domain` must give one value for each example, shape ({count_samples(batch)},): got {labels.shape}."
        )
    return np.asarray(labels.tolist()) if labels.dtype == object else labels


def joined(batches: Sequence[Any]) -> Any:
    """The examples of several batches as one batch; numpy arrays stay on the host."""

    def join(*parts: Any) -> Any:
        return jnp.concatenate(parts) if isinstance(parts[0], jax.Array) else np.concatenate(parts)

    return jax.tree.map(join, *batches)


def by_shape(batches: Iterable[Any]) -> list[list[Any]]:
    """The batches in groups whose examples have one shape, sequences of one length say, in the order of the first."""
    groups: dict[Any, list[Any]] = {}
    for batch in batches:
        groups.setdefault(tuple(np.shape(leaf)[1:] for leaf in jax.tree.leaves(batch)), []).append(batch)
    return [*groups.values()]


def reshuffled(batches: Sequence[Any]) -> Iterator[Any]:
    """The same examples, drawn anew into as many batches, those of one shape among themselves; always the same.

    What batches would be if their examples were independent: so much of their noise is not due to their order.
    """

    def draw(samples: int, size: int) -> np.ndarray:
        return np.random.default_rng(0).permutation(samples).reshape(-1, size)

    return _recut(batches, draw)


def strided(batches: Sequence[Any]) -> Iterator[Any]:
    """The same examples in batches that take every K-th, as an estimate cuts arrays: an order of the data is no matter.

    What is compared with an estimate must be cut as it is, or its batches are found to differ, and not its statistics.
    """
    return _recut(batches, lambda samples, size: strided_rows(samples, size)[0])


def _recut(batches: Sequence[Any], rows_of: Callable[[int, int], np.ndarray]) -> Iterator[Any]:
    """The same examples in as many other batches, those of one shape among themselves."""
    for group in by_shape(batches):
        whole, size = joined(group), count_samples(group[0])
        for rows in rows_of(size * len(group), size):
            yield jax.tree.map(lambda a, rows=rows: a[rows], whole)
