"""One step of a run: all batches get to the input of one call, and are measured there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from flaxbn.arithmetic.moments import Moments, merge
from flaxbn.data.placement import on_accelerator, placed
from flaxbn.estimation.calls import Closed
from flaxbn.estimation.chunks import Ahead
from flaxbn.estimation.exact.segments import Segments, Values
from flaxbn.estimation.layer_moments import merge_steps
from flaxbn.estimation.request import Request
from flaxbn.estimation.threads import Cores

_AHEAD = 1  # on a CPU, fresh memory for what is kept costs more than waiting does; further ahead it piles up
_AHEAD_OF_ACCELERATOR = 8  # while batches are read: what is on its way to the device is held by the host

_merge_steps = jax.jit(merge_steps)


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


class Measured(NamedTuple):
    """What a stage finds; on the device, where it may not be computed yet.

    Attributes:
        moments: those of the call's input in all batches.
        firsts: the numbers of the batches with which the chunks begin.
        bad: for each chunk, which of its batches is the first whose moments are not finite, or -1.
    """

    moments: Moments
    firsts: list[int]
    bad: list[Array]

    def first_bad(self) -> int:
        """The number of the first batch whose moments are not finite, or -1; waits for the device."""
        places = zip(self.firsts, jax.device_get(self.bad))
        return next((first + int(place) for first, place in places if place >= 0), -1)


def measure(stage: Stage, batches: Sequence[Batch], cores: Cores) -> Measured:
    """The merged moments of one call's input in all batches, in parts for the cores, merged in their order."""
    cuts = [len(batches) * i // cores.number for i in range(cores.number + 1)]
    shares = [_Share(stage, batches[a:b]) for a, b in pairwise(cuts)]
    for share in shares:
        if not share.batches[0].segments.segments[stage.call].has_run:
            share.advance(1)  # compiles, here: each thread would do so by itself
    cores.each(_Share.advance, shares)
    moments, bad = _merge_chunks([chunk for share in shares for chunk in share.chunks])
    return Measured(moments, [first for share in shares for first in share.firsts], bad)


class _Share:
    """Some batches, one after the other: the moments of each fill a row of a buffer, and full buffers are merged."""

    def __init__(self, stage: Stage, batches: Sequence[Batch]) -> None:
        self.batches = batches
        self.chunks: list[Any] = []
        self.firsts: list[int] = []
        self._stage = stage
        self._left = iter(batches)
        self._ahead = Ahead(_most_ahead(stage))
        self._slot = 0

    def advance(self, batches: int | None = None) -> list[Any]:
        """So many batches more, or all that are left; returns the chunks."""
        for batch in islice(self._left, batches):
            segment = batch.segments.segments[self._stage.call]
            if self._slot == 0:
                self._buffer = segment.empty()
                self.firsts.append(batch.number)
            self._buffer, done = _measure_batch(self._stage, batch, self._buffer, self._slot)
            self._slot += 1
            if self._slot == segment.rows or batch is self.batches[-1]:
                self.chunks.append(_merge_steps([self._buffer]))
                self._slot = 0
            self._ahead.started(done)
        return self.chunks


def _most_ahead(stage: Stage) -> int | None:
    """Memory of an accelerator is taken and freed in the order of what was started: there nothing needs to wait."""
    if on_accelerator(stage.asked.variables):
        return _AHEAD_OF_ACCELERATOR if stage.base == 0 else None
    return _AHEAD if stage.base == stage.call else 0


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
    keys = jax.tree.map(lambda key: jax.random.fold_in(key, batch.number), asked.rngs)
    values = dict(zip(batch.segments.inputs, jax.tree.leaves((whole, keys))))
    return {v: values[v] for v in batch.segments.live[0]}
