"""The statistics of the whole set as one batch: all batches go through one layer after the other.

Every batch is taken up to the input of a layer, the moments of all batches are merged, and every batch goes on with
the merged statistics. That is the limit of precise statistics as the batch grows to the whole set, in one forward pass.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from flaxbn import batches as data
from flaxbn import mesh, stored
from flaxbn.independence import check_parts, split
from flaxbn.moments import Moments, merge
from flaxbn.observe import Call
from flaxbn.planning import Plan, make_plan
from flaxbn.readers import measure_tap, replace_seen, stored_statistics
from flaxbn.request import Request, request
from flaxbn.results import Result, merge_steps, merged
from flaxbn.segments import Segments, Values
from flaxbn.setting import Compiled, Setting, Shapes, shapes_of
from flaxbn.sites import Sites, find_sites
from flaxbn.tap import Tap
from flaxbn.unroll import unroll

_AHEAD = 2

_merge_steps = jax.jit(merge_steps)


@jax.jit
def _finish(chunks: Sequence[Any], mean: Array, var: Array) -> tuple[Moments, list[Array], Array, Array]:
    """The moments of all chunks, where each is not finite, and the statistics that a call lets through."""
    merged_moments = merge(*(moments for (moments,), _ in chunks))
    return merged_moments, [bad for _, (bad,) in chunks], *replace_seen(mean, var, merged_moments)


@jax.jit
def _merge_each(*parts: list[Moments]) -> list[Moments]:
    return merge(*parts)


def plan(
    model: nn.Module,
    variables: Mapping[str, Any],
    batches: Any,
    *,
    call: Call | None = None,
    batch_size: int | None = None,
    num_samples: int | None = None,
    sample_weight: Callable[[Any], Array] | None = None,
    only: Callable[[str], bool] | None = None,
    memory_limit: int | None = None,
    sharding: NamedSharding | None = None,
    rngs: Mapping[str, Array] | None = None,
) -> Plan:
    """What `estimate_population_stats(..., method="exact")` will keep and compute, before any data is read.

    The arguments are those of the estimate, which raises the same errors about the model. Values that later layers
    need are kept, of all batches, where they fit `memory_limit`; where they do not, later layers compute them again
    from the last place where they did.

    Args:
        batches: with `batch_size`, a pytree of arrays; otherwise a list of batches, or an iterable with a length, of
            which the first batch is read and the others are taken to be like it.
        memory_limit: how many bytes of these values each device may keep; by default half of its free memory where
            the device tells it, and any number elsewhere (on CPUs).

    Returns:
        The plan; `print` shows it as a table.

    Raises:
        TypeError: if `batches` is an iterator, whose length is not known; or as the estimate.
        ValueError: if the model has no batch-norm layer, or one inside a `while` loop, inside a `cond` that data or
            variables decide, or inside `shard_map`; more than 512 calls; with weights, an unknown batch axis.
    """
    data.check_arrays(batches, batch_size)
    data.check_positive("batch_size", batch_size)
    data.check_positive("num_samples", num_samples)
    check_limit(memory_limit, "exact")
    asked = request(model, variables, call=call, sample_weight=sample_weight, only=only, sharding=sharding, rngs=rngs)
    if batch_size is None:
        known = data.known_batches(batches, num_samples)
        return _plan(asked, _compile(asked, [(shape, lambda: None) for shape in known]), memory_limit)
    return _plan(asked, _compile(asked, _cut(data.evenly_spaced(batches, num_samples), batch_size)), memory_limit)


def check_limit(memory_limit: Any, method: str) -> None:
    """A memory limit is a number of bytes, and for exact statistics."""
    data.check_positive("memory_limit", memory_limit)
    if memory_limit is not None and method != "exact":
        raise ValueError(f'`memory_limit` is for `method="exact"`, which keeps values of all batches: got {method!r}.')


def moments_of_arrays(
    asked: Request, arrays: Any, batch_size: int, memory_limit: int | None, *, keep_unseen: bool
) -> Any:
    """The tree of exact moments of arrays in strided batches."""
    return _moments(asked, _cut(arrays, batch_size), memory_limit, keep_unseen=keep_unseen)


def moments_of_batches(asked: Request, batches: Sequence[Any], memory_limit: int | None, *, keep_unseen: bool) -> Any:
    """The tree of exact moments of batches, which stay where they are until they are needed."""
    sources = [(data.abstract(batch), partial(lambda batch: batch, batch)) for batch in batches]
    return _moments(asked, sources, memory_limit, keep_unseen=keep_unseen)


@dataclass
class _Batch:
    """One batch on its way.

    Attributes:
        number: its place in the data, from 0.
        size: its samples, without padding.
        fetch: reads it.
        segments: what runs it.
        values: what is kept of it at the last kept boundary; None where that is the data.
        weights: the weights of its samples, once it has been read.
    """

    number: int
    size: int
    fetch: Callable[[], Any]
    segments: Segments
    values: Values | None = None
    weights: Array | None = None


def _cut(arrays: Any, batch_size: int) -> list[tuple[Any, Callable[[], Any]]]:
    def take(rows: np.ndarray) -> Any:
        return jax.tree.map(lambda a: jnp.take(a, rows, axis=0) if isinstance(a, jax.Array) else a[rows], arrays)

    arrays = jax.tree.map(lambda a: a if isinstance(a, jax.Array) else np.asarray(a), arrays)
    groups = data.strided_rows(data.count_samples(arrays), batch_size)
    return [(data.abstract(arrays, len(rows)), partial(take, rows)) for group in groups for rows in group]


def _compile(asked: Request, sources: Sequence[tuple[Any, Callable[[], Any]]]) -> list[_Batch]:
    compiled = Compiled(Segments, asked.setting)
    shards = data.shards(asked.setting.sharding)
    batches = []
    for number, (shape, fetch) in enumerate(sources):
        size = data.count_samples(shape)
        present = data.padding(size, shards)
        placed = shape if present is None else data.abstract(shape, len(present))
        shapes = shapes_of(asked.variables, placed, asked.rngs, padded=present is not None)
        batches.append(_Batch(number, size, fetch, compiled[shapes]))
    first = batches[0].segments
    for batch in batches:
        if [e.tolist() for e in batch.segments.entries] != [e.tolist() for e in first.entries]:
            raise ValueError(
                "All batches must call the same batch-norm layers in the same order: that of "
                f"{batches[0].size} samples calls {len(first.entries)}, that of {batch.size} samples "
                f"{len(batch.segments.entries)} in another order or number."
            )
    return batches


def _plan(asked: Request, batches: Sequence[_Batch], memory_limit: int | None) -> Plan:
    if memory_limit is None:
        free = mesh.free_bytes(jax.tree.leaves(asked.variables)[0].devices())
        memory_limit = None if free is None else max(free // 2, 1)
    names = []
    for entries in batches[0].segments.entries:
        path = next(path for path, own in asked.layers.entries.items() if np.isin(own, entries).any())
        names.append(stored.layer_name(path))
    samples = sum(batch.size for batch in batches)
    shards = data.shards(asked.setting.sharding)
    return make_plan(names, [batch.segments for batch in batches], samples, shards, memory_limit)


def _moments(
    asked: Request, sources: Sequence[tuple[Any, Callable[[], Any]]], memory_limit: int | None, *, keep_unseen: bool
) -> Any:
    batches = _compile(asked, sources)
    segments = batches[0].segments
    if len(batches) == 1:
        for segment in segments.segments:
            segment.check_values()
    kept = [call.kept for call in _plan(asked, batches, memory_limit).calls]
    watched = _watched(batches)
    found = _run(asked, batches, kept, watched)
    result = Result(segments.entries, range(len(batches)), found.moments, jnp.asarray(found.first_bad))
    tree = merged([result], asked.layers, asked.wanted, keep_unseen=keep_unseen)
    if watched and not segments.uses_keys:
        _check_independence(asked, [batches[number] for number in watched], found)
    return tree


class _Found(NamedTuple):
    """What a run ends with; a list with one item for each call.

    Attributes:
        moments: those of all batches.
        statistics: the mean and variance that the call let through.
        first_bad: the first batch whose moments are not finite, or -1.
        watched: the moments of each watched batch.
    """

    moments: list[Moments]
    statistics: list[tuple[Array, Array]]
    first_bad: list[int]
    watched: list[list[Moments]]


def _run(asked: Request, batches: Sequence[_Batch], kept: Sequence[bool], watched: Sequence[int]) -> _Found:
    """All batches through one call after the other; blocks once for each call."""
    wholes = {id(batch.segments): batch.segments for batch in batches}
    shared = {key: whole.shared(asked.variables) for key, whole in wholes.items()}
    defaults = stored.flat_statistics(asked.variables["batch_stats"], asked.layers)
    found = _Found([], [], [], [])
    base = 0
    for call, keeps in enumerate(kept):
        chunks, seen = _measure(asked, batches, shared, base, call, keeps, watched)
        rows, entries = batches[0].segments.segments[call].rows, batches[0].segments.entries[call]
        moments, bad, mean, var = _finish(chunks, *(a[entries - 1] for a in defaults))
        found.moments.append(moments)
        found.statistics.append((mean, var))
        found.watched.append(seen)
        found.first_bad.append(next((i * rows + int(b) for i, b in enumerate(bad) if b >= 0), -1))
        for key, whole in wholes.items():
            shared[key] |= whole.segments[call].statistics(mean, var)
        base = call + 1 if keeps else base
    return found


def _measure(
    asked: Request,
    batches: Sequence[_Batch],
    shared: Mapping[int, Values],
    base: int,
    call: int,
    keeps: bool,
    watched: Sequence[int],
) -> tuple[list[Any], list[Moments]]:
    """The merged moments of one call's input in chunks, and those of the watched batches."""
    chunks: list[Any] = []
    seen: list[Moments] = []
    ahead: deque[Array] = deque()
    for batch in batches:
        segment = batch.segments.segments[call]
        slot = batch.number % segment.rows
        if slot == 0:
            buffer = segment.empty()
        common = shared[id(batch.segments)]
        values = _values(asked, batch, common, base, call)
        retained: Values = {} if keeps or batch.values is None else batch.values
        if keeps:
            batch.values = None
        buffer, made, done = segment.measure(values, common, retained, batch.weights, buffer, slot)
        if keeps:
            batch.values = {v: a for v, a in values.items() if v not in segment.dead} | made
        if batch.number in watched:
            seen.append(jax.tree.map(lambda a, slot=slot: a[slot], buffer))
        if slot == segment.rows - 1 or batch is batches[-1]:
            chunks.append(_merge_steps([buffer]))
        ahead.append(done)
        if len(ahead) > _AHEAD:
            jax.block_until_ready(ahead.popleft())
    return chunks, seen


