"""Batches of a stream: what can be computed of one alone is, while the next is read."""

from collections.abc import Iterator
from itertools import chain, islice

from flaxbn.data.batches import Stream
from flaxbn.data.placement import on_accelerator, shards
from flaxbn.estimation.chunks import Ahead
from flaxbn.estimation.exact.plan import memory_limit_of
from flaxbn.estimation.exact.prepare import prepare_batches
from flaxbn.estimation.exact.segments import Values
from flaxbn.estimation.exact.stage import AHEAD, AHEAD_OF_ACCELERATOR, Batch, Stage, measure_batch
from flaxbn.estimation.request import Request, tracing_options
from flaxbn.estimation.threads import Lanes, lanes_for


def prepare_arriving(asked: Request, data: Stream, memory_limit: int | None) -> tuple[list[Batch], int]:
    """All batches, each at the input of the first call: later ones need the statistics of all.

    Args:
        asked: the request.
        data: the batches, which are read here and held.
        memory_limit: how many bytes of what lives after the first call may be kept; if it is more, nothing of it is.

    Returns:
        The batches, and how many bytes are kept on each device.
    """
    arriving = prepare_batches(asked, data.sources())
    first = [*islice(arriving, 1)]
    if not (first and first[0].segments.segments):
        return [*first, *arriving], 0
    batches: list[Batch] = []
    begin = _Begin(asked, memory_limit)

    def arrived() -> Iterator[Batch]:
        for batch in chain(first, arriving):
            batches.append(batch)
            begin.make_room(batches)
            yield batch

    cores = lanes_for((asked.variables, first[0].closed), first[0].segments.bytes(0))
    with Lanes(cores, tracing_options) as lanes:
        ahead = [Ahead(begin.most_ahead) for _ in range(lanes.number)]
        for _ in lanes.each(lambda lane, batch: begin(batch, ahead[lane]), arrived(), _is_for_a_thread):
            pass
    return batches, begin.held


def _is_for_a_thread(batch: Batch) -> bool:
    """Not what is compiled yet, which each thread would do by itself, nor what asks the host."""
    return batch.segments.segments[0].has_run and not batch.segments.asks_host


class _Begin:
    """Gets batches to the input of the first call, and keeps what lives then, as long as there is room.

    Attributes:
        held: how many bytes are kept on each device.
        most_ahead: how far each thread may run ahead of the device.
    """

    def __init__(self, asked: Request, memory_limit: int | None) -> None:
        self.held = 0
        self._asked = asked
        self._limit = memory_limit
        self._keeps = True
        self._waits = not on_accelerator(asked.variables)
        self.most_ahead = AHEAD if self._waits else AHEAD_OF_ACCELERATOR
        self._shared: dict[tuple[int, int], Values] = {}

    def make_room(self, batches: list[Batch]) -> None:
        """Lets go of all values where the last of these batches is one too many, and keeps none from then on."""
        *_, last = batches
        if last.kind not in self._shared:
            self._shared[last.kind] = last.segments.shared(last.closed, self._asked.variables)
        if not self._keeps:
            return
        limit = memory_limit_of(self._asked, self._limit, self.held)
        self.held += -(-last.segments.bytes(1) // shards(self._asked.options.sharding))
        if limit is not None and self.held > limit:
            self._keeps, self.held = False, 0
            for batch in batches:
                batch.values = None

    def __call__(self, batch: Batch, ahead: Ahead) -> None:
        """Gets a batch there."""
        stage = Stage(self._asked, self._shared, 0, 0, self._keeps, self._waits)
        batch.begun = measure_batch(stage, batch)
        ahead.started(batch.begun.var)
