"""Batches for exact statistics, with the segments that run them, before any data is read."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from flaxbn.data.batches import Source, abstract
from flaxbn.data.placement import padding, shards
from flaxbn.data.samples import common_length, count_samples
from flaxbn.estimation.calls import Closed
from flaxbn.estimation.compiled import shapes_of
from flaxbn.estimation.exact.segments import Segments
from flaxbn.estimation.exact.stage import Batch
from flaxbn.estimation.request import Request
from flaxbn.estimation.reuse import Compiled
from flaxbn.tracing.flatten import unroll


def prepare_batches(asked: Request, sources: Iterable[Source]) -> Iterator[Batch]:
    """The batches with the segments that run them, one after the other; none is read here."""
    compiled = Compiled(Segments, asked.options, unroll)
    parts = shards(asked.options.sharding)
    by_shape: dict[Any, tuple[Segments, Closed]] = {}

    def segments_for(shape: Any) -> tuple[Segments, Closed]:
        leaves, structure = jax.tree.flatten(shape)
        key = structure, *((leaf.shape, leaf.dtype) for leaf in leaves)
        if key not in by_shape:
            present = None if asked.options.sharding is None else padding(count_samples(shape), parts)
            padded = shape if present is None else abstract(shape, len(present))
            samples = None if present is None else int(np.sum(present))
            shapes = shapes_of(asked.variables, padded, asked.rngs, present=samples)
            segments, (closed,) = compiled.find(shapes)
            by_shape[key] = segments, closed
            _check_alike(next(iter(by_shape.values()))[0], segments)
        return by_shape[key]

    for number, (shape, read) in enumerate(sources):
        yield Batch(number, common_length(shape), read, *segments_for(shape))


def _check_alike(first: Segments, other: Segments) -> None:
    """All batches go through one layer after the other, so that they must call the same ones."""
    if [e.tolist() for e in other.entries] != [e.tolist() for e in first.entries]:
        raise ValueError(
            "All batches must call the same batch-norm layers in the same order: got batches that call "
            f"{', '.join(first.layers)}, and batches of another shape that call {', '.join(other.layers)}."
        )
