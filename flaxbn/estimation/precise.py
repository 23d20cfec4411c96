"""One pass over batches with the weights frozen: each layer normalizes by its own batch, the moments are merged."""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array

from flaxbn.arithmetic.moments import Moments, merge_along
from flaxbn.data.batches import abstract, count_samples, strided_rows
from flaxbn.data.placement import laid_out, padding, placed, shards, split_axes
from flaxbn.estimation.calls import find_sites, sample_weights
from flaxbn.estimation.compiled import Compiled, Setting, Shapes, shapes_of
from flaxbn.estimation.layer_moments import Result, checked_tree, fetched, merge_steps, merged_by_layer
from flaxbn.estimation.request import Request, request
from flaxbn.estimation.sharded import measure_spread
from flaxbn.models.linen import Call
from flaxbn.tracing.measure import batch_statistics, stored_statistics
from flaxbn.tracing.primitive import Tap

_CHUNK = 256
_CHUNK_BYTES = 2**26
_AHEAD = 2


class Pass:
    """The compiled pass over batches of one shape."""

    def __init__(self, setting: Setting, shapes: Shapes) -> None:
        self.setting = setting
        self.sites = find_sites(setting, shapes)
        self.entries = list(self.sites.entries.values())
        channels = sum(e.size for e in self.entries)
        self.chunk = min(_CHUNK, max(1, _CHUNK_BYTES // (12 * max(channels, 1))))
        self.scan = jax.jit(self._scan)
        self.step = jax.jit(self._step, donate_argnums=0)
        self.merge = jax.jit(self._merge)

    def zeros(self, *args: Any) -> list[Moments]:
        """Room for the moments of a chunk of batches: zeros, which merging ignores."""
        shapes = jax.eval_shape(self._spread_moments, *args)
        return jax.tree.map(lambda s: jnp.zeros((self.chunk, *s.shape), s.dtype), shapes)

    def _moments(self, variables: Any, rngs: Any, batch: Any, present: Any, step: Any) -> list[Moments]:
        weights = sample_weights(self.setting, batch, present)
        rngs = jax.tree.map(lambda key: jax.random.fold_in(key, step), rngs)
        leaves = jax.tree.leaves((variables, batch, rngs))
        on_tap = functools.partial(self._on_tap, count_samples(batch), weights)
        _, records = self.sites.program.run(leaves, on_tap)
        return [record for record in records if record is not None]

    def _on_tap(self, samples: int, weights: Array | None, tap: Tap) -> tuple[Array, Array, Moments | None]:
        if tap.site not in self.sites.entries:
            return stored_statistics(tap)
        self.sites.check_values(tap)
        sharding = None if self.setting.by_device else self.setting.sharding
        return batch_statistics(tap, measure_spread(tap, self.sites.weights(tap, weights), samples, sharding))

    def _spread_moments(self, variables: Any, rngs: Any, batch: Any, present: Any, step: Any) -> list[Moments]:
        """The moments of a batch; where each device normalizes by itself, along a leading axis of devices."""
        sharding = self.setting.sharding
        if not self.setting.by_device or sharding is None:
            return self._moments(variables, rngs, batch, present, step)
        axes = split_axes(sharding)

        def on_device(variables: Any, rngs: Any, batch: Any, present: Any, step: Any) -> list[Moments]:
            rngs = jax.tree.map(lambda key: jax.random.fold_in(key, jax.lax.axis_index(axes)), rngs)
            moments = self._moments(variables, rngs, batch, present, step)
            return jax.tree.map(lambda a: a[None], moments)

        whole, split = PartitionSpec(), PartitionSpec(axes)
        specs = (whole, whole, split, split, whole)
        spread = jax.shard_map(
            on_device, mesh=sharding.mesh, in_specs=specs, out_specs=split, axis_names=set(axes), check_vma=False
        )
        return spread(variables, rngs, batch, present, step)

    def _scan(
        self, variables: Any, rngs: Any, batches: Any, rows: Array | None, present: Any, first: Any
    ) -> tuple[list[Moments], Array]:
        def step(k: Array, batch: Any) -> tuple[Array, list[Moments]]:
            if rows is not None:
                batch = jax.tree.map(lambda a: jnp.take(a, batch, axis=0), batches)
            return k + 1, self._spread_moments(variables, rngs, batch, present, k)

        _, steps = jax.lax.scan(step, first, batches if rows is None else rows)
        return self._merge(steps)

    def _step(
        self, buffer: list[Moments], slot: Any, variables: Any, rngs: Any, batch: Any, present: Any, step: Any
    ) -> tuple[list[Moments], Array]:
        moments = self._spread_moments(variables, rngs, batch, present, step)
        return jax.tree.map(lambda b, m: b.at[slot].set(m), buffer, moments), step + 1

    def _merge(self, steps: list[Moments]) -> tuple[list[Moments], Array]:
        if not self.setting.by_device:
            return merge_steps(steps)
        moments, bad = jax.vmap(merge_steps, in_axes=1)(steps)
        first = jnp.min(jnp.where(bad < 0, jnp.iinfo(bad.dtype).max, bad), 0)
        return [merge_along(m) for m in moments], jnp.where(jnp.all(bad < 0, 0), -1, first)


def pass_over_arrays(asked: Request, arrays: Any, batch_size: int) -> list[Result]:
    """The moments of arrays in strided batches, by scans on the device."""
    setting, variables, rngs = asked[:3]
    groups = strided_rows(count_samples(arrays), batch_size)
    if setting.sharding is None:
        arrays = jax.tree.map(jnp.asarray, arrays)
    passes = Compiled(Pass, setting)
    results, first = [], 0
    for rows in groups:
        present = padding(rows.shape[1], shards(setting.sharding))
        if present is not None:
            rows = np.pad(rows, ((0, 0), (0, len(present) - rows.shape[1])), mode="edge")
        source = passes[_shapes(asked, abstract(arrays, rows.shape[1]), present)]
        for chunk in np.array_split(rows, -(-len(rows) // source.chunk)):
            given = (arrays, chunk) if setting.sharding is None else (laid_out(arrays, chunk, setting.sharding), None)
            steps = range(first, first + len(chunk))
            results.append(Result(source.entries, steps, *source.scan(variables, rngs, *given, present, first)))
            first += len(chunk)
    return results


def _shapes(asked: Request, batch: Any, present: Any) -> Shapes:
    """The key of a compiled pass: by the part of the batch that normalizes together, the last one that is not empty."""
    samples = None if present is None else int(np.sum(present))
    if asked.setting.by_device:
        size = count_samples(batch) // shards(asked.setting.sharding)
        batch = abstract(batch, size)
        samples = None if samples is None else (samples - 1) % size + 1
    return shapes_of(asked.variables, batch, asked.rngs, present=samples)


def pass_over_stream(asked: Request, batches: Iterable[Any]) -> list[Result]:
    """The moments of a stream of batches; nothing is read back from the device."""
    setting, variables, rngs = asked[:3]
    passes = Compiled(Pass, setting)
    results: list[Result] = []
    buffers: dict[Pass, list[Moments]] = {}
    steps: dict[Pass, list[int]] = {}
    ahead: deque[Any] = deque()

    def flush(source: Pass) -> None:
        results.append(Result(source.entries, steps.pop(source), *source.merge(buffers.pop(source))))

    for step, batch in enumerate(batches):
        batch, present = placed(batch, setting.sharding)
        source = passes[_shapes(asked, batch, present)]
        args = (variables, rngs, batch, present, step)
        if source not in buffers:
            buffers[source], steps[source] = source.zeros(*args), []
        buffers[source], done = source.step(buffers[source], len(steps[source]), *args)
        steps[source].append(step)
        if len(steps[source]) == source.chunk:
            flush(source)
        ahead.append(done)
        if len(ahead) > _AHEAD:
            jax.block_until_ready(ahead.popleft())
    for source in list(buffers):
        flush(source)
    return results


def batch_moments(
    model: nn.Module,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    call: Call | None = None,
    only: Callable[[str], bool] | None = None,
) -> Iterator[Any]:
    """For each batch the tree that `population_moments` gives for it alone; layers that it does not reach have count 0.

    The model is traced once for batches of one shape.
    """
    options = {"sample_weight": None, "sharding": None, "normalization_batch": "global", "rngs": None}
    asked = request(model, variables, call=call, only=only, **options)  # type: ignore[arg-type]
    passes = Compiled(Pass, asked.setting)
    for step, batch in enumerate(batches):
        source = passes[shapes_of(asked.variables, abstract(batch), asked.rngs, present=None)]
        one = jax.tree.map(lambda a: jnp.asarray(a)[None], batch)
        found = Result(source.entries, [step], *source.scan(asked.variables, asked.rngs, one, None, None, step))
        yield checked_tree(merged_by_layer(fetched([found]), asked.layers), asked.wanted, keep_unseen=True)
