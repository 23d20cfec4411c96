"""All batches in lockstep: every one up to the input of a layer, and on with the statistics of all."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from flaxbn.arithmetic.moments import Moments, merge
from flaxbn.data.placement import placed
from flaxbn.data.processes import together
from flaxbn.estimation.exact.segments import Segments, Values
from flaxbn.estimation.layer_moments import merge_steps
from flaxbn.estimation.request import Request
from flaxbn.models.batch_stats import all_entries, flat_statistics
from flaxbn.tracing.measure import replace_seen

_AHEAD = 1

_merge_steps = jax.jit(merge_steps)


_replace_seen = jax.jit(replace_seen)


@jax.jit
def _merge_chunks(chunks: Sequence[Any]) -> tuple[Moments, list[Array]]:
    """The moments of all chunks, and where in each the first ones lie that are not finite."""
    return merge(*(moments for (moments,), _ in chunks)), [bad for _, (bad,) in chunks]


@dataclass
class Batch:
    """One batch on its way.

    Attributes:
        number: its place in the data, from 0.
        size: its samples, without padding.
        fetch: reads it.
        segments: what runs it.
        values: what is kept of it at the last kept boundary; None where that is the data.
        weights: the weights of its samples, once it has been read.
    """

    number: int
    size: int
    fetch: Callable[[], Any]
    segments: Segments
    values: Values | None = None
    weights: Array | None = None


class Found(NamedTuple):
    """What a run ends with; a list with one item for each call.

    Attributes:
        moments: those of all batches.
        statistics: the mean and variance that the call let through.
        first_bad: the first batch whose moments are not finite, or -1.
        watched: the moments of each watched batch.
    """

    moments: list[Moments]
    statistics: list[tuple[Array, Array]]
    first_bad: list[int]
    watched: list[list[Moments]]


def run(asked: Request, batches: Sequence[Batch], kept: Sequence[bool], watched: Sequence[int]) -> Found:
    """All batches through one call after the other; blocks, and merges over processes, once for each call."""
    wholes = {id(batch.segments): batch.segments for batch in batches}
    shared = {key: whole.shared(asked.variables) for key, whole in wholes.items()}
    defaults = flat_statistics(asked.variables["batch_stats"], asked.layers)
    found = Found([], [], [], [])
    base = 0
    for call, keeps in enumerate(kept):

        def local(call: int = call, keeps: bool = keeps, base: int = base) -> Moments:
            chunks, seen = _measure(asked, batches, shared, base, call, keeps, watched)
            moments, bad = _merge_chunks(chunks)
            rows = batches[0].segments.segments[call].rows
            found.watched.append(seen)
            found.first_bad.append(next((i * rows + int(b) for i, b in enumerate(bad) if b >= 0), -1))
            return moments

        entries = batches[0].segments.entries[call] if batches else all_entries(asked.layers)
        moments = _of_all_processes(local if batches else None, entries, defaults)
        mean, var = _replace_seen(*(a[entries - 1] for a in defaults), moments)
        found.moments.append(moments)
        found.statistics.append((mean, var))
        for key, whole in wholes.items():
            shared[key] |= whole.segments[call].statistics(mean, var)
        if keeps and base == 0:
            for batch in batches:
                batch.fetch = batch.fetch if batch.number in watched else _already_read
        base = call + 1 if keeps else base
    return found


def _already_read() -> Any:
    raise AssertionError("a batch is read again only where nothing of it is kept")


def _of_all_processes(
    local: Callable[[], Moments] | None, entries: np.ndarray, defaults: tuple[np.ndarray, np.ndarray]
) -> Moments:
    """The moments of one call, merged over processes, some of which may have no data."""
    if local is not None and jax.process_count() == 1:
        return local()

    def by_entry() -> Moments:
        default_mean, default_var = defaults
        fields = [np.zeros_like(a) for a in (default_var, default_mean, default_var)]
        if local is not None:
            for field, values in zip(fields, jax.device_get(local())):
                field[entries - 1] = values
        return Moments(*fields)  # type: ignore[arg-type]

    everywhere = merge(*together(by_entry))
    return Moments(*(field[entries - 1] for field in everywhere))


def _measure(
    asked: Request,
    batches: Sequence[Batch],
    shared: Mapping[int, Values],
    base: int,
    call: int,
    keeps: bool,
    watched: Sequence[int],
) -> tuple[list[Any], list[Moments]]:
    """The merged moments of one call's input in chunks, and those of the watched batches."""
    chunks: list[Any] = []
    seen: list[Moments] = []
    ahead: deque[Array] = deque()
    for batch in batches:
        segment = batch.segments.segments[call]
        slot = batch.number % segment.rows
        if slot == 0:
            buffer = segment.empty()
        common = shared[id(batch.segments)]
        values = _values(asked, batch, common, base, call)
        retained: Values = {} if keeps or batch.values is None else batch.values
        if keeps:
            batch.values = None
        buffer, made, done = segment.measure(values, common, retained, batch.weights, buffer, slot)
        if keeps:
            batch.values = {v: a for v, a in values.items() if v not in segment.dead} | made
        if batch.number in watched:
            seen.append(jax.tree.map(lambda a, slot=slot: a[slot], buffer))
        if slot == segment.rows - 1 or batch is batches[-1]:
            chunks.append(_merge_steps([buffer]))
        ahead.append(done)
        if len(ahead) > (_AHEAD if base == call else 0):
            jax.block_until_ready(ahead.popleft())
    return chunks, seen


def _values(asked: Request, batch: Batch, shared: Values, base: int, call: int) -> Values:
    """What lives of a batch before a call, computed from what is kept."""
    values = fetch(asked, batch) if batch.values is None else dict(batch.values)
    for segment in batch.segments.segments[base:call]:
        made = segment.advance(values, shared)
        values = {v: a for v, a in values.items() if v not in segment.dead} | made
    return values


def fetch(asked: Request, batch: Batch) -> Values:
    """Reads a batch, and the weights of its samples."""
    whole, present = placed(batch.fetch(), asked.setting.sharding)
    if batch.weights is None:
        batch.weights = batch.segments.sample_weights(whole, present)
    keys = jax.tree.map(lambda key: jax.random.fold_in(key, batch.number), asked.rngs)
    values = dict(zip(batch.segments.inputs, jax.tree.leaves((whole, keys))))
    return {v: values[v] for v in batch.segments.live[0]}
