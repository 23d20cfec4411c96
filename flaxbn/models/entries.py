"""Which stored entries each call of a layer reads."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flaxbn.models.arguments import Model, is_opened_nnx
from flaxbn.models.batch_stats import dict_names, stored_layers
from flaxbn.tracing.known import UNKNOWN, read_by_taps
from flaxbn.tracing.program import Program


def entries_read(program: Program, variables: Mapping[str, Any], other_leaves: int) -> list[np.ndarray | None]:
    """For each tap of a program the numbers of the entries that it reads, stacked as the program's records are.

    The program's arguments are the leaves of `variables`, then `other_leaves` more. None stands for a tap that does
    not read stored entries as they are: a layer of another model, or statistics that are computed on the way.
    """
    layers = stored_layers(variables.get("batch_stats", {}))

    def means(first: int) -> list[Any]:
        def known(path: Any, leaf: Any) -> Any:
            names = dict_names(path)
            if names[:1] != ("batch_stats",) or names[-1:] != ("mean",) or names[1:-1] not in layers.entries:
                return UNKNOWN
            return np.asarray(layers.entries[names[1:-1]] + first, leaf.dtype)

        leaves = [known(path, leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]]
        with jax.ensure_compile_time_eval():
            return read_by_taps(program, leaves + [UNKNOWN] * other_leaves)[1]

    return [_entries(*pair, layers.total) for pair in zip(means(0), means(layers.total))]


def check_own_layers(model: Model, program: Program, entries: Sequence[np.ndarray | None]) -> None:
    """For an nnx model, whose modules run by themselves, a `call` that runs another one from outside is an error.

    Raises:
        ValueError: if there are layers, and none of them reads stored entries.
    """
    if is_opened_nnx(model) and entries and all(read is None for read in entries):
        raise ValueError(
            f"`call` must use the model that it is given: {program.layer_names()[0]}, which it runs, is no layer of "
            "that. Its first argument is a copy of the model: `call=lambda m, b: m(b)`, and not a model from outside."
        )


def _entries(mean: Any, shifted: Any, total: int) -> np.ndarray | None:
    """The entries in what a tap reads; two numberings tell them from constants, and from rounded ones."""
    if mean is UNKNOWN or shifted is UNKNOWN:
        return None
    entries, again = (np.real(np.asarray(a)) for a in (mean, shifted))
    return entries.astype(np.int64) if np.all(again - total == entries) else None
