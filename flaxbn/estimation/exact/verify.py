"""How exact statistics check themselves: with them, parts of a batch must give the moments of the whole."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from flaxbn.arithmetic.moments import Moments, merge
from flaxbn.data.batches import count_samples
from flaxbn.data.placement import replicated
from flaxbn.estimation.calls import Closed, LayerCalls
from flaxbn.estimation.compiled import Layout, shapes_of
from flaxbn.estimation.exact.layer_by_layer import Batch, fetch, moments_with
from flaxbn.estimation.request import Request
from flaxbn.estimation.reuse import Compiled
from flaxbn.models.independence import check_parts, split
from flaxbn.tracing.flatten import unroll
from flaxbn.tracing.measure import measure_tap, stored_statistics
from flaxbn.tracing.primitive import Tap


@jax.jit
def _merge_each(*parts: list[Moments]) -> list[Moments]:
    return merge(*parts)


@dataclass
class IndependenceCheck:
    """That examples do not affect each other: with the statistics found, parts of a batch must give its moments.

    Attributes:
        asked: the request.
        batches: one batch that can be cut, or two of one example each that can be joined. They hold their data
            themselves, whatever a run has read and let go of.
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
                    return cls(asked, (replace(batch),))
                if id(batch.segments) in single:
                    return cls(asked, (replace(single[id(batch.segments)]), replace(batch)))
                single[id(batch.segments)] = batch
        return None

    def run(self, statistics: Sequence[tuple[Array, Array]], variances: Sequence[Array]) -> None:
        """Raises unless the moments agree, in units of the population's variances."""
        seen = [moments_with(self.asked, batch, statistics) for batch in self.batches]
        if len(self.batches) == 1:
            whole, batch = seen[0], self.batches[0].read()
            rows = split(count_samples(batch))
            cut = [jax.tree.map(lambda a, part=part: a[part], batch) for part in rows]
            parts = self._moments_of(cut, [self._weights(part) for part in rows], statistics)
        else:
            first, second = (batch.read() for batch in self.batches)
            leaves = map(jnp.concatenate, zip(jax.tree.leaves(first), jax.tree.leaves(second)))
            joined = jax.tree.unflatten(jax.tree.structure(first), leaves)
            whole, parts = self._moments_of([joined], [self._weights([0])], statistics), _merge_each(*seen)
        segments = self.batches[0].segments
        dtypes = [eqn.invars[0].aval.dtype for eqn in segments.taps]
        check_parts(segments.layers, list(zip(whole, dtypes)), list(zip(parts, dtypes)), variances)

    def _weights(self, rows: Any) -> Array | None:
        if self.asked.options.sample_weight is None:
            return None
        return jnp.concatenate([jnp.asarray(batch.weights)[np.asarray(rows)] for batch in self.batches])

    def _moments_of(self, parts: Sequence[Any], weights: Sequence[Array | None], statistics: Any) -> list[Moments]:
        """The merged moments of each call's input for some samples in parts, with the statistics found."""
        asked = self.asked
        parts = jax.tree.map(jnp.asarray, parts)
        if asked.options.sharding is not None:
            parts, weights = jax.device_put((parts, weights), replicated(asked.options.sharding))
        shapes = [shapes_of(asked.variables, part, asked.rngs, present=None) for part in parts]
        try:
            compiled, closed = Compiled(_Parts, asked.options, unroll).find(*shapes)
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


class _Parts:
    """A pass of a few batches with given statistics."""

    def __init__(self, calls: Sequence[LayerCalls], layout: Layout) -> None:
        del layout
        self._calls = calls
        self.run = jax.jit(self._run)

    def _run(
        self, closed: Sequence[Closed], variables: Any, rngs: Any, batches: Sequence[Any], weights: Any, given: Any
    ) -> list[Moments]:
        leaves = [jax.tree.leaves((own.model, variables, batch, rngs)) for own, batch in zip(closed, batches)]
        measured = [_measured(*args, given) for args in zip(self._calls, leaves, weights, strict=True)]
        return merge(*measured)


def _measured(calls: LayerCalls, leaves: Sequence[Any], weights: Array | None, given: Sequence[Any]) -> list[Moments]:
    statistics = dict(zip(calls.entries, given, strict=True))

    def on_tap(tap: Tap) -> tuple[Array, Array, Moments | None]:
        if tap.site not in statistics:
            return stored_statistics(tap)
        return *statistics[tap.site], measure_tap(tap, calls.weights(tap, weights)).moments

    _, records = calls.program.run(leaves, on_tap)
    return [record for record in records if record is not None]
