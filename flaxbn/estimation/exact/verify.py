"""How exact statistics check themselves: with them, an example must give the same whatever else is in the batch.

First by batches of one shape in which examples have other neighbours: on a CPU by what is compiled already, beside what
the run has found of the batch; on an accelerator by one more program, of a few examples. That cannot show a model that
computes with the size of the batch; for one whose program does, parts of the batch must give the moments of the whole.
"""

import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from flaxbn.arithmetic.measure import Measured
from flaxbn.arithmetic.moments import Moments, merge
from flaxbn.data.batches import abstract
from flaxbn.data.placement import get_together, on_accelerator, replicated
from flaxbn.data.samples import count_samples
from flaxbn.estimation.calls import Closed, LayerCalls, traced
from flaxbn.estimation.compiled import Layout, shapes_of
from flaxbn.estimation.exact.layer_by_layer import Found, moments_with
from flaxbn.estimation.exact.segments import Values
from flaxbn.estimation.exact.stage import Batch, fetch
from flaxbn.estimation.joined import Packed, Pending, Record, fetched, join, merge_joined
from flaxbn.estimation.request import Request, tracing_options
from flaxbn.estimation.reuse import Compiled
from flaxbn.estimation.threads import Cores
from flaxbn.models.independence import check_parts, split
from flaxbn.tracing.flatten import unroll
from flaxbn.tracing.jaxpr import content
from flaxbn.tracing.measure import measure_tap, stored_statistics
from flaxbn.tracing.primitive import Tap
from flaxbn.tracing.sizes import beside_shapes

_ENOUGH = 128  # examples; an accelerator takes pieces of the data that are too large to run three more of them


