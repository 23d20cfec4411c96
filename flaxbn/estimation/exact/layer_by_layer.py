"""All batches in lockstep: every one up to the input of a layer, and on with the statistics of all."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from flaxbn.arithmetic.moments import Moments, merge
from flaxbn.data.placement import on_accelerator
from flaxbn.data.processes import gather, on_all
from flaxbn.data.progress import Counter
from flaxbn.estimation.exact.stage import Batch, Measured, Stage, fetch, measure
from flaxbn.estimation.request import Request, tracing_options
from flaxbn.estimation.threads import Cores, cores_for
from flaxbn.models.batch_stats import all_entries, flat_statistics
from flaxbn.tracing.measure import replace_seen


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


def run(asked: Request, batches: Sequence[Batch], kept: Sequence[bool], counter: Counter) -> Found:
    """All batches through one call after the other, merged over processes once for each call."""
    by_kind = {batch.kind: batch for batch in batches}
    shared = {key: one.segments.shared(one.closed, asked.variables) for key, one in by_kind.items()}
    defaults = flat_statistics(asked.variables["batch_stats"], asked.layers)
    measured = []
    counter.expect(len(batches) * len(kept))
    base, waits = 0, not on_accelerator(asked.variables)
    with Cores(_cores_for(asked, batches), tracing_options) as cores:
        for call, keeps in enumerate(kept):
            stage = Stage(asked, shared, base, call, keeps, waits)
            own = _measure_everywhere(stage, batches, cores, defaults)
            measured.append(own)
            for key, one in by_kind.items():
                shared[key] |= one.segments.segments[call].statistics(*own.statistics)
            if keeps and base == 0:
                for batch in batches:
                    batch.read = _already_read
            base = call + 1 if keeps else base
            counter.add(len(batches))
    moments, bad = jax.device_get(([own.moments for own in measured], [own.bad for own in measured]))
    first_bad = [_first_bad(own.firsts, places) for own, places in zip(measured, bad)]
    return Found(moments, [own.statistics for own in measured], first_bad)


def _first_bad(firsts: Sequence[int], places: Sequence[Any]) -> int:
    """The number of the first batch whose moments are not finite, or -1."""
    return next((first + int(place) for first, place in zip(firsts, places) if np.isfinite(place)), -1)


def _cores_for(asked: Request, batches: Sequence[Batch]) -> int:
    largest = sum(max(map(batch.segments.bytes, range(len(batch.segments.layers)))) for batch in batches)
    arguments = asked.variables, [batch.closed for batch in batches]
    return cores_for(arguments, len(batches), largest)


def moments_with(asked: Request, batch: Batch, statistics: Sequence[tuple[Array, Array]]) -> list[Moments]:
    """The moments of each call's input in one batch, where the calls let these statistics through."""
    shared = batch.segments.shared(batch.closed, asked.variables)
    values = fetch(asked, batch)
    found = []
    for segment, given in zip(batch.segments.segments, statistics, strict=True):
        moments, made = segment.measure(values, shared, {}, batch.weights)
        values = {v: a for v, a in values.items() if v not in segment.dead} | made
        shared |= segment.statistics(*given)
        found.append(moments)
    return found


def _already_read() -> Any:
    raise AssertionError("a batch is read again only where nothing of it is kept")


def _measure_everywhere(
    stage: Stage, batches: Sequence[Batch], cores: Cores, defaults: tuple[np.ndarray, np.ndarray]
) -> Measured:
    """What one stage finds: the moments merged over processes, some of which may have no data; bad batches are own."""
    entries = batches[0].segments.entries[stage.call] if batches else all_entries(stage.asked.layers)
    stored_mean, stored_var = (a[entries - 1] for a in defaults)

    def here() -> Measured:
        # In one array with the means of complex layers those of real ones became complex.
        own_mean = stored_mean if batches[0].segments.calls.is_complex[stage.call] else stored_mean.real
        return measure(stage, batches, (own_mean, stored_var), cores)

    if jax.process_count() == 1:
        return here()

    def by_entry() -> Measured:
        default_mean, default_var = defaults
        fields = [np.zeros_like(a) for a in (default_var, default_mean, default_var)]
        own = here() if batches else None
        if own is not None:
            for field, values in zip(fields, jax.device_get(own.moments)):
                field[entries - 1] = values
        firsts, bad = ([], []) if own is None else (own.firsts, own.bad)
        return Measured(Moments(*fields), (stored_mean, stored_var), firsts, bad)  # type: ignore[arg-type]

    own = on_all(by_entry)
    everywhere = merge(*gather(own.moments))
    moments = Moments(*(field[entries - 1] for field in everywhere))
    return own._replace(moments=moments, statistics=replace_seen(stored_mean, stored_var, moments))
