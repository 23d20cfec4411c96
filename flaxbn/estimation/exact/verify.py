"""How exact statistics check themselves: with them, parts of a batch must give the moments of the whole."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from flaxbn.arithmetic.moments import Moments, merge
from flaxbn.data.batches import count_samples
from flaxbn.data.placement import replicated
from flaxbn.estimation.calls import Sites, find_sites
from flaxbn.estimation.compiled import Compiled, Setting, Shapes, shapes_of
from flaxbn.estimation.exact.layer_by_layer import Batch, Found, fetch
from flaxbn.estimation.request import Request
from flaxbn.models.independence import check_parts, split
from flaxbn.tracing.flatten import unroll
from flaxbn.tracing.measure import measure_tap, stored_statistics
from flaxbn.tracing.primitive import Tap


@jax.jit
def _merge_each(*parts: list[Moments]) -> list[Moments]:
    return merge(*parts)


def choose_watched(asked: Request, batches: Sequence[Batch]) -> list[int]:
    """The batches to check independence by: the first one with weight that can be cut, or else two to be joined."""
    single: dict[int, int] = {}
    for batch in batches:
        if _has_weight(asked, batch):
            if batch.size > 1:
                return [batch.number]
            if id(batch.segments) in single:
                return [single[id(batch.segments)], batch.number]
            single[id(batch.segments)] = batch.number
    return []


def _has_weight(asked: Request, batch: Batch) -> bool:
    if asked.setting.sample_weight is None:
        return True
    fetch(asked, batch)
    return bool(np.any(np.asarray(batch.weights) > 0))


def check_independence(asked: Request, batches: Sequence[Batch], found: Found) -> None:
    """Raises unless the watched batch, in parts, or the two watched ones, joined, give the moments that were found."""
    first = batches[0]
    layers = first.segments.layers
    dtypes = [eqn.invars[0].aval.dtype for eqn in first.segments.taps]
    seen = [list(moments) for moments in zip(*found.watched)]
    if len(batches) == 1:
        whole, batch = seen[0], first.fetch()
        rows = split(first.size)
        cut = [jax.tree.map(lambda a, part=part: a[part], batch) for part in rows]
        parts = _probe(asked, cut, [_weights_of(asked, batches, part) for part in rows], found)
    else:
        batch = jax.tree.map(lambda *a: jnp.concatenate(a), *(batch.fetch() for batch in batches))
        whole, parts = _probe(asked, [batch], [_weights_of(asked, batches, [0])], found), _merge_each(*seen)
    variances = [moments.var for moments in found.moments]
    check_parts(layers, list(zip(whole, dtypes)), list(zip(parts, dtypes)), variances)


def _weights_of(asked: Request, batches: Sequence[Batch], rows: Any) -> Array | None:
    if asked.setting.sample_weight is None:
        return None
    return jnp.concatenate([jnp.asarray(batch.weights)[np.asarray(rows)] for batch in batches])


def _probe(asked: Request, parts: Sequence[Any], weights: Sequence[Array | None], found: Found) -> list[Moments]:
    """The merged moments of each call's input for some samples in parts, with the statistics found."""
    sharding = asked.setting.sharding
    parts = jax.tree.map(jnp.asarray, parts)
    if sharding is not None:
        parts, weights = jax.device_put((parts, weights), replicated(sharding))
    shapes = tuple(shapes_of(asked.variables, part, asked.rngs, present=None) for part in parts)
    try:
        probe = Compiled(_Probe, asked.setting)[shapes]
        return probe.run(asked.variables, asked.rngs, parts, weights, found.statistics)
    except Exception as error:
        sizes = [count_samples(part) for part in parts]
        error.add_note(
            f"raised for parts of {sizes} samples, which check that examples are independent; where a model must have "
            'whole batches, use method="precise"'
        )
        raise


class _Probe:
    """A pass of a few batches with given statistics."""

    def __init__(self, setting: Setting, shapes: Sequence[Shapes]) -> None:
        self._sites = [find_sites(setting, shape, unroll) for shape in shapes]
        self.run = jax.jit(self._run)

    def _run(self, variables: Any, rngs: Any, batches: Sequence[Any], weights: Any, given: Any) -> list[Moments]:
        leaves = [jax.tree.leaves((variables, batch, rngs)) for batch in batches]
        measured = [_measured(*args, given) for args in zip(self._sites, leaves, weights, strict=True)]
        return merge(*measured)


def _measured(sites: Sites, leaves: Sequence[Any], weights: Array | None, given: Sequence[Any]) -> list[Moments]:
    statistics = dict(zip(sites.entries, given, strict=True))

    def on_tap(tap: Tap) -> tuple[Array, Array, Moments | None]:
        if tap.site not in statistics:
            return stored_statistics(tap)
        return *statistics[tap.site], measure_tap(tap, sites.weights(tap, weights))

    _, records = sites.program.run(leaves, on_tap)
    return [record for record in records if record is not None]