@dataclass
class IndependenceCheck:
    """That examples do not affect each other, where the statistics found are let through.

    Attributes:
        asked: the request.
        batches: one batch that can be cut, or two of one example each that can be joined. They hold their data
            themselves, whatever a run has read and let go of, and nothing that was computed of it.
    """

    asked: Request
    batches: tuple[Batch, ...]

    @classmethod
    def of(cls, asked: Request, batches: Sequence[Batch]) -> "IndependenceCheck | None":
        """A check by the first batches that can tell; None without such, or where random numbers differ by batch.

        Warns:
            UserWarning: where no batch has an axis of samples, along which it could be cut.
        """
        if not batches or batches[0].segments.uses_keys:
            return None
        if all(batch.size is None for batch in batches):
            warnings.warn(
                "Whether examples affect each other could not be checked: the arrays of a batch share no axis of "
                "samples along which to cut it. Exact statistics are right if they do not; pass "
                "`check_independence=False` to say so.",
                stacklevel=2,
            )
            return None
        single: dict[int, Batch] = {}
        for batch in (batch for batch in batches if batch.size is not None):
            if _has_weight(asked, batch):
                if batch.size != 1:
                    return cls(asked, (_unread(batch),))
                if id(batch.segments) in single:
                    return cls(asked, (_unread(single[id(batch.segments)]), _unread(batch)))
                single[id(batch.segments)] = batch
        return None

    @property
    def watched(self) -> int | None:
        """The place of the batch whose own moments a run is to give; None where they are not compared."""
        if len(self.batches) > 1 or on_accelerator(self.asked.variables):
            return None
        return self.batches[0].number

    def start(self, run: Found) -> Callable[[Sequence[Any]], None]:
        """Begins with what an accelerator can do while nobody waits for it.

        Args:
            run: what was found, maybe not computed yet.

        Returns:
            What is to be given the population's variances, and raises unless moments agree in units of these.
        """
        if len(self.batches) > 1:
            return partial(self._compare_parts, run.statistics)
        (batch,) = self.batches
        double = self._start_doubled if self.watched is None else self._doubled
        doubled = double(batch, run)

        def compare(variances: Sequence[Any]) -> None:
            whole, again = doubled()
            self._compare(whole, again, variances)
            if _reads_size(self.asked, batch):
                self._compare_parts(run.statistics, variances)

        return compare

    def _compare_parts(self, statistics: Any, variances: Sequence[Any]) -> None:
        """Batches of other shapes: parts of the one there is, or the whole that several make."""
        cut = [batch.read() for batch in self.batches]
        if len(cut) == 1:
            (arrays,), parts = cut, split(count_samples(cut[0]))
            cut = [_rows(arrays, part) for part in parts]
        else:
            leaves = map(jnp.concatenate, zip(*map(jax.tree.leaves, cut)))
            arrays, parts = jax.tree.unflatten(jax.tree.structure(cut[0]), leaves), (np.array([0]), np.array([1]))
        with jax.default_matmul_precision("highest"):  # a product of other shapes is rounded otherwise
            weights = self._weights()
            of_parts = [None if weights is None else weights[part] for part in parts]
            whole = self._run(_Parts, [arrays], [weights], statistics)
            again = self._run(_Parts, cut, of_parts, statistics)
            whole, again = get_together((whole, again))
            self._compare(whole, again, variances)

    def _doubled(self, batch: Batch, run: Found) -> Callable[[], tuple[list[Moments], list[Moments]]]:
        """The moments of a batch, and those of its one half twice and its other half twice, merged.

        All are batches of one shape, so nothing is rounded otherwise, and on a CPU nothing new is compiled. Each
        example stands beside its double, so no neighbour, group or place is the one that it has in the batch.
        """

        def found() -> tuple[list[Moments], list[Moments]]:
            self._weights()  # without which none of some rows are known
            arrays = batch.read()
            _, *doubled = _doubled_rows(count_samples(arrays))
            with Cores(min(run.cores, len(doubled)), tracing_options) as cores:
                halves = cores.each(partial(self._of_rows, batch, arrays, run.shared[batch.kind]), doubled)
            return run.watched, merge(*jax.device_get(halves))

        return found

    def _start_doubled(self, batch: Batch, run: Found) -> Callable[[], tuple[list[Moments], list[Moments]]]:
        """The same of its first examples, by one program that is started here, on an accelerator.

        Of all where the first ones have no weight: what nothing is measured of shows nothing.
        """
        weights = self._weights()
        tells = weights is None or np.any(np.asarray(weights[:_ENOUGH]) > 0)
        arrays = batch.read(_ENOUGH if tells else None)
        weights = None if weights is None else weights[: count_samples(arrays)]
        packed = self._run(_Doubled, [arrays], [weights], run.statistics)
        entries, is_complex = batch.segments.entries, batch.segments.calls.is_complex

        def found() -> tuple[list[Moments], list[Moments]]:
            whole, doubled = fetched([Pending(entries, (), one, is_complex) for one in packed])
            return whole.moments, doubled.moments

        return found

    def _of_rows(self, batch: Batch, arrays: Any, shared: Values, rows: np.ndarray) -> list[Moments]:
        own = replace(_unread(batch), read=partial(_rows, arrays, rows), weights=_at(batch.weights, rows))
        return moments_with(self.asked, own, shared)

    def _compare(self, whole: Sequence[Moments], parts: Sequence[Moments], variances: Sequence[Any]) -> None:
        segments = self.batches[0].segments
        dtypes = [eqn.invars[0].aval.dtype for eqn in segments.taps]
        check_parts(segments.layers, list(zip(whole, dtypes)), list(zip(parts, dtypes)), variances)

    def _weights(self) -> Array | None:
        """The weights of all examples, of one batch after the other, without padding."""
        if self.asked.options.sample_weight is None:
            return None
        for batch in self.batches:
            if batch.weights is None:
                fetch(self.asked, batch)
        return jnp.concatenate([jnp.asarray(batch.weights)[: batch.size] for batch in self.batches])

    def _run(self, make: Any, parts: Sequence[Any], weights: Sequence[Array | None], statistics: Any) -> Any:
        """What a pass with the statistics found gives for some samples in parts."""
        asked = self.asked
        options = asked.options._replace(tracing=tracing_options())
        parts = jax.tree.map(jnp.asarray, parts)
        if asked.options.sharding is not None:
            parts, weights = jax.device_put((parts, weights), replicated(asked.options.sharding))
        shapes = [shapes_of(asked.variables, part, asked.rngs, present=None) for part in parts]
        try:
            compiled, closed = Compiled(make, options, unroll).find(*shapes)
            leaves = [jax.tree.leaves(part) for part in parts]
            return compiled.run(closed, asked.variables, asked.rngs, leaves, weights, statistics)
        except Exception as error:
            sizes = [count_samples(part) for part in parts]
            error.add_note(
                f"raised for parts of {sizes} samples, which check that examples are independent; where a model must "
                'have whole batches, pass `check_independence=False`, or use method="precise"'
            )
            raise


def _has_weight(asked: Request, batch: Batch) -> bool:
    if asked.options.sample_weight is None:
        return True
    fetch(asked, batch)
    return bool(np.any(np.asarray(batch.weights) > 0))


