"""Which entries of stored statistics make a row: those that one call normalizes one domain by."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from flaxbn.data.samples import hide
from flaxbn.layers.names import layer_name
from flaxbn.models.arguments import Model, open_model, takes_model
from flaxbn.models.batch_stats import StoredLayers, stored_layers, with_wide_statistics
from flaxbn.models.entries import candidates_in, read_layers
from flaxbn.models.leaves import named_leaves
from flaxbn.models.linen import Call, trace
from flaxbn.models.places import Path, places_of


@dataclass(frozen=True, eq=False)
class Row:
    """The channels that are normalized together: of one domain, one step of a scan, one member of a vmap.

    Examples:
        >>> import numpy as np
        >>> from flaxbn import diagnostics
        >>> row = diagnostics.Row(path=("block", "norm"), label="1", channels=np.array([2, 3]))
        >>> row.name, row.of(np.array([[0.0, 0.1], [1.0, 1.1]])).tolist()
        ('block/norm[1]', [1.0, 1.1])

    Attributes:
        path: that of its layer in `batch_stats`.
        label: where the row lies in the layer's statistics, as an index without brackets; empty for a single row.
        channels: the places of its channels in these statistics, flattened.
    """

    path: Path
    label: str
    channels: np.ndarray

    @property
    def name(self) -> str:
        """The layer's name, with the row in brackets where it has several."""
        return layer_name(self.path) + (f"[{self.label}]" if self.label else "")

    def of(self, tree: Any) -> Any:
        """The channels of this row, from a tree of arrays of the shape of the layer's statistics."""
        return jax.tree.map(lambda a: np.ravel(a)[self.channels], tree)


RowsByLayer = Mapping[Path, Sequence[Row]]
"""What `rows_of` returns."""


@takes_model
def rows_of(
    model: Model, variables: Mapping[str, Any], batch: Any, *, call: Call | None = None
) -> dict[Path, list[Row]]:
    """The rows of statistics of each layer that `call` runs, as the traced model reads them.

    The shape of what is stored does not tell: (3, 4) may be three domains, four steps of a scan whose statistics are
    stacked along axis 1, or a layer with `axis=(1, 2)`, whose twelve channels are one row.

    Examples:
        >>> import flaxbn, jax, numpy as np
        >>> from flaxbn import diagnostics
        >>> norm = flaxbn.BatchNorm(use_running_average=True, num_domains=2)
        >>> x, domain = np.ones((4, 3), "float32"), np.array([0, 0, 1, 1])
        >>> variables = norm.init(jax.random.key(0), x, domain=domain)
        >>> rows = diagnostics.rows_of(norm, variables, (x, domain), call=lambda m, b: m(b[0], domain=b[1]))
        >>> [(row.label, row.channels.tolist()) for row in rows[()]]
        [('0', [0, 1, 2]), ('1', [3, 4, 5])]

    Args:
        model: the model; for one of flax.nnx, `*nnx.split(model)` stands in the place of `model, variables`.
        variables: its variables; read only.
        batch: what `call` takes; the model is traced, and nothing is computed.
        call: how the model is run for evaluation, `(module, batch) -> output`; by default `module(batch)`.

    Raises:
        TypeError: if `model` is neither a `flax.linen.Module` nor split from an `nnx.Module`.
    """
    model, variables = open_model(model, variables)
    batch_stats = variables.get("batch_stats", {})
    if not stored_layers(batch_stats).entries and not candidates_in(batch_stats):
        return {}
    variables, batch = with_wide_statistics(variables), hide(batch)
    program = trace(model, variables, batch, call, None).program
    layers, entries = read_layers(program, variables, len(jax.tree.leaves(batch)))
    read = [
        np.unique(row)
        for e, rank in zip(entries, program.channel_ranks())
        if e is not None and e.size
        for row in e.reshape(-1, math.prod(e.shape[e.ndim - rank :]))
    ]
    return {path: _named(path, layers.entries[path], parts) for path, parts in _by_layer(read, layers).items()}