def _values(asked: Request, batch: _Batch, shared: Values, base: int, call: int) -> Values:
    """What lives of a batch before a call, computed from what is kept."""
    values = _fetch(asked, batch) if batch.values is None else dict(batch.values)
    for segment in batch.segments.segments[base:call]:
        made = segment.advance(values, shared)
        values = {v: a for v, a in values.items() if v not in segment.dead} | made
    return values


def _fetch(asked: Request, batch: _Batch) -> Values:
    placed, present = data.placed(batch.fetch(), asked.setting.sharding)
    if batch.weights is None:
        batch.weights = batch.segments.sample_weights(placed, present)
    keys = jax.tree.map(lambda key: jax.random.fold_in(key, batch.number), asked.rngs)
    values = dict(zip(batch.segments.inputs, jax.tree.leaves((placed, keys))))
    return {v: values[v] for v in batch.segments.live[0]}


def _watched(batches: Sequence[_Batch]) -> list[int]:
    """The batches to check independence by: the first one that can be cut, or else two that can be joined."""
    several = [batch.number for batch in batches if batch.size > 1]
    return several[:1] or [0, 1][: len(batches) if len(batches) > 1 else 0]


def _check_independence(asked: Request, batches: Sequence[_Batch], found: _Found) -> None:
    first = batches[0]
    layers = first.segments.layers
    dtypes = [eqn.invars[0].aval.dtype for eqn in first.segments.taps]
    watched = [list(moments) for moments in zip(*found.watched)]
    if len(batches) == 1:
        whole, batch = watched[0], first.fetch()
        rows = split(first.size)
        cut = [jax.tree.map(lambda a, part=part: a[part], batch) for part in rows]
        parts = _probe(asked, cut, [_weights_of(asked, batches, part) for part in rows], found)
    else:
        batch = jax.tree.map(lambda *a: np.concatenate(a), *(batch.fetch() for batch in batches))
        whole, parts = _probe(asked, [batch], [_weights_of(asked, batches, [0])], found), _merge_each(*watched)
    check_parts(layers, list(zip(whole, dtypes)), list(zip(parts, dtypes)))


def _weights_of(asked: Request, batches: Sequence[_Batch], rows: Any) -> Array | None:
    if asked.setting.sample_weight is None:
        return None
    return jnp.concatenate([jnp.asarray(batch.weights)[np.asarray(rows)] for batch in batches])


def _probe(asked: Request, parts: Sequence[Any], weights: Sequence[Array | None], found: _Found) -> list[Moments]:
    """The merged moments of each call's input for some samples in parts, with the statistics found."""
    sharding = asked.setting.sharding
    parts = jax.tree.map(jnp.asarray, parts)
    if sharding is not None:
        parts, weights = jax.device_put((parts, weights), mesh.replicated(sharding))
    shapes = tuple(shapes_of(asked.variables, part, asked.rngs, padded=False) for part in parts)
    try:
        probe = Compiled(_Probe, asked.setting)[shapes]
        return probe.run(asked.variables, asked.rngs, parts, weights, found.statistics)
    except Exception as error:
        sizes = [data.count_samples(part) for part in parts]
        error.add_note(f"raised for parts of {sizes} samples, which check that examples are independent")
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
