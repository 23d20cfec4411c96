"""One pass over batches with the weights frozen: each layer normalizes by its own batch, the moments are merged."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array

from flaxbn.arithmetic.moments import Moments, merge_along
from flaxbn.data.batches import Arrays, Stream, abstract, count_samples
from flaxbn.data.placement import by_step, padding, placed, shards, split_axes
from flaxbn.estimation.calls import find_calls, sample_weights
from flaxbn.estimation.chunks import Ahead, batches_in_chunk, put, room
from flaxbn.estimation.compiled import Compiled, PassOptions, Shapes, shapes_of
from flaxbn.estimation.layer_moments import Result, checked_tree, fetched, merge_steps, merged_by_layer
from flaxbn.estimation.request import Request, request
from flaxbn.estimation.sharded import measure_sharded
from flaxbn.models.linen import Call
from flaxbn.tracing.measure import batch_statistics, stored_statistics
from flaxbn.tracing.primitive import Tap

_AHEAD = 2  # batches of a stream: one is computed while the next is read


class Pass:
    """The compiled pass over batches of one shape.

    Attributes:
        options: what it is compiled for.
        calls: the calls of the wanted layers in the traced model.
        entries: for each of them the numbers of the stored entries that it reads.
        chunk: how many batches have their moments merged at once.
        scan: `(variables, rngs, batches, places, present, first)`: the merged moments of batches along a leading axis
            or, where `places` (batches, size) are given, of these samples; and where the first ones lie that are not
            finite, for each call.
        step: `(buffer, slot, variables, rngs, batch, present, step)`: puts those of one batch into a chunk's buffer.
        merge: merges such a buffer.
    """

    def __init__(self, options: PassOptions, shapes: Shapes) -> None:
        self.options = options
        self.calls = find_calls(options, shapes)
        self.entries = list(self.calls.entries.values())
        self.chunk = batches_in_chunk(sum(e.size for e in self.entries))
        self.scan = jax.jit(self._scan)
        self.step = jax.jit(self._step, donate_argnums=0)
        self.merge = jax.jit(self._merge)

    def _moments(self, variables: Any, rngs: Any, batch: Any, present: Any, step: Any) -> list[Moments]:
        weights = sample_weights(self.options, batch, present)
        rngs = jax.tree.map(lambda key: jax.random.fold_in(key, step), rngs)
        leaves = jax.tree.leaves((variables, batch, rngs))
        on_tap = functools.partial(self._on_tap, count_samples(batch), weights)
        _, records = self.calls.program.run(leaves, on_tap)
        return [record for record in records if record is not None]

    def _on_tap(self, samples: int, weights: Array | None, tap: Tap) -> tuple[Array, Array, Moments | None]:
        if tap.site not in self.calls.entries:
            return stored_statistics(tap)
        self.calls.check_values(tap)
        sharding = None if self.options.by_device else self.options.sharding
        return batch_statistics(tap, measure_sharded(tap, self.calls.weights(tap, weights), samples, sharding))

    def sharded_moments(self, variables: Any, rngs: Any, batch: Any, present: Any, step: Any) -> list[Moments]:
        """The moments of a batch; where each device normalizes by itself, along a leading axis of devices."""
        sharding = self.options.sharding
        if not self.options.by_device or sharding is None:
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
            return k + 1, self.sharded_moments(variables, rngs, batch, present, k)

        _, steps = jax.lax.scan(step, first, batches if rows is None else rows)
        return self._merge(steps)

    def _step(
        self, buffer: list[Moments], slot: Any, variables: Any, rngs: Any, batch: Any, present: Any, step: Any
    ) -> tuple[list[Moments], Array]:
        moments = self.sharded_moments(variables, rngs, batch, present, step)
        return put(buffer, slot, moments), step + 1

    def _merge(self, steps: list[Moments]) -> tuple[list[Moments], Array]:
        if not self.options.by_device:
            return merge_steps(steps)
        moments, bad = jax.vmap(merge_steps, in_axes=1)(steps)
        first = jnp.min(jnp.where(bad < 0, jnp.iinfo(bad.dtype).max, bad), 0)
        return [merge_along(m) for m in moments], jnp.where(jnp.all(bad < 0, 0), -1, first)


def precise_pass(asked: Request, data: Arrays | Stream) -> list[Result]:
    """The moments of all batches, in chunks; nothing is read back from the device."""
    return _scan_arrays(asked, data) if isinstance(data, Arrays) else _run_stream(asked, data)


def _scan_arrays(asked: Request, data: Arrays) -> list[Result]:
    options, variables, rngs = asked[:3]
    arrays = data.on_device() if options.sharding is None else None
    passes = Compiled(Pass, options)
    results, first = [], 0
    for places in data.groups:
        present = padding(places.shape[1], shards(options.sharding))
        if present is not None:
            places = np.pad(places, ((0, 0), (0, len(present) - places.shape[1])), mode="edge")
        compiled = passes[_shapes(asked, abstract(data.arrays, places.shape[1]), present)]
        for chunk in np.array_split(places, -(-len(places) // compiled.chunk)):
            # Without a sharding samples are gathered inside the scan; with one each batch is laid out beforehand.
            given: tuple[Any, Any] = (arrays, chunk)
            if options.sharding is not None:
                given = jax.device_put(data.take(chunk), by_step(options.sharding)), None
            steps = range(first, first + len(chunk))
            results.append(Result(compiled.entries, steps, *compiled.scan(variables, rngs, *given, present, first)))
            first += len(chunk)
    return results


def _shapes(asked: Request, batch: Any, present: Any) -> Shapes:
    """The key of a compiled pass: by the part of the batch that normalizes together, the last one that is not empty."""
    samples = None if present is None else int(np.sum(present))
    if asked.options.by_device:
        size = count_samples(batch) // shards(asked.options.sharding)
        batch = abstract(batch, size)
        samples = None if samples is None else (samples - 1) % size + 1
    return shapes_of(asked.variables, batch, asked.rngs, present=samples)


class _Chunk:
    """Batches of one shape whose moments are not merged yet."""

    def __init__(self, compiled: Pass, *args: Any) -> None:
        self.compiled = compiled
        self.steps: list[int] = []
        self._buffer = room(jax.eval_shape(compiled.sharded_moments, *args), compiled.chunk)

    def add(self, step: int, *args: Any) -> Any:
        """Takes one batch more; returns a token, which is ready when it is done."""
        self._buffer, done = self.compiled.step(self._buffer, len(self.steps), *args, step)
        self.steps.append(step)
        return done

    @property
    def is_full(self) -> bool:
        return len(self.steps) == self.compiled.chunk

    def merged(self) -> Result:
        return Result(self.compiled.entries, self.steps, *self.compiled.merge(self._buffer))


def _run_stream(asked: Request, data: Stream) -> list[Result]:
    options, variables, rngs = asked[:3]
    passes = Compiled(Pass, options)
    results: list[Result] = []
    chunks: dict[Pass, _Chunk] = {}
    ahead = Ahead(_AHEAD)
    for step, batch in enumerate(data):
        batch, present = placed(batch, options.sharding)
        compiled = passes[_shapes(asked, batch, present)]
        args = (variables, rngs, batch, present)
        if compiled not in chunks:
            chunks[compiled] = _Chunk(compiled, *args, step)
        ahead.started(chunks[compiled].add(step, *args))
        if chunks[compiled].is_full:
            results.append(chunks.pop(compiled).merged())
    return results + [chunk.merged() for chunk in chunks.values()]


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
    passes = Compiled(Pass, asked.options)
    for step, batch in enumerate(batches):
        source = passes[shapes_of(asked.variables, abstract(batch), asked.rngs, present=None)]
        one = jax.tree.map(lambda a: jnp.asarray(a)[None], batch)
        found = Result(source.entries, [step], *source.scan(asked.variables, asked.rngs, one, None, None, step))
        yield checked_tree(merged_by_layer(fetched([found]), asked.layers), asked.wanted, keep_unseen=True)