def _by_layer(read: Iterable[np.ndarray], layers: StoredLayers) -> dict[Path, list[np.ndarray]]:
    """What was read of each layer, in the order of the layers; one call may read of several, by a tied scan say."""
    owner = np.zeros(layers.total + 1, int)
    for number, entries in enumerate(layers.entries.values()):
        owner[entries] = number
    found: list[list[np.ndarray]] = [[] for _ in layers.entries]
    for row in read:
        for number in np.unique(owner[row]):
            found[number].append(row[owner[row] == number])
    return {path: parts for path, parts in zip(layers.entries, found) if parts}


def seen_rows(rows: RowsByLayer | None, path: Path, count: Any) -> list[Row]:
    """The rows of a layer with those of their channels that saw data; without `rows` those along the last axis.

    Args:
        rows: of all layers, or None where they are not known.
        path: the layer.
        count: the weight of what each of its channels saw, of the shape of its statistics.

    Raises:
        ValueError: if `rows` is None and a row along the last axis saw data in some of its channels only.
    """
    count = np.asarray(count)
    if rows is None or path not in rows:
        return _along_last(path, count, known=rows is None)
    seen = np.ravel(count) > 0
    kept = [replace(row, channels=row.channels[seen[row.channels]]) for row in rows[path]]
    return [row for row in kept if row.channels.size]


def _along_last(path: Path, count: np.ndarray, *, known: bool) -> list[Row]:
    """A row for each place of all axes but the last; none where the layer is not `known` to be of that kind."""
    numbers = np.arange(count.size).reshape(count.shape)
    rows = _named(path, numbers, numbers.reshape(-1, count.shape[-1] if count.ndim else 1)) if known else []
    kept = [row for row in rows if np.all(row.of(count) > 0)]
    covered = np.concatenate([np.zeros(0, int), *(row.channels for row in kept)])
    if np.any(np.delete(count, covered) > 0):
        raise ValueError(
            f"Each row of statistics must have seen data in all of its channels, or in none: '{layer_name(path)}', of "
            f"shape {count.shape}, has data elsewhere. Say which channels make a row, by "
            "`rows=diagnostics.rows_of(model, variables, batch, call=call)` with the `call` that gave the moments."
        )
    return kept


def _named(path: Path, numbers: np.ndarray, found: Iterable[np.ndarray]) -> list[Row]:
    """The rows with these entries, each once and in order, named by the axes along which no row extends."""
    numbers = np.atleast_1d(numbers)
    distinct = sorted({tuple(row.tolist()) for row in found if len(row)})
    channels = [np.searchsorted(np.ravel(numbers), row) for row in distinct]
    places = [np.unravel_index(c, numbers.shape) for c in channels]
    extended = [n == 1 or any(len(np.unique(p[axis])) > 1 for p in places) for axis, n in enumerate(numbers.shape)]
    labels = [[":" if e else str(p[axis][0]) for axis, e in enumerate(extended)] for p in places]
    return [Row(path, _trimmed(label), c) for label, c in zip(labels, channels)]


def _trimmed(label: list[str]) -> str:
    """The index without what numpy does not need: whole axes at its end."""
    while label and label[-1] == ":":
        label = label[:-1]
    return ", ".join(label)


def never_estimated(batch_stats: Any, rows: RowsByLayer, counts: Mapping[Path, np.ndarray] | None = None) -> list[Row]:
    """The rows whose stored mean is 0 and variance 1 in every channel, as `init` leaves them.

    Args:
        batch_stats: what is stored.
        rows: those to look at.
        counts: by layer, the weight of what each channel saw, where it is known. A row that saw data is none of these,
            whatever its statistics: standardized data have mean 0 and variance 1.
    """
    leaves = named_leaves(batch_stats)

    def is_initial(row: Row) -> bool:
        mean, var = row.of([leaves[place] for place in places_of(row.path, leaves) or ()])
        saw_data = counts is not None and row.path in counts and np.any(row.of(counts[row.path]) > 0)
        return not np.any(mean) and bool(np.all(var == 1)) and not saw_data

    return [row for of_layer in rows.values() for row in of_layer if is_initial(row)]