def _unread(batch: Batch) -> Batch:
    """The batch as it came."""
    return replace(batch, values=None, begun=None)


def _rows(arrays: Any, rows: np.ndarray) -> Any:
    return jax.tree.map(lambda a: a[rows], arrays)


def _at(weights: Array | None, rows: np.ndarray) -> Array | None:
    """The weights of these rows, and those of the padding after them."""
    if weights is None:
        return None
    taken = np.concatenate([np.asarray(weights)[rows], weights[len(rows) :]])
    return jax.device_put(taken, weights.sharding) if weights.committed else jnp.asarray(taken)


def _reads_size(asked: Request, batch: Batch) -> bool:
    """Whether the model computes with the number of examples, which batches of one shape do not tell; found out once.

    A model that cannot be traced for one example more counts as one that does.
    """
    segments = batch.segments
    if segments.reads_size is None:
        one_more = abstract(batch.read(1), 1 + (segments.calls.samples or 0))
        shapes = shapes_of(asked.variables, one_more, asked.rngs, present=None)
        try:
            _, longer = traced(asked.options, shapes.abstract(), unroll)
        except Exception:  # whatever the model raises: what tries parts of the batch will tell
            segments.reads_size = True
            return True
        arrays = list(zip(batch.closed.model, longer.consts))
        segments.reads_size = beside_shapes(segments.calls.program.jaxpr) != beside_shapes(longer.jaxpr)
        segments.reads_size |= any(a.shape == np.shape(b) and content(a) != content(b) for a, b in arrays)
    return segments.reads_size


def _doubled_rows(samples: int) -> tuple[np.ndarray, ...]:
    """The rows of a batch, of its one half twice, and of its other half twice; an odd one at the end is in all."""
    half = samples // 2
    rest = np.arange(2 * half, samples)
    first, second = (np.concatenate([np.repeat(np.arange(i, i + half), 2), rest]) for i in (0, half))
    return np.arange(samples), first, second


class _Parts:
    """A pass of a few batches with given statistics: their merged moments."""

    def __init__(self, calls: Sequence[LayerCalls], layout: Layout) -> None:
        del layout
        self._calls = calls
        self.run = jax.jit(self._run)

    def _run(
        self, closed: Sequence[Closed], variables: Any, rngs: Any, batches: Sequence[Any], weights: Any, given: Any
    ) -> list[Moments]:
        leaves = [jax.tree.leaves((own.model, variables, batch, rngs)) for own, batch in zip(closed, batches)]
        measured = [_measured(*args, given) for args in zip(self._calls, leaves, weights, strict=True)]
        return merge(*([one.moments for one in own] for own in measured))


class _Doubled:
    """A pass of one batch with given statistics: its moments, and those of it doubled, merged; one program."""

    def __init__(self, calls: Sequence[LayerCalls], layout: Layout) -> None:
        del layout
        (self._calls,) = calls
        self.run = jax.jit(self._run)

    def _run(
        self, closed: Sequence[Closed], variables: Any, rngs: Any, batches: Sequence[Any], weights: Any, given: Any
    ) -> tuple[Packed, Packed]:
        def records_of(rows: Array) -> list[Record]:
            batch, own = jax.tree.map(lambda a: a[rows], (batches[0], weights[0]))
            leaves = jax.tree.leaves((closed[0].model, variables, batch, rngs))
            return join([Record.of(one) for one in _measured(self._calls, leaves, own, given)])

        found = jax.lax.map(records_of, np.stack(_doubled_rows(count_samples(batches[0]))))
        whole, doubled = (jax.tree.map(operator.itemgetter(part), found) for part in (slice(1), slice(1, None)))
        return merge_joined(whole, by_device=False), merge_joined(doubled, by_device=False)


def _measured(calls: LayerCalls, leaves: Sequence[Any], weights: Array | None, given: Sequence[Any]) -> list[Measured]:
    statistics = dict(zip(calls.entries, given, strict=True))

    def on_tap(tap: Tap) -> tuple[Array, Array, Measured | None]:
        if tap.site not in statistics:
            return stored_statistics(tap)
        mean, var = statistics[tap.site]
        let_through = jnp.asarray(mean, tap.mean.dtype), jnp.asarray(var, tap.var.dtype)
        return *let_through, measure_tap(tap, calls.weights(tap, weights))

    _, records = calls.program.run(leaves, on_tap)
    return [record for record in records if record is not None]
