"""What exact statistics will cost: which live values are kept, which are computed again, and how much that is."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from flaxbn.segments import Segments


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
    """The cost of exact statistics, which `print` shows as a table.

    Attributes:
        calls: the calls of the layers in the order of execution.
        batches: the number of batches.
        samples: the number of samples.
        memory_limit: how many bytes of live values may be kept on each device; None for any number.
    """

    calls: tuple[PlannedCall, ...]
    batches: int
    samples: int
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
        limit = "no memory limit" if self.memory_limit is None else f"memory limit {_size(self.memory_limit)}"
        title = (
            f"exact statistics of {self.samples} samples in {self.batches} batches: {len(self.calls)} calls, "
            f"{self.passes:.2f} forward passes, {_size(self.peak_bytes)} kept at most ({limit})"
        )
        rows = [("", "layer", "call", "live values", "", "passes")]
        rows += [
            (str(i), c.layer, str(c.call), _size(c.live_bytes), "kept" if c.kept else "recomputed", f"{total:.2f}")
            for i, (c, total) in enumerate(zip(self.calls, accumulate(c.passes for c in self.calls)), 1)
        ]
        widths = [max(map(len, column)) for column in zip(*rows)]
        left = (False, True, False, False, True, False)
        lines = [
            "  ".join(cell.ljust(w) if start else cell.rjust(w) for cell, w, start in zip(row, widths, left)).rstrip()
            for row in rows
        ]
        return "\n".join([title, *lines])


def make_plan(
    layers: Sequence[str], batches: Sequence[Segments], samples: int, shards: int, memory_limit: int | None
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
