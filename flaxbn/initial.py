"""Statistics that are as `init` leaves them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from flaxbn import stored
from flaxbn.rows import Row, RowsByLayer


def never_estimated(
    batch_stats: Any, rows: RowsByLayer, counts: Mapping[stored.Path, np.ndarray] | None = None
) -> list[Row]:
    """The rows whose stored mean is 0 and variance 1 in every channel; not those that have a count, which saw data."""
    leaves = stored.named_leaves(batch_stats)

    def is_initial(row: Row) -> bool:
        mean, var = row.of([leaves[(*row.path, field)] for field in ("mean", "var")])
        saw_data = counts is not None and row.path in counts and np.any(row.of(counts[row.path]) > 0)
        return not np.any(mean) and bool(np.all(var == 1)) and not saw_data

    return [row for of_layer in rows.values() for row in of_layer if is_initial(row)]
