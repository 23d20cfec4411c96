"""Some batches of training data, to look at."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxbn import batches as data


def some_batches(batches: Any, batch_size: int | None, num_batches: int) -> list[Any]:
    """At least two batches of one size, at most `num_batches`.

    Of arrays batches of consecutive samples, drawn at random, always the same, in their order. Of an iterable the first
    ones, of which a smaller last one is left out.
    """
    data.check_positive("batch_size", batch_size)
    data.check_positive("num_batches", num_batches)
    data.check_arrays(batches, batch_size)
    if batch_size is None:
        return _first_batches(batches, num_batches)
    samples = data.count_samples(batches)
    count = samples // batch_size
    if min(count, num_batches) < 2:
        raise ValueError(
            f"Two batches are needed at least: got {samples} samples, `batch_size={batch_size}` and "
            f"`num_batches={num_batches}`."
        )
    chosen = np.sort(np.random.default_rng(0).permutation(count)[:num_batches]) * batch_size
    return [jax.tree.map(lambda a, i=i: a[i : i + batch_size], batches) for i in chosen.tolist()]


def _first_batches(batches: Iterable[Any], num_batches: int) -> list[Any]:
    chosen = [*itertools.islice(batches, num_batches)]
    sizes = [data.count_samples(batch) for batch in chosen]
    if any(size != sizes[0] for size in sizes[:-1]) or sizes[-1:] > sizes[:1]:
        raise ValueError(
            "Batches must be of one size, that of training, but for a smaller last one, which is left out: got "
            f"{sorted(set(sizes))} samples. Give batches of one size."
        )
    full = [batch for batch, size in zip(chosen, sizes) if size == sizes[0]]
    if len(full) < 2:
        raise ValueError(
            f"Two batches of one size are needed at least: got batches of {sizes} samples and "
            f"`num_batches={num_batches}`."
        )
    return full


def joined(batches: Sequence[Any]) -> Any:
    """The examples of several batches as one."""

    def join(*parts: Any) -> Any:
        return jnp.concatenate(parts) if isinstance(parts[0], jax.Array) else np.concatenate(parts)

    return jax.tree.map(join, *batches)


def reshuffled(batches: Sequence[Any]) -> list[Any]:
    """The same examples, drawn anew into as many batches; always the same."""
    size = data.count_samples(batches[0])
    order = np.random.default_rng(0).permutation(size * len(batches)).reshape(-1, size)
    whole = joined(batches)
    return [jax.tree.map(lambda a, rows=rows: a[rows], whole) for rows in order]
