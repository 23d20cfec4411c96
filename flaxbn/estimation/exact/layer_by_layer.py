"""All batches in lockstep: every one up to the input of a layer, and on with the statistics of all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from flaxbn.arithmetic.moments import Moments, merge
from flaxbn.data.placement import placed
from flaxbn.data.processes import gather, on_all
from flaxbn.estimation.calls import Closed
from flaxbn.estimation.chunks import Ahead
from flaxbn.estimation.exact.segments import Segments, Values
from flaxbn.estimation.keys import fold_in
from flaxbn.estimation.layer_moments import merge_steps
from flaxbn.estimation.request import Request
from flaxbn.models.batch_stats import all_entries, flat_statistics
from flaxbn.tracing.measure import replace_seen

_AHEAD = 1  # fresh memory for what is kept costs more than waiting does; further ahead it piles up

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
        read: gives its arrays.
        segments: what runs it.
        closed: the arrays that these take besides.
        values: what is kept of it at the last kept boundary; None where that is the data.
        weights: the weights of its samples, once it has been read.
    """

    number: int
    size: int
    read: Callable[[], Any]
    segments: Segments
    closed: Closed
    values: Values | None = None
    weights: Array | None = None


class Found(NamedTuple):
    """What a run ends with; a list with one item for each call.

    Attributes:
        moments: those of all batches.
        statistics: the mean and variance that the call let through.
        first_bad: the first batch whose moments are not finite, or -1.
    """

    moments: list[Moments]
    statistics: list[tuple[Array, Array]]
    first_bad: list[int]


class Stage(NamedTuple):
    """The step of a run in which all batches get to the input of one call.

    Attributes:
        asked: the request.
        shared: what holds for all batches, for each set of segments, by its id.
        base: the call from whose boundary batches start: what lives there is kept, or it is the data.
        call: the call whose input is measured.
        keeps: whether what lives after it is kept.
    """

    asked: Request
    shared: Mapping[int, Values]
    base: int
    call: int
    keeps: bool


def run(asked: Request, batches: Sequence[Batch], kept: Sequence[bool]) -> Found:
    """All batches through one call after the other; blocks, and merges over processes, once for each call."""
    by_segments = {id(batch.segments): batch for batch in batches}
    shared = {key: one.segments.shared(one.closed, asked.variables) for key, one in by_segments.items()}
    defaults = flat_statistics(asked.variables["batch_stats"], asked.layers)
    found = Found([], [], [])
    base = 0
    for call, keeps in enumerate(kept):
        entries = batches[0].segments.entries[call] if batches else all_entries(asked.layers)
        moments, first_bad = _measure_everywhere(Stage(asked, shared, base, call, keeps), batches, entries, defaults)
        stored_mean, stored_var = (a[entries - 1] for a in defaults)
        if not np.iscomplexobj(moments.mean):
            stored_mean = stored_mean.real  # in one array with the means of complex layers it became complex
        mean, var = _replace_seen(stored_mean, stored_var, moments)
        found.moments.append(moments)
        found.statistics.append((mean, var))
        found.first_bad.append(first_bad)
        for key, one in by_segments.items():
            shared[key] |= one.segments.segments[call].statistics(mean, var)
        if keeps and base == 0:
            for batch in batches:
                batch.read = _already_read
        base = call + 1 if keeps else base
    return found


def moments_with(asked: Request, batch: Batch, statistics: Sequence[tuple[Array, Array]]) -> list[Moments]:
    """The moments of each call's input in one batch, where the calls let these statistics through."""
    shared = batch.segments.shared(batch.closed, asked.variables)
    values = fetch(asked, batch)
    found = []
    for segment, given in zip(batch.segments.segments, statistics, strict=True):
        buffer, made, _ = segment.measure(values, shared, {}, batch.weights, segment.empty(), 0)
        values = {v: a for v, a in values.items() if v not in segment.dead} | made
        shared |= segment.statistics(*given)
        found.append(jax.tree.map(lambda a: a[0], buffer))
    return found


def _already_read() -> Any:
    raise AssertionError("a batch is read again only where nothing of it is kept")


def _measure_everywhere(
    stage: Stage, batches: Sequence[Batch], entries: np.ndarray, defaults: tuple[np.ndarray, np.ndarray]
) -> tuple[Moments, int]:
    """The moments of one call, merged over processes, some of which may have no data; the first bad batch here."""
    if jax.process_count() == 1:
        return _measure(stage, batches)

    def by_entry() -> tuple[Moments, int]:
        default_mean, default_var = defaults
        fields, first_bad = [np.zeros_like(a) for a in (default_var, default_mean, default_var)], -1
        if batches:
            moments, first_bad = jax.device_get(_measure(stage, batches))
            for field, values in zip(fields, moments):
                field[entries - 1] = values
        return Moments(*fields), first_bad  # type: ignore[arg-type]

    moments, first_bad = on_all(by_entry)
    everywhere = merge(*gather(moments))
    return Moments(*(field[entries - 1] for field in everywhere)), first_bad


def _measure(stage: Stage, batches: Sequence[Batch]) -> tuple[Moments, int]:
    """The merged moments of one call's input in all batches, and the first batch that has some that are not finite."""
    rows = batches[0].segments.segments[stage.call].rows
    ahead = Ahead(_AHEAD if stage.base == stage.call else 0)
    chunks: list[Any] = []
    for batch in batches:
        slot = batch.number % rows
        if slot == 0:
            buffer = batch.segments.segments[stage.call].empty()
        buffer, done = _measure_batch(stage, batch, buffer, slot)
        if slot == rows - 1 or batch is batches[-1]:
            chunks.append(_merge_steps([buffer]))
        ahead.started(done)
    moments, bad = _merge_chunks(chunks)
    return moments, next((i * rows + int(b) for i, b in enumerate(bad) if b >= 0), -1)


def _measure_batch(stage: Stage, batch: Batch, buffer: Moments, slot: int) -> tuple[Moments, Array]:
    """The buffer with the moments of one batch, which then holds what the stage keeps; and a token."""
    segment = batch.segments.segments[stage.call]
    shared = stage.shared[id(batch.segments)]
    values = _values(stage, batch, shared)
    retained: Values = {} if stage.keeps or batch.values is None else batch.values
    if stage.keeps:
        batch.values = None  # what is not needed any more may be overwritten
    buffer, made, done = segment.measure(values, shared, retained, batch.weights, buffer, slot)
    if stage.keeps:
        batch.values = {v: a for v, a in values.items() if v not in segment.dead} | made
    return buffer, done


def _values(stage: Stage, batch: Batch, shared: Values) -> Values:
    """What lives of a batch before a call, computed from what is kept."""
    values = fetch(stage.asked, batch) if batch.values is None else dict(batch.values)
    for segment in batch.segments.segments[stage.base : stage.call]:
        made = segment.advance(values, shared)
        values = {v: a for v, a in values.items() if v not in segment.dead} | made
    return values


def fetch(asked: Request, batch: Batch) -> Values:
    """Reads a batch, and the weights of its samples."""
    whole, present = placed(batch.read(), asked.options.sharding)
    if batch.weights is None:
        batch.weights = batch.segments.sample_weights(batch.closed, whole, present)
    keys = fold_in(asked.rngs, batch.number)
    values = dict(zip(batch.segments.inputs, jax.tree.leaves((whole, keys))))
    return {v: values[v] for v in batch.segments.live[0]}
