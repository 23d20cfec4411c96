"""All batches in lockstep: every one up to the input of a layer, and on with the statistics of all."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from flaxbn.arithmetic.moments import Moments, merge
from flaxbn.arithmetic.pivot import is_on_host
from flaxbn.data.placement import on_accelerator
from flaxbn.data.processes import gather, on_all
from flaxbn.estimation.exact.stage import Batch, Measured, Stage, fetch, measure
from flaxbn.estimation.request import Request, tracing_options
from flaxbn.estimation.threads import Cores, cores_for
from flaxbn.models.batch_stats import all_entries, flat_statistics
from flaxbn.tracing.measure import replace_seen

_replace_seen_on_device = jax.jit(replace_seen)


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


def run(asked: Request, batches: Sequence[Batch], kept: Sequence[bool]) -> Found:
    """All batches through one call after the other, merged over processes once for each call."""
    by_segments = {id(batch.segments): batch for batch in batches}
    shared = {key: one.segments.shared(one.closed, asked.variables) for key, one in by_segments.items()}
    defaults = flat_statistics(asked.variables["batch_stats"], asked.layers)
    moments, statistics, measured = [], [], []
    base, waits = 0, not on_accelerator(asked.variables)
    with Cores(_cores_for(asked, batches), tracing_options) as cores:
        for call, keeps in enumerate(kept):
            entries = batches[0].segments.entries[call] if batches else all_entries(asked.layers)
            stage = Stage(asked, shared, base, call, keeps, waits)
            merged, own = _measure_everywhere(stage, batches, cores, entries, defaults)
            stored_mean, stored_var = (a[entries - 1] for a in defaults)
            if not np.iscomplexobj(merged.mean):
                stored_mean = stored_mean.real  # in one array with the means of complex layers it became complex
            replace = replace_seen if is_on_host(merged.count) else _replace_seen_on_device
            mean, var = replace(stored_mean, stored_var, merged)
            moments.append(merged)
            statistics.append((mean, var))
            measured.append(own)
            for key, one in by_segments.items():
                shared[key] |= one.segments.segments[call].statistics(mean, var)
            if keeps and base == 0:
                for batch in batches:
                    batch.read = _already_read
            base = call + 1 if keeps else base
    return Found(moments, statistics, _first_bad(measured))


def _first_bad(measured: Sequence[Measured | None]) -> list[int]:
    """For each call the first batch whose moments are not finite, or -1; waits for the device, once."""
    places = jax.device_get([[] if own is None else own.bad for own in measured])
    found = [zip([] if own is None else own.firsts, bad) for own, bad in zip(measured, places)]
    return [next((first + int(place) for first, place in own if place >= 0), -1) for own in found]


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
    stage: Stage, batches: Sequence[Batch], cores: Cores, entries: np.ndarray, defaults: tuple[np.ndarray, np.ndarray]
) -> tuple[Moments, Measured | None]:
    """The moments of one call, merged over processes, some of which may have no data; and what was measured here."""
    if jax.process_count() == 1:
        measured = measure(stage, batches, cores)
        return measured.moments, measured

    def by_entry() -> tuple[Moments, Measured | None]:
        default_mean, default_var = defaults
        fields = [np.zeros_like(a) for a in (default_var, default_mean, default_var)]
        measured = measure(stage, batches, cores) if batches else None
        if measured is not None:
            for field, values in zip(fields, jax.device_get(measured.moments)):
                field[entries - 1] = values
        return Moments(*fields), measured  # type: ignore[arg-type]

    moments, own = on_all(by_entry)
    everywhere = merge(*gather(moments))
    return Moments(*(field[entries - 1] for field in everywhere)), own
