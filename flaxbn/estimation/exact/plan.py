"""What exact statistics will cost: which live values are kept, which are computed again, and how much that is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import jax
from jax.sharding import NamedSharding
from jaxtyping import Array

from flaxbn.data.batches import (
    Arrays,
    Source,
    check_positive,
    open_batches,
)
from flaxbn.data.placement import free_bytes, own_mesh, shards
from flaxbn.data.tables import as_html, as_text
from flaxbn.estimation.exact.pieces import in_pieces
from flaxbn.estimation.exact.prepare import prepare_batches
from flaxbn.estimation.exact.segments import Segments
from flaxbn.estimation.exact.stage import Batch
from flaxbn.estimation.request import Request, has_other_names, request
from flaxbn.layers.names import layer_name
from flaxbn.models.arguments import Model, open_model, takes_model
from flaxbn.models.linen import Call
from flaxbn.models.unseen import one_warning


@dataclass(frozen=True)
class PlannedCall:
    """One call of one layer.

    Attributes:
        layer: the layer's path in `batch_stats`, joined by "/".
        call: which call of this layer it is, from 1.
        live_bytes: the size on each device of all values that later calls need, of all batches.
        kept: whether they are kept; otherwise later calls compute them again.
        passes: the work done for this call, in forward passes over the data.
    """

    layer: str
    call: int
    live_bytes: int
    kept: bool
    passes: float


@dataclass(frozen=True)
class Plan:
    """The cost of exact statistics, which `print` and notebooks show as a table.

    Attributes:
        calls: the calls of the layers in the order of execution.
        batches: in how many batches the data goes through the model. Arrays may be cut into others than `batch_size`
            says, since the result does not depend on it: smaller ones on a CPU, whose cache then holds what they need,
            and larger ones on an accelerator, which they keep busy, if memory allows.
        samples: the number of samples; None where batches have no axis of samples.
        memory_limit: how many bytes of live values may be kept on each device; None for any number.

    Examples:
        >>> import flax.linen as nn, flaxbn, jax, numpy as np
        >>> model = nn.BatchNorm(use_running_average=True)
        >>> images = np.zeros((100, 4), np.float32)
        >>> plan = flaxbn.plan(model, model.init(jax.random.key(0), images), images, batch_size=20)
        >>> plan.batches, plan.samples, plan.peak_bytes  # one layer: nothing is kept for later ones
        (5, 100, 0)
    """

    calls: tuple[PlannedCall, ...]
    batches: int
    samples: int | None
    memory_limit: int | None

    @property
    def passes(self) -> float:
        """The whole work in forward passes over the data, a pass ending at the last layer; 1 if all is kept."""
        return sum(call.passes for call in self.calls)

    @property
    def peak_bytes(self) -> int:
        """The most that is kept on each device; the batch under way and the data itself come on top."""
        return max((call.live_bytes for call in self.calls if call.kept), default=0)

    @property
    def largest_bytes(self) -> int:
        """The memory limit from which one forward pass is enough."""
        return max((call.live_bytes for call in self.calls), default=0)

    def __str__(self) -> str:
        return f"{self._title}\n{as_text(*self._table)}"

    def _repr_html_(self) -> str:
        return as_html(*self._table, self._title)

    @property
    def _title(self) -> str:
        limit = "no memory limit" if self.memory_limit is None else f"memory limit {_size(self.memory_limit)}"
        samples = "" if self.samples is None else f"{self.samples} samples in "
        return (
            f"exact statistics of {samples}{self.batches} batches: {len(self.calls)} calls, "
            f"{self.passes:.2f} forward passes, {_size(self.peak_bytes)} kept at most ({limit})"
        )

    @property
    def _table(self) -> tuple[list[tuple[str, ...]], tuple[bool, ...]]:
        """The rows, and which columns are set to the left."""
        rows: list[tuple[str, ...]] = [("", "layer", "call", "live values", "", "passes")]
        rows += [
            (str(i), c.layer, str(c.call), _size(c.live_bytes), "kept" if c.kept else "recomputed", f"{total:.2f}")
            for i, (c, total) in enumerate(zip(self.calls, accumulate(c.passes for c in self.calls)), 1)
        ]
        return rows, (False, True, False, False, True, False)


def make_plan(
    layers: Sequence[str], batches: Sequence[Segments], samples: int | None, shards: int, memory_limit: int | None
) -> Plan:
    """Keeps what fits: from a later boundary there is less to compute again, and an earlier one is then not needed."""
    first = batches[0].segments
    pass_work = sum(segment.work for segment in first) or 1.0
    calls, base = [], 0
    for k, layer in enumerate(layers):
        live = -(-sum(whole.bytes(k + 1) for whole in batches) // shards)
        kept = memory_limit is None or live <= memory_limit
        passes = sum(segment.work for segment in first[base : k + 1]) / pass_work
        calls.append(PlannedCall(layer, layers[: k + 1].count(layer), live, kept, passes))
        base = k + 1 if kept else base
    return Plan(tuple(calls), len(batches), samples, memory_limit)


def _size(count: int) -> str:
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


@takes_model
def plan(
    model: Model,
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

    Warns:
        UserWarning: if a layer of a class that flaxbn does not know takes part, as the estimate does.

    Examples:
        >>> import flax.linen as nn, flaxbn, jax, numpy as np
        >>> norm = nn.BatchNorm(use_running_average=True)
        >>> model = nn.Sequential([norm, nn.Dense(8), norm.clone()])
        >>> images = np.zeros((100, 4), np.float32)
        >>> variables = jax.jit(model.init)(jax.random.key(0), images[:2])
        >>> plan = flaxbn.plan(model, variables, images, batch_size=20, memory_limit=1000)
        >>> [(call.layer, call.live_bytes, call.kept) for call in plan.calls]
        [('layers_0', 1600, False), ('layers_2', 0, True)]
    """
    check_limit(memory_limit, "exact")
    model, variables = open_model(model, variables)
    options: dict[str, Any] = {"call": call, "sample_weight": sample_weight, "only": only, "sharding": sharding}
    data = open_batches(batches, batch_size, num_samples)
    first = data.shapes()[0] if has_other_names(variables) else None
    asked = request(model, variables, rngs=rngs, first=first, **options)
    with one_warning(), own_mesh(asked.options.sharding, by_device=asked.options.by_device):
        shapes = (in_pieces(asked, data, memory_limit) if isinstance(data, Arrays) else data).shapes()
        sources = [Source(s, _unread) for s in shapes]
        return plan_batches(asked, [*prepare_batches(asked, sources)], memory_limit_of(asked, memory_limit))


def _unread() -> Any:
    raise AssertionError("a plan reads no data")


def check_limit(memory_limit: Any, method: str) -> None:
    """A memory limit is a number of bytes, and for exact statistics."""
    check_positive("memory_limit", memory_limit)
    if memory_limit is not None and method != "exact":
        raise ValueError(f'`memory_limit` is for `method="exact"`, which keeps values of all batches: got {method!r}.')


def memory_limit_of(asked: Request, memory_limit: int | None, held: int = 0) -> int | None:
    """The limit that is given; without one, half of what the device says is free, now, or is held already."""
    if memory_limit is not None:
        return memory_limit
    free = free_bytes(jax.tree.leaves(asked.variables)[0].devices())
    return None if free is None else max((free + held) // 2, 1)


def plan_batches(asked: Request, batches: Sequence[Batch], memory_limit: int | None) -> Plan:
    """The plan of batches that are prepared."""
    names = [layer_name(asked.layers.layer_of(entries)) for entries in batches[0].segments.entries]
    sizes = [batch.size for batch in batches if batch.size is not None]
    samples = sum(sizes) if len(sizes) == len(batches) else None
    parts = shards(asked.options.sharding)
    return make_plan(names, [batch.segments for batch in batches], samples, parts, memory_limit)
