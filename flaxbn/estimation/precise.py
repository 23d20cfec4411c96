"""One pass over batches with the weights frozen: each layer normalizes by its own batch, the moments are merged."""

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array

from flaxbn.arithmetic.moments import Moments, merge_along
from flaxbn.data.batches import Arrays, Stream, abstract, count_samples
from flaxbn.data.placement import by_step, padding, placed, shards, split_axes
from flaxbn.estimation.calls import Closed, LayerCalls
from flaxbn.estimation.chunks import Ahead, batches_in_chunk, put, room
from flaxbn.estimation.compiled import Layout, Shapes, shapes_of
from flaxbn.estimation.keys import fold_in
from flaxbn.estimation.layer_moments import Pending, checked_tree, fetched, merge_steps, merged_by_layer, pack
from flaxbn.estimation.request import Request, request, tracing_options
from flaxbn.estimation.reuse import Compiled
from flaxbn.estimation.sharded import measure_sharded
from flaxbn.estimation.threads import cores_for, side_by_side
from flaxbn.models.arguments import Model
from flaxbn.models.linen import Call
from flaxbn.tracing.jaxpr import Hashed
from flaxbn.tracing.measure import batch_statistics, stored_statistics
from flaxbn.tracing.primitive import Tap

_AHEAD = 2  # batches of a stream: one is computed while the next is read
_OPEN = 4  # buffers of a stream, each for the batches that call the same layers; mostly there is one, of up to 64 MiB


class Pass:
    """The compiled pass over batches of one shape.

    Attributes:
        layout: how the batches lie.
        calls: the calls of the wanted layers in the traced model.
        entries: for each of them the numbers of the stored entries that it reads.
        chunk: how many batches have their moments merged at once.
        scan: `(closed, variables, rngs, batches, places, count, present, first)`: the merged moments of so many batches
            along a leading axis or, where `places` (batches, size) are given, of these samples, as `pack` packs them.
        has_run: the numbers of batches, and of samples in all, that `scan` was compiled for.
        step: `(buffer, slot, closed, variables, rngs, batch, present, step)`: puts those of one batch into a chunk's
            buffer.
    """

    def __init__(self, calls: Sequence[LayerCalls], layout: Layout) -> None:
        (self.calls,) = calls
        self.layout = layout
        self.entries = list(self.calls.entries.values())
        self.chunk = batches_in_chunk(sum(e.size for e in self.entries))
        self.scan = jax.jit(self._scan)
        self.has_run: set[tuple[int, int]] = set()
        self.step = jax.jit(self._step, donate_argnums=0)
        self._like: tuple[Hashable, list[Moments]] | None = None

    def pending(self, steps: Sequence[int], packed: list[Array]) -> Pending:
        """What `scan` or `merge` gives for batches of these numbers."""
        return Pending(self.entries, steps, packed, self.calls.is_complex)

    def moments_like(self, *args: Any) -> tuple[Hashable, list[Moments]]:
        """What a batch adds to a buffer, from the arguments of `sharded_moments`.

        Returns:
            A key, equal for passes whose moments are those of the same entries, in the same types; and the moments of
            a batch as shapes and dtypes.
        """
        if self._like is None:
            moments = jax.eval_shape(self.sharded_moments, *args)
            types = tuple((a.shape, a.dtype) for a in jax.tree.leaves(moments))
            self._like = Hashed((types, tuple(e.tobytes() for e in self.entries))), moments
        return self._like

    def _moments(self, closed: Closed, variables: Any, rngs: Any, batch: Any, present: Any, step: Any) -> list[Moments]:
        weights = self.calls.sample_weights(closed, batch, present)
        rngs = fold_in(rngs, step)
        leaves = jax.tree.leaves((closed.model, variables, batch, rngs))
        on_tap = functools.partial(self._on_tap, count_samples(batch), weights)
        _, records = self.calls.program.run(leaves, on_tap)
        return [record for record in records if record is not None]

    def _on_tap(self, samples: int, weights: Array | None, tap: Tap) -> tuple[Array, Array, Moments | None]:
        if tap.site not in self.calls.entries:
            return stored_statistics(tap)
        self.calls.check_values(tap)
        sharding = None if self.layout.by_device else self.layout.sharding
        return batch_statistics(tap, measure_sharded(tap, self.calls.weights(tap, weights), samples, sharding))

    def sharded_moments(
        self, closed: Closed, variables: Any, rngs: Any, batch: Any, present: Any, step: Any
    ) -> list[Moments]:
        """The moments of a batch; where each device normalizes by itself, along a leading axis of devices."""
        sharding = self.layout.sharding
        if not self.layout.by_device or sharding is None:
            return self._moments(closed, variables, rngs, batch, present, step)
        axes = split_axes(sharding)

        def on_device(closed: Closed, variables: Any, rngs: Any, batch: Any, present: Any, step: Any) -> list[Moments]:
            rngs = fold_in(rngs, jax.lax.axis_index(axes))
            moments = self._moments(closed, variables, rngs, batch, present, step)
            return jax.tree.map(lambda a: a[None], moments)

        whole, split = PartitionSpec(), PartitionSpec(axes)
        specs = (whole, whole, whole, split, split, whole)
        spread = jax.shard_map(
            on_device, mesh=sharding.mesh, in_specs=specs, out_specs=split, axis_names=set(axes), check_vma=False
        )
        return spread(closed, variables, rngs, batch, present, step)

    def _scan(
        self,
        closed: Closed,
        variables: Any,
        rngs: Any,
        batches: Any,
        places: Array | None,
        count: Any,
        present: Any,
        first: Any,
    ) -> list[Array]:
        def batch_at(i: Any) -> Any:
            if places is None:
                return jax.tree.map(lambda a: a[i], batches)
            return jax.tree.map(lambda a: jnp.take(a, places[i], axis=0), batches)

        def step(i: Any, buffer: list[Moments]) -> list[Moments]:
            return put(buffer, i, self.sharded_moments(closed, variables, rngs, batch_at(i), present, first + i))

        most = jax.tree.leaves(batches if places is None else places)[0].shape[0]
        _, like = self.moments_like(closed, variables, rngs, batch_at(0), present, first)
        return _merge(jax.lax.fori_loop(0, count, step, room(like, most)), by_device=self.layout.by_device)

    def _step(self, buffer: list[Moments], slot: Any, closed: Closed, *args: Any) -> tuple[list[Moments], Array]:
        *_, step = args
        return put(buffer, slot, self.sharded_moments(closed, *args)), step + 1


