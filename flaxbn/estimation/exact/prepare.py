"""Batches for exact statistics, with the segments that run them, before any data is read."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxbn.data.batches import abstract, count_samples, strided_rows
from flaxbn.data.placement import padding, shards
from flaxbn.estimation.compiled import Compiled, shapes_of
from flaxbn.estimation.exact.layer_by_layer import Batch
from flaxbn.estimation.exact.segments import Segments
from flaxbn.estimation.request import Request

Source = tuple[Any, Callable[[], Any]]
"""The shapes of a batch, and what reads it."""


def held(batches: Iterable[Any]) -> list[Source]:
    """Batches that stay where they are until they are needed."""
    return [(abstract(batch), partial(lambda batch: batch, batch)) for batch in batches]


def cut(arrays: Any, batch_size: int) -> list[Source]:
    """Strided batches of arrays, which stay where they are."""

    def take(rows: np.ndarray) -> Any:
        return jax.tree.map(lambda a: jnp.take(a, rows, axis=0) if isinstance(a, jax.Array) else a[rows], arrays)

    arrays = jax.tree.map(lambda a: a if isinstance(a, jax.Array) else np.asarray(a), arrays)
    groups = strided_rows(count_samples(arrays), batch_size)
    return [(abstract(arrays, len(rows)), partial(take, rows)) for group in groups for rows in group]


def prepare_batches(asked: Request, sources: Sequence[Source]) -> list[Batch]:
    """The batches with the segments that run them; nothing is read."""
    compiled = Compiled(Segments, asked.setting)
    parts = shards(asked.setting.sharding)
    by_shape: dict[Any, Segments] = {}

    def segments_for(shape: Any) -> Segments:
        leaves, structure = jax.tree.flatten(shape)
        key = structure, *((leaf.shape, leaf.dtype) for leaf in leaves)
        if key not in by_shape:
            present = padding(count_samples(shape), parts)
            padded = shape if present is None else abstract(shape, len(present))
            samples = None if present is None else int(np.sum(present))
            shapes = shapes_of(asked.variables, padded, asked.rngs, present=samples)
            by_shape[key] = compiled[shapes]
        return by_shape[key]

    batches = [Batch(i, count_samples(s), fetch, segments_for(s)) for i, (s, fetch) in enumerate(sources)]
    for first, other in pairwise(by_shape.values()):
        if [e.tolist() for e in other.entries] != [e.tolist() for e in first.entries]:
            raise ValueError(
                "All batches must call the same batch-norm layers in the same order: got batches that call "
                f"{', '.join(first.layers)}, and batches of another shape that call {', '.join(other.layers)}."
            )
    return batches
