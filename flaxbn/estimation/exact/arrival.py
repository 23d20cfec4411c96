"""Batches of a stream: what can be computed of one alone is, while the next is read."""

from collections import deque
from collections.abc import Callable
from itertools import chain, cycle, islice

import jax

from flaxbn.data.batches import Stream
from flaxbn.data.placement import on_accelerator, shards
from flaxbn.estimation.chunks import Ahead
from flaxbn.estimation.exact.prepare import prepare_batches
from flaxbn.estimation.exact.stage import AHEAD_OF_ACCELERATOR, Batch, Stage, measure_batch
from flaxbn.estimation.request import Request, tracing_options
from flaxbn.estimation.threads import Lanes, lanes_for


def prepare_arriving(asked: Request, data: Stream, memory_limit: int | None) -> list[Batch]:
    """All batches, each of which got to the first call's input meanwhile; later calls need the statistics of all.

    Args:
        asked: the request.
        data: the batches, which are read here and held.
        memory_limit: how many bytes of what lives after the first call may be kept; if it is more, nothing of it is.
    """
    arriving = prepare_batches(asked, data.sources())
    first = [*islice(arriving, 1)]
    nbytes = sum(batch.segments.bytes(0) for batch in first)
    batches: list[Batch] = []
    waiting: deque[Callable[[], None]] = deque()
    with Lanes(lanes_for((asked.variables, [batch.closed for batch in first]), nbytes), tracing_options) as lanes:
        begin = _Begin(asked, memory_limit, threads=lanes.number > 1)
        for lane, batch in zip(cycle(range(lanes.number)), chain(first, arriving)):
            batches.append(batch)
            begin.make_room(batches)
            if not batch.segments.segments[0].has_run:
                begin(batch)  # compiles, here: each thread would do so by itself
                continue
            waiting.append(lanes.start(lane, begin, batch))
            if len(waiting) > lanes.number:
                waiting.popleft()()
        while waiting:
            waiting.popleft()()
    return batches


class _Begin:
    """Gets a batch to the input of the first call.

    Args:
        threads: whether several do: each waits for what it started, so that the others are not held up.
    """

    def __init__(self, asked: Request, memory_limit: int | None, *, threads: bool) -> None:
        self._asked = asked
        self._limit = memory_limit
        self._threads = threads
        self._parts = shards(asked.options.sharding)
        self._kept: int | None = 0  # bytes; None where they were too many
        self._waits = not on_accelerator(asked.variables)
        self._ahead = Ahead(1 if self._waits else AHEAD_OF_ACCELERATOR)

    def make_room(self, batches: list[Batch]) -> None:
        """Lets go of all values where the last of these batches is one too many."""
        if self._kept is None:
            return
        self._kept += batches[-1].segments.bytes(1)
        if self._limit is not None and self._kept > self._limit * self._parts:
            self._kept = None
            for batch in batches:
                batch.values = None

    def __call__(self, batch: Batch) -> None:
        shared = batch.segments.shared(batch.closed, self._asked.variables)
        stage = Stage(self._asked, {batch.kind: shared}, 0, 0, self._kept is not None, self._waits)
        batch.begun = measure_batch(stage, batch)
        if self._threads:
            jax.block_until_ready(batch.begun)
        else:
            self._ahead.started(batch.begun.var)
