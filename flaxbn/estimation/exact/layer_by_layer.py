"""All batches in lockstep: every one up to the input of a layer, and on with the statistics of all."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from flaxbn.arithmetic.moments import Moments, merge
from flaxbn.data.placement import get_together, on_accelerator, on_device, place
from flaxbn.data.processes import gather, on_all
from flaxbn.data.progress import Counter
from flaxbn.estimation.exact.segments import Values
from flaxbn.estimation.exact.stage import Batch, Measured, Reach, Stage, fetch, measure
from flaxbn.estimation.request import Request, tracing_options
from flaxbn.estimation.threads import Cores, cores_for
from flaxbn.models.batch_stats import all_entries, flat_statistics
from flaxbn.tracing.measure import replace_seen


class Found(NamedTuple):
    """What a run ends with: on an accelerator it lies there, and may not be computed yet.

    Attributes:
        measured: for each call what its stage finds.
        shared: what holds for all batches of a kind, by `Batch.kind`, the statistics of all calls included.
        cores: how many batches ran at once.
    """

    measured: list[Measured]
    shared: dict[tuple[int, int], Values]
    cores: int

    @property
    def statistics(self) -> list[tuple[Any, Any]]:
        """The mean and variance that each call let through."""
        return [own.statistics for own in self.measured]

    @property
    def watched(self) -> list[Moments]:
        """For each call the moments of the batch that was watched."""
        return [own.watched for own in self.measured if own.watched is not None]

    def fetched(self) -> tuple[list[Moments], list[int]]:
        """For each call the moments of all batches, and the first batch whose moments are not finite, or -1.

        In host memory, all by one transfer.
        """
        moments, bad = get_together(([own.moments for own in self.measured], [own.bad for own in self.measured]))
        return moments, [_first_bad(own.reaches, places) for own, places in zip(self.measured, bad)]


def run(
    asked: Request, batches: Sequence[Batch], kept: Sequence[bool], counter: Counter, *, watched: int | None = None
) -> Found:
    """All batches through one call after the other, merged over processes once for each call.

    Args:
        asked: the request.
        batches: those of this process, none of which has been read.
        kept: for each call whether what lives after it is kept; else it is computed again from the last that is.
        counter: is told of every batch of every call.
        watched: the place of a batch whose own moments are wanted, too; only where the host waits.
    """
    by_kind = {batch.kind: batch for batch in batches}
    shared = {key: one.segments.shared(one.closed, asked.variables) for key, one in by_kind.items()}
    waits = not on_accelerator(asked.variables)
    defaults = flat_statistics(asked.variables["batch_stats"], asked.layers)
    stored = _stored(asked, batches, defaults, waits=waits)
    if not waits and all(kept):
        _compile_ahead(asked, by_kind.values())
    measured = []
    counter.expect(len(batches) * len(kept))
    base = 0
    with Cores(_cores_for(asked, batches), tracing_options) as cores:
        for call, keeps in enumerate(kept):
            stage = Stage(asked, shared, base, call, keeps, waits, watched)
            own = _measure_everywhere(stage, batches, cores, defaults, stored)
            measured.append(own)
            for key, one in by_kind.items():
                shared[key] |= one.segments.segments[call].statistics(*own.statistics)
            if keeps and base == 0:
                for batch in batches:
                    batch.read = _already_read
            base = call + 1 if keeps else base
            counter.add(len(batches))
        return Found(measured, shared, cores.number)


def _compile_ahead(asked: Request, kinds: Iterable[Batch]) -> None:
    """Where all lies on one device; where arrays lie otherwise, and where there are weights, each call compiles."""
    arrays = jax.tree.leaves(asked.variables)
    devices = set().union(*(a.devices() for a in arrays))
    if len(devices) == 1:
        for one in kinds:
            if not one.segments.is_weighted:
                one.segments.compile_ahead(SingleDeviceSharding(*devices), begin=int(one.begun is not None))


def _first_bad(reaches: Sequence[Reach], places: Sequence[Any]) -> int:
    """The number of the first batch whose moments are not finite, or -1."""
    bad = (reach.first + reach.each * int(place) for reach, place in zip(reaches, places) if np.isfinite(place))
    return next(bad, -1)


def _cores_for(asked: Request, batches: Sequence[Batch]) -> int:
    largest = sum(max(map(batch.segments.bytes, range(len(batch.segments.layers)))) for batch in batches)
    arguments = asked.variables, [batch.closed for batch in batches]
    return 1 if any(batch.segments.asks_host for batch in batches) else cores_for(arguments, len(batches), largest)


def moments_with(asked: Request, batch: Batch, shared: Values) -> list[Moments]:
    """The moments of each call's input in one batch, with what a run found for all of its kind."""
    values = fetch(asked, batch)
    found = []
    for segment in batch.segments.segments:
        moments, made = segment.measure(values, shared, {}, batch.weights)
        values = {v: a for v, a in values.items() if v not in segment.dead} | made
        found.append(moments)
    return found


def _already_read() -> Any:
    raise AssertionError("a batch is read again only where nothing of it is kept")


def _stored(asked: Request, batches: Sequence[Batch], defaults: tuple[np.ndarray, np.ndarray], *, waits: bool) -> Any:
    """What each call lets through where there is no data; on an accelerator all of it is put there at once."""
    if not batches:
        return []
    whole = batches[0].segments
    mean, var = defaults
    # In one array with the means of complex layers those of real ones became complex.
    means = [mean[e - 1] if own else mean[e - 1].real for e, own in zip(whole.entries, whole.calls.is_complex)]
    stored = [*zip(means, (var[e - 1] for e in whole.entries))]
    if waits:
        return stored
    return on_device(stored) if asked.options.sharding is None else place(stored, asked.options.sharding)


def _measure_everywhere(
    stage: Stage, batches: Sequence[Batch], cores: Cores, defaults: tuple[np.ndarray, np.ndarray], stored: Any
) -> Measured:
    """What one stage finds: the moments merged over processes, some of which may have no data; bad batches are own."""

    def here() -> Measured:
        return measure(stage, batches, stored[stage.call], cores)

    if jax.process_count() == 1:
        return here()
    entries = batches[0].segments.entries[stage.call] if batches else all_entries(stage.asked.layers)
    stored_mean, stored_var = (a[entries - 1] for a in defaults)

    def by_entry() -> Measured:
        default_mean, default_var = defaults
        fields = [np.zeros_like(a) for a in (default_var, default_mean, default_var)]
        own = here() if batches else None
        if own is not None:
            for field, values in zip(fields, jax.device_get(own.moments)):
                field[entries - 1] = values
        reaches, bad, watched = ([], [], None) if own is None else (own.reaches, own.bad, own.watched)
        return Measured(Moments(*fields), (stored_mean, stored_var), reaches, bad, watched)  # type: ignore[arg-type]

    own = on_all(by_entry)
    everywhere = merge(*gather(own.moments))
    moments = Moments(*(field[entries - 1] for field in everywhere))
    return own._replace(moments=moments, statistics=replace_seen(stored_mean, stored_var, moments))
