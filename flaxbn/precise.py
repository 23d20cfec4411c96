"""One pass over batches with the weights frozen: each layer normalizes by its own batch, the moments are merged."""

import functools
from collections import deque
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array

from flaxbn import batches as data
from flaxbn.moments import Moments, merge_along
from flaxbn.readers import batch_statistics, stored_statistics
from flaxbn.request import Request
from flaxbn.results import Result, merge_steps
from flaxbn.setting import Compiled, Setting, Shapes, shapes_of
from flaxbn.sites import find_sites, sample_weights
from flaxbn.spread import measure_spread
from flaxbn.tap import Tap

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
        on_tap = functools.partial(self._on_tap, data.count_samples(batch), weights)
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
        axes = data.split_axes(sharding)

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
    groups = data.strided_rows(data.count_samples(arrays), batch_size)
    if setting.sharding is None:
        arrays = jax.tree.map(jnp.asarray, arrays)
    passes = Compiled(Pass, setting)
    results, first = [], 0
    for rows in groups:
        present = data.padding(rows.shape[1], data.shards(setting.sharding))
        if present is not None:
            rows = np.pad(rows, ((0, 0), (0, len(present) - rows.shape[1])), mode="edge")
        source = passes[_shapes(asked, data.abstract(arrays, rows.shape[1]), present)]
        for chunk in np.array_split(rows, -(-len(rows) // source.chunk)):
            given = (
                (arrays, chunk) if setting.sharding is None else (data.laid_out(arrays, chunk, setting.sharding), None)
            )
            steps = range(first, first + len(chunk))
            results.append(Result(source.entries, steps, *source.scan(variables, rngs, *given, present, first)))
            first += len(chunk)
    return results


def _shapes(asked: Request, batch: Any, present: Any) -> Shapes:
    """The key of a compiled pass: by the part of the batch that normalizes together, the last one that is not empty."""
    samples = None if present is None else int(np.sum(present))
    if asked.setting.by_device:
        size = data.count_samples(batch) // data.shards(asked.setting.sharding)
        batch = data.abstract(batch, size)
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
        batch, present = data.placed(batch, setting.sharding)
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
