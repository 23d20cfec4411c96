"""The compiled pass over batches of one shape: what each layer sees of a batch, put into a buffer and merged."""

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array

from flaxbn.arithmetic.moments import merge_along
from flaxbn.data.batches import abstract
from flaxbn.data.placement import split_axes
from flaxbn.data.samples import common_length, count_samples
from flaxbn.estimation.calls import Closed, LayerCalls
from flaxbn.estimation.chunks import batches_in_chunk, put, room
from flaxbn.estimation.compiled import Layout, Shapes, shapes_of
from flaxbn.estimation.joined import Packed, Pending, Record, join, merge_joined
from flaxbn.estimation.request import Request
from flaxbn.estimation.sharded import measure_sharded
from flaxbn.models.keys import fold_in
from flaxbn.tracing.ahead import computed_ahead
from flaxbn.tracing.jaxpr import Hashed
from flaxbn.tracing.measure import batch_statistics, stored_statistics
from flaxbn.tracing.primitive import Tap

TOGETHER = 4  # a program that takes several batches uses its memory again; what waits for it is held meanwhile


class Pass:
    """The compiled pass over batches of one shape.

    Attributes:
        layout: how the batches lie.
        calls: the calls of the wanted layers in the traced model.
        asks_host: whether a function of the host is called.
        entries: for each of them the numbers of the stored entries that it reads.
        chunk: how many batches have their moments merged at once.
        scan: `(closed, variables, rngs, batches, places, count, present, first)`: the merged moments of batches along a
            leading axis or, where `places` (batches, size) are given, of these samples, as `merge_joined` packs them;
            of the first `count` only, where that is given.
        has_run: the numbers of batches, and of samples in all, that `scan` was compiled for before threads ran it.
        together: how many batches of a stream `step` takes at once.
        step: `(buffer, slot, count, closed, variables, rngs, batches, present, numbers)`: puts those of the first
            `count` of a list of batches into the rows from `slot` on of a chunk's buffer, which is used up.
        has_stepped: whether `step` is compiled.
    """

    def __init__(self, calls: Sequence[LayerCalls], layout: Layout) -> None:
        (self.calls,) = calls
        self.layout = layout
        self.asks_host = self.calls.asks_host
        self._ahead, self._program = computed_ahead(self.calls.program, sum(self.calls.arguments[:2]))
        self.entries = list(self.calls.entries.values())
        self.chunk = batches_in_chunk(sum(e.size for e in self.entries))
        self.scan = jax.jit(self._scan)
        self.has_run: set[tuple[int, int]] = set()
        has_one_shape = layout.sharding is None and layout.group is None
        self.together = min(TOGETHER, self.chunk) if has_one_shape else 1
        self.step = jax.jit(self._step, donate_argnums=0)
        self.has_stepped = False
        self._like: tuple[Hashable, list[Record]] | None = None

    def pending(self, steps: Sequence[int], packed: Packed) -> Pending:
        """What `scan` or `merge` gives for batches of these numbers."""
        return Pending(self.entries, steps, packed, self.calls.is_complex)

    def moments_like(self, *args: Any) -> tuple[Hashable, list[Record]]:
        """What a batch adds to a buffer, from the arguments of `sharded_moments`.

        Returns:
            A key, equal for passes whose moments are those of the same entries, in the same types; and the moments of
            a batch as shapes and dtypes.
        """
        if self._like is None:

            def prepared_moments(closed: Closed, variables: Any, *others: Any) -> list[Record]:
                return self.sharded_moments(self._prepared(closed, variables), variables, *others)

            moments = jax.eval_shape(prepared_moments, *args)  # within, since outside it would be computed
            types = tuple((a.shape, a.dtype) for a in jax.tree.leaves(moments))
            self._like = Hashed((types, tuple(e.tobytes() for e in self.entries))), moments
        return self._like

    def _prepared(self, closed: Closed, variables: Any) -> Closed:
        return closed._replace(ahead=self._ahead(*jax.tree.leaves((closed.model, variables))))

    def _moments(self, closed: Closed, variables: Any, rngs: Any, batch: Any, present: Any, step: Any) -> list[Record]:
        weights = self.calls.sample_weights(closed, batch, present)
        rngs = fold_in(rngs, step)
        leaves = jax.tree.leaves((closed.ahead, closed.model, variables, batch, rngs))
        on_tap = functools.partial(self._on_tap, common_length(batch), weights)
        _, records = self._program.run(leaves, on_tap)
        return join([record for record in records if record is not None])

    def _on_tap(self, samples: int | None, weights: Array | None, tap: Tap) -> tuple[Array, Array, Record | None]:
        if tap.site not in self.calls.entries:
            return stored_statistics(tap)
        self.calls.check_values(tap)
        sharding = None if self.layout.has_parts else self.layout.sharding
        measured = measure_sharded(tap, self.calls.weights(tap, weights), samples, sharding, on=self.layout.platform)
        return *batch_statistics(tap, measured), Record.of(measured)

    def sharded_moments(
        self, closed: Closed, variables: Any, rngs: Any, batch: Any, present: Any, step: Any
    ) -> list[Record]:
        """The moments of a batch; where each device normalizes by itself, along a leading axis of devices.

        Args:
            closed: the arrays that the traced program closes over.
            variables: those of the model.
            rngs: random keys by collection, the same for all batches.
            batch: its leaves.
            present: which samples are no padding, or None.
            step: the number of the batch.
        """
        sharding = self.layout.sharding
        if self.layout.group is not None:
            return self._group_moments(closed, variables, rngs, batch, present, step)
        if not self.layout.by_device or sharding is None:
            return self._moments(closed, variables, rngs, batch, present, step)
        axes = split_axes(sharding)

        def on_device(closed: Closed, variables: Any, rngs: Any, batch: Any, present: Any, step: Any) -> list[Record]:
            rngs = fold_in(rngs, jax.lax.axis_index(axes))
            moments = self._moments(closed, variables, rngs, batch, present, step)
            return jax.tree.map(lambda a: a[None], moments)

        whole, split = PartitionSpec(), PartitionSpec(axes)
        specs = (whole, whole, whole, split, split, whole)
        spread = jax.shard_map(
            on_device, mesh=sharding.mesh, in_specs=specs, out_specs=split, axis_names=set(axes), check_vma=False
        )
        return spread(closed, variables, rngs, batch, present, step)

    def _group_moments(
        self, closed: Closed, variables: Any, rngs: Any, batch: Any, present: Any, step: Any
    ) -> list[Record]:
        """The moments of a batch whose groups normalize by themselves, merged: another batch may have other groups."""
        batch, present = jax.tree.map(lambda a: a.reshape(-1, self.layout.group, *a.shape[1:]), (batch, present))

        def of_group(batch: Any, present: Any, number: Any) -> list[Record]:
            return self._moments(closed, variables, fold_in(rngs, number), batch, present, step)

        records = jax.vmap(of_group)(batch, present, jnp.arange(len(jax.tree.leaves(batch)[0])))
        return [Record(merge_along(moments), jnp.any(single, 0)) for moments, single in records]

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
    ) -> Packed:
        def batch_at(i: Any) -> Any:
            if places is None:
                return jax.tree.map(lambda a: a[i], batches)
            return jax.tree.map(lambda a: jnp.take(a, places[i], axis=0), batches)

        def step(i: Any, buffer: list[Record]) -> list[Record]:
            return put(buffer, i, self.sharded_moments(closed, variables, rngs, batch_at(i), present, first + i))

        most = jax.tree.leaves(batches if places is None else places)[0].shape[0]
        closed = self._prepared(closed, variables)
        _, like = self.moments_like(closed, variables, rngs, batch_at(0), present, first)
        steps = most if count is None else count  # one that is known is no question to an accelerator after each step
        return merge_joined(jax.lax.fori_loop(0, steps, step, room(like, most)), by_device=self.layout.by_device)

    def _step(
        self,
        buffer: list[Record],
        slot: Any,
        count: Any,
        closed: Closed,
        variables: Any,
        rngs: Any,
        batches: Sequence[Any],
        present: Any,
        numbers: Array,
    ) -> tuple[list[Record], Array]:
        def step(i: Any, buffer: list[Record]) -> list[Record]:
            batch = [a[i] for a in stacked]
            return put(buffer, slot + i, self.sharded_moments(closed, variables, rngs, batch, present, numbers[i]))

        closed = self._prepared(closed, variables)
        stacked = [jnp.stack(arrays) for arrays in zip(*batches, strict=True)]
        steps = 1 if len(batches) == 1 else count
        return jax.lax.fori_loop(0, steps, step, buffer), numbers + 1


def key_of_pass(asked: Request, batch: Any, present: Any) -> Shapes:
    """What finds a pass: by the part of the batch that normalizes together, the last one that is not empty."""
    samples = None if present is None else int(np.sum(present))
    if asked.options.layout.has_parts:
        size = asked.options.layout.part(count_samples(batch))
        batch = abstract(batch, size)
        samples = None if samples is None else (samples - 1) % size + 1
    return shapes_of(asked.variables, batch, asked.rngs, present=samples)


merge_buffer = jax.jit(merge_joined, static_argnames="by_device")
"""Merges a buffer, and packs it."""
