"""One step of a run: all batches get to the input of one call, and are measured there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from flaxbn.arithmetic.moments import Moments, merge_along
from flaxbn.data.placement import placed
from flaxbn.estimation.calls import Closed
from flaxbn.estimation.chunks import Ahead
from flaxbn.estimation.exact.segments import Segments, Values
from flaxbn.estimation.joined import first_not_finite
from flaxbn.estimation.request import Request
from flaxbn.estimation.threads import Cores
from flaxbn.models.keys import fold_in
from flaxbn.tracing.measure import replace_seen

AHEAD = 1  # on a CPU, fresh memory for what is kept costs more than waiting does; further ahead it piles up
AHEAD_OF_ACCELERATOR = 8  # while batches are read: what is on its way to the device is held by the host

_TOGETHER = 64  # moments are merged by so many on a device: as arguments of one program


@dataclass
class Batch:
    """One batch on its way.

    Attributes:
        number: its place in the data, from 0.
        size: its samples, without padding; None where its arrays share no axis of samples.
        read: gives its arrays, or with a number at most so many of their samples.
        segments: what runs it.
        closed: the arrays that these take besides.
        values: what is kept of it at the last kept boundary; None where that is the data.
        weights: the weights of its samples, once it has been read.
        begun: the moments of the first call's input, where they were taken while others were read.
    """

    number: int
    size: int | None
    read: Callable[..., Any]
    segments: Segments
    closed: Closed
    values: Values | None = None
    weights: Array | None = None
    begun: Moments | None = None

    @property
    def kind(self) -> tuple[int, int]:
        """Equal for batches that share what is no part of a batch: the segments, and the arrays that these take."""
        return id(self.segments), id(self.closed)


class Stage(NamedTuple):
    """The step of a run in which all batches get to the input of one call.

    Attributes:
        asked: the request.
        shared: what holds for all batches of a kind, by `Batch.kind`.
        base: the call from whose boundary batches start: what lives there is kept, or it is the data.
        call: the call whose input is measured.
        keeps: whether what lives after it is kept.
        waits: whether the host waits for what it has started, so that memory does not pile up. That of an accelerator
            is taken and freed in the order in which work is started: there nothing needs to wait.
        watched: the place of a batch whose own moments are wanted, or None.
    """

    asked: Request
    shared: Mapping[tuple[int, int], Values]
    base: int
    call: int
    keeps: bool
    waits: bool
    watched: int | None = None


class Reach(NamedTuple):
    """The batches that moments which are merged with each other come from.

    Attributes:
        first: the number of the first batch.
        each: from how many batches each of the moments is.
    """

    first: int
    each: int


class Measured(NamedTuple):
    """What a stage finds: where the host waits it is there, and otherwise on a device, maybe not computed yet.

    Attributes:
        moments: those of the call's input in all batches.
        statistics: the mean and variance that the call then lets through.
        reaches: for each merge, those of batches before those of what these gave, what was merged.
        bad: for each merge, the place in it of the first moments that are not finite, or infinity.
        watched: those of one batch, where the host waits and it was asked for.
    """

    moments: Moments
    statistics: tuple[Any, Any]
    reaches: list[Reach]
    bad: list[Any]
    watched: Moments | None = None


def measure(stage: Stage, batches: Sequence[Batch], stored: tuple[Any, Any], cores: Cores) -> Measured:
    """The merged moments of one call's input in all batches, which are taken in parts for the cores.

    Args:
        stage: the step.
        batches: all batches.
        stored: the mean and variance that the call lets through where there is no data.
        cores: where they run.
    """
    cuts = [len(batches) * i // cores.number for i in range(cores.number + 1)]
    shares = [_Share(stage, batches[a:b]) for a, b in pairwise(cuts)]
    for share in shares:
        if not batches[0].segments.segments[stage.call].has_run:
            share.advance(1)  # compiles, here: each thread would do so by itself
    moments = [one for share in cores.each(_Share.advance, shares) for one in share]
    if stage.waits:
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is looked for
            moments = [_on_host(m) for m in moments]
            merged, bad, statistics = _finish(moments, stored, np)
        watched = None if stage.watched is None else moments[stage.watched]
        return Measured(merged, statistics, [Reach(batches[0].number, 1)], [bad], watched)
    reaches: list[Reach] = []
    bads: list[Any] = []
    batches_each = 1
    while len(moments) > _TOGETHER:
        begins = range(0, len(moments), _TOGETHER)
        chunks = [_merge_on_device(moments[i : i + _TOGETHER]) for i in begins]
        reaches += [Reach(batches[i * batches_each].number, batches_each) for i in begins]
        bads += [bad for _, bad in chunks]
        moments = [merged for merged, _ in chunks]
        batches_each *= _TOGETHER
    dtypes = batches[0].segments.segments[stage.call].dtypes
    merged, bad, statistics = _finish_on_device(moments, stored, dtypes)
    return Measured(merged, statistics, [*reaches, Reach(batches[0].number, batches_each)], [*bads, bad])


def _merge_stacked(moments: Sequence[Moments], xp: Any) -> tuple[Moments, Any]:
    """Moments merged, and the place of the first of them that are not finite, or infinity."""
    stacked = Moments(*(xp.stack(fields) for fields in zip(*moments)))
    merged = merge_along(stacked)
    return merged, xp.min(first_not_finite(stacked, merged, xp), initial=xp.inf)


def _finish(moments: Sequence[Moments], stored: tuple[Any, Any], xp: Any) -> tuple[Moments, Any, tuple[Any, Any]]:
    merged, bad = _merge_stacked(moments, xp)
    return merged, bad, replace_seen(*stored, merged)


_merge_on_device = jax.jit(partial(_merge_stacked, xp=jnp))


@partial(jax.jit, static_argnums=2)
def _finish_on_device(
    moments: Sequence[Moments], stored: tuple[Any, Any], dtypes: tuple[Any, Any]
) -> tuple[Moments, Any, list[Any]]:
    merged, bad, statistics = _finish(moments, stored, jnp)
    return merged, bad, [a.astype(dtype) for a, dtype in zip(statistics, dtypes)]


def _on_host(moments: Moments) -> Moments:
    return Moments(*(np.asarray(f, np.result_type(f.dtype, np.float64)) for f in moments))  # type: ignore[arg-type]


class _Share:
    """Some batches, one after the other."""

    def __init__(self, stage: Stage, batches: Sequence[Batch]) -> None:
        self._stage = stage
        self._left = iter(batches)
        self._ahead = Ahead(_most_ahead(stage))
        self._moments: list[Moments] = []

    def advance(self, batches: int | None = None) -> list[Moments]:
        """Takes so many batches more, or all that are left; returns the moments of all that were taken."""
        for batch in islice(self._left, batches):
            moments = _begun(self._stage, batch)
            if moments is None:
                moments = measure_batch(self._stage, batch)
                self._ahead.started(moments.var)
            self._moments.append(moments)
        return self._moments


def _most_ahead(stage: Stage) -> int | None:
    if not stage.waits:
        return AHEAD_OF_ACCELERATOR if stage.base == 0 else None
    return AHEAD if stage.base == stage.call else 0


def _begun(stage: Stage, batch: Batch) -> Moments | None:
    """What `measure_batch` would give, where it was begun, and all that is kept is there."""
    moments, batch.begun = batch.begun, None
    if moments is not None and not stage.keeps:
        batch.values = None
    return None if stage.keeps and batch.values is None else moments


def measure_batch(stage: Stage, batch: Batch) -> Moments:
    """The moments of the call's input in one batch, which then holds what the stage keeps."""
    segment = batch.segments.segments[stage.call]
    shared = stage.shared[batch.kind]
    values = _values(stage, batch, shared)
    retained: Values = {} if stage.keeps or batch.values is None else batch.values
    if stage.keeps:
        batch.values = None  # what is not needed any more may be overwritten
    moments, made = segment.measure(values, shared, retained, batch.weights)
    if stage.keeps:
        batch.values = {v: a for v, a in values.items() if v not in segment.dead} | made
    return moments


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
    if batch.weights is None and batch.segments.is_weighted:
        batch.weights = batch.segments.sample_weights(batch.closed, jax.tree.leaves(whole), present)
    keys = fold_in(asked.rngs, batch.number)
    values = dict(zip(batch.segments.inputs, jax.tree.leaves((whole, keys))))
    return {v: values[v] for v in batch.segments.live[0]}
