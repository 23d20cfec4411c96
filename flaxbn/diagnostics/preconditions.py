"""What makes all else meaningless: values that are not finite, and predictions that depend on the batch."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flaxbn.data.batches import count_samples
from flaxbn.diagnostics.findings import Finding
from flaxbn.diagnostics.loss_gap import Gap
from flaxbn.estimation.layer_moments import NotFiniteError
from flaxbn.layers.names import layer_name
from flaxbn.models.arguments import call_directly
from flaxbn.models.batch_stats import named_leaves
from flaxbn.models.independence import BatchDependenceError, assert_batch_independent, outputs, split
from flaxbn.models.linen import Call


def not_finite(
    model: nn.Module, variables: Mapping[str, Any], batches: Sequence[Any], example: Any, call: Call | None
) -> list[Finding]:
    """Statistics, weights, data or outputs for `example` that hold NaN or infinities, and negative variances."""
    named = {"batch_stats": variables.get("batch_stats", {}), "params": variables.get("params", {})}
    leaves = [leaf for tree in (named, *({"data": b} for b in batches)) for leaf in _leaves(tree)]
    wrong = [*dict.fromkeys(name for name, leaf in leaves if not _is_finite(leaf))]
    stored_leaves = named_leaves(named["batch_stats"])
    negative = [names for names, leaf in stored_leaves.items() if names[-1] == "var" and np.any(np.asarray(leaf) < 0)]
    wrong += [f"stored {layer_name(names)}" for names in negative]
    if not wrong:
        found = outputs(model, variables, example, call or call_directly)
        wrong = [f"output {i}" for i, leaf in enumerate(found) if not _is_finite(leaf)]
    evidence = f"{', '.join(wrong[:3])}{' and others' if len(wrong) > 3 else ''} should be finite, variances positive."
    return [Finding.of("not finite", wrong[0], len(wrong), 0, evidence)] if wrong else []


def not_finite_statistics(error: NotFiniteError) -> Finding:
    """Statistics of a batch that hold NaN or infinities."""
    return Finding.of("not finite", error.layer, 1, 0, str(error))


def not_finite_loss(loss: Gap) -> list[Finding]:
    """Losses that are NaN or infinite where data, statistics and weights are not."""
    wrong = [value for value in (loss.batch, loss.stored) if not math.isfinite(value)]
    evidence = (
        f"it should be finite: by the statistics of batches it is {loss.batch}, by the stored ones {loss.stored}."
    )
    return [Finding.of("not finite", "loss", len(wrong), 0, evidence)] if wrong else []


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _is_finite(leaf: Any) -> bool:
    return not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) or bool(jnp.all(jnp.isfinite(leaf)))


def mixing(model: nn.Module, variables: Mapping[str, Any], batch: Any, call: Call | None) -> list[Finding]:
    """Outputs that change with the rest of the batch."""
    try:
        assert_batch_independent(model, variables, batch, call=call)
    except BatchDependenceError as error:
        change = _change(model, variables, batch, call or call_directly)
        evidence = f"without two thirds of a batch the outputs for the rest change by {change:.1%}. {error}"
        return [Finding.of("training mode at inference", "output", change, 0, evidence)]
    return []


def _change(model: nn.Module, variables: Mapping[str, Any], batch: Any, call: Call) -> float:
    """By how much of their size outputs change where the batch is smaller."""
    rows, size = split(count_samples(batch))[0], count_samples(batch)
    part = outputs(model, variables, jax.tree.map(lambda a: jnp.asarray(a)[rows], batch), call)
    changes = [0.0]
    for whole, again in zip(outputs(model, variables, batch, call), part):
        if len(whole) == size and len(again) == len(rows):
            difference = np.linalg.norm(np.ravel(whole[rows] - again))
            changes.append(float(difference / max(np.linalg.norm(np.ravel(whole[rows])), np.finfo(np.float32).tiny)))
    return max(changes)