def _merge(steps: list[Moments], *, by_device: bool) -> list[Array]:
    """For each call the moments along the leading axis merged, and where the first ones lie that are not finite."""
    if not by_device:
        return pack(*merge_steps(steps))
    moments, bad = jax.vmap(merge_steps, in_axes=1)(steps)
    first = jnp.min(jnp.where(bad < 0, jnp.iinfo(bad.dtype).max, bad), 0)
    return pack([merge_along(m) for m in moments], jnp.where(jnp.all(bad < 0, 0), -1, first))


_merge_buffer = jax.jit(_merge, static_argnames="by_device")


def precise_pass(asked: Request, data: Arrays | Stream) -> list[Pending]:
    """The moments of all batches, in chunks; nothing is read back from the device."""
    return _scan_arrays(asked, data) if isinstance(data, Arrays) else _run_stream(asked, data)


def _scan_arrays(asked: Request, data: Arrays) -> list[Pending]:
    options, variables, rngs = asked[:3]
    arrays = data.on_device() if options.sharding is None else None
    passes = Compiled(Pass, options)
    results, first = [], 0
    for places in data.groups:
        present = padding(places.shape[1], shards(options.sharding))
        if present is not None:
            places = np.pad(places, ((0, 0), (0, len(present) - places.shape[1])), mode="edge")
        compiled, (closed,) = passes.find(_shapes(asked, abstract(data.arrays, places.shape[1]), present))
        if options.sharding is None:
            results += _on_cores(compiled, (closed, variables, rngs, arrays), places, first)
        else:
            for chunk in np.array_split(places, -(-len(places) // compiled.chunk)):
                batches = jax.device_put(data.take(chunk), by_step(options.sharding))
                steps = range(first, first + len(chunk))
                packed = compiled.scan(closed, variables, rngs, batches, None, len(chunk), present, first)
                results.append(compiled.pending(steps, packed))
                first += len(chunk)
        first = results[-1].steps[-1] + 1
    return results


def _on_cores(compiled: Pass, args: tuple[Any, ...], places: np.ndarray, first: int) -> list[Pending]:
    """The moments of arrays on one device, gathered batch by batch; on a CPU as many at once as there are cores.

    All parts have room for the same number of batches, so they are one program; the merged result depends on how many
    there are by rounding only.
    """
    *_, arrays = args
    leaves = jax.tree.leaves(arrays)
    samples = len(leaves[0])
    cores = cores_for(args, len(places), places.size * sum(a.nbytes for a in leaves) // samples)
    size = min(-(-len(places) // cores), compiled.chunk)
    parts = [(first + i, places[i : i + size]) for i in range(0, len(places), size)]

    def run(part: tuple[int, np.ndarray]) -> list[Array]:
        begin, own = part
        room_for_all = np.pad(own, ((0, size - len(own)), (0, 0)))
        return compiled.scan(*args, room_for_all, len(own), None, begin)

    if cores > 1 and (size, samples) in compiled.has_run:
        packed = side_by_side(run, parts, cores, tracing_options)
    else:  # the first call compiles, once
        packed = [run(part) for part in parts]
    compiled.has_run.add((size, samples))
    return [compiled.pending(range(begin, begin + len(own)), p) for (begin, own), p in zip(parts, packed)]


def _shapes(asked: Request, batch: Any, present: Any) -> Shapes:
    """The key of a compiled pass: by the part of the batch that normalizes together, the last one that is not empty."""
    samples = None if present is None else int(np.sum(present))
    if asked.options.by_device:
        size = count_samples(batch) // shards(asked.options.sharding)
        batch = abstract(batch, size)
        samples = None if samples is None else (samples - 1) % size + 1
    return shapes_of(asked.variables, batch, asked.rngs, present=samples)


class _Chunk:
    """Batches whose moments are not merged yet; of any shapes, as long as they call the same layers."""

    def __init__(self, like: Pass, moments: list[Moments]) -> None:
        self.steps: list[int] = []
        self._like = like
        self._buffer = room(moments, like.chunk)

    def add(self, compiled: Pass, *args: Any) -> Any:
        """Takes one batch more; returns a token, which is ready when it is done."""
        self._buffer, done = compiled.step(self._buffer, len(self.steps), *args)
        self.steps.append(args[-1])
        return done

    @property
    def is_full(self) -> bool:
        return len(self.steps) == self._like.chunk

    def merged(self) -> Pending:
        return self._like.pending(self.steps, _merge_buffer(self._buffer, by_device=self._like.layout.by_device))


def _run_stream(asked: Request, data: Stream) -> list[Pending]:
    """However many shapes there are, few buffers are open: the one that was used longest ago is merged."""
    options, variables, rngs = asked[:3]
    passes = Compiled(Pass, options)
    results: list[Pending] = []
    chunks: dict[Hashable, _Chunk] = {}  # the one used last is the last
    ahead = Ahead(_AHEAD)
    for step, batch in enumerate(data):
        batch, present = placed(batch, options.sharding)
        compiled, (closed,) = passes.find(_shapes(asked, batch, present))
        args = (closed, variables, rngs, batch, present, step)
        key, moments = compiled.moments_like(*args)
        chunk = chunks.pop(key, None) or _Chunk(compiled, moments)
        ahead.started(chunk.add(compiled, *args))
        if chunk.is_full:
            results.append(chunk.merged())
        else:
            chunks[key] = chunk
        if len(chunks) > _OPEN:
            results.append(chunks.pop(next(iter(chunks))).merged())
    return results + [chunk.merged() for chunk in chunks.values()]


def batch_moments(
    model: Model,
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
        source, (closed,) = passes.find(shapes_of(asked.variables, abstract(batch), asked.rngs, present=None))
        one = jax.tree.map(lambda a: jnp.asarray(a)[None], batch)
        found = source.pending([step], source.scan(closed, asked.variables, asked.rngs, one, None, 1, None, step))
        yield checked_tree(merged_by_layer(fetched([found]), asked.layers), asked.wanted, keep_unseen=True)
