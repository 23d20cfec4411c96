"""Traps that make all else meaningless: values that are not finite, and predictions that depend on the batch.

Their rules look at the subject itself, before evidence is gathered: moments of NaN are NaN, and what a layer receives
in one batch is not what it would receive in another where examples are mixed. Losses are the exception: they are the
last thing to be computed, so that all other findings stand beside one that is not finite.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxbn.data.batches import count_samples
from flaxbn.data.samples import is_array
from flaxbn.diagnostics.evidence import Evidence, Subject
from flaxbn.diagnostics.findings import ESTIMATE, Finding, Trap
from flaxbn.estimation.layer_moments import NotFiniteError
from flaxbn.layers.names import layer_name
from flaxbn.models.batch_stats import stored_layers
from flaxbn.models.independence import BatchDependenceError, assert_batch_independent, outputs, split
from flaxbn.models.leaves import named_leaves

NOT_FINITE = Trap(
    "not finite",
    "Find the batch that did it, and estimate the statistics anew: a running average never forgets it.",
    ESTIMATE,
)


def not_finite(subject: Subject) -> list[Finding]:
    """Statistics, weights, data or outputs that hold NaN or infinities, and variances that are negative.

    `Finding.number` is how many of these there are, `where` the first. Outputs are computed only where all that goes
    in is finite.
    """
    wrong = _not_finite_variables_or_data(subject) or _not_finite_outputs(subject)
    text = f"{', '.join(wrong[:3])}{' and others' if len(wrong) > 3 else ''} should be finite, variances positive."
    return [NOT_FINITE.finding(wrong[0], len(wrong), 0, text)] if wrong else []


def not_finite_statistics(subject: Subject) -> list[Finding]:
    """Statistics of a batch that hold NaN or infinities: what a layer receives overflows.

    It names the first layer and the batch; the layers behind it receive what this one made of them.
    """
    try:
        _ = subject.moments  # measured now, and kept for the evidence
    except NotFiniteError as error:
        return [NOT_FINITE.finding(error.layer, 1, 0, str(error))]
    return []


def not_finite_loss(evidence: Evidence) -> list[Finding]:
    """Losses that are NaN or infinite where data, statistics and weights are not."""
    loss = evidence.losses[None]
    wrong = [value for value in (loss.batch, loss.stored) if not math.isfinite(value)]
    text = f"it should be finite: by the statistics of batches it is {loss.batch}, by the stored ones {loss.stored}."
    return [NOT_FINITE.finding("loss", len(wrong), 0, text)] if wrong else []


def _not_finite_variables_or_data(subject: Subject) -> list[str]:
    """Their places, each once; a negative variance counts, since its root is NaN."""
    named = {collection: subject.variables.get(collection, {}) for collection in ("batch_stats", "params")}
    trees = (named, *({"data": batch} for batch in subject.batches))
    leaves = [leaf for tree in trees for leaf in jax.tree_util.tree_leaves_with_path(tree)]
    wrong = [*dict.fromkeys(jax.tree_util.keystr(path) for path, leaf in leaves if not _is_finite(leaf))]
    stored = named_leaves(named["batch_stats"])
    variances = [var for _, var in stored_layers(named["batch_stats"]).places.values()]
    negative = [names for names in variances if np.any(np.asarray(stored[names]) < 0)]
    return wrong + [f"stored {layer_name(names)}" for names in negative]


def _not_finite_outputs(subject: Subject) -> list[str]:
    """The outputs for the example, by their place among all that `call` returns."""
    found = outputs(subject.model, subject.variables, subject.example, subject.call)
    return [f"output {i}" for i, leaf in enumerate(found) if not _is_finite(leaf)]


def _is_finite(leaf: Any) -> bool:
    return not is_array(leaf) or not jnp.issubdtype(leaf.dtype, jnp.inexact) or bool(jnp.all(jnp.isfinite(leaf)))


TRAINING_MODE = Trap(
    "training mode at inference",
    "Evaluate with stored statistics (`use_running_average=True`, `train=False` in `call`; an nnx model is evaluated "
    "as after `model.eval()`, unless `call` says otherwise), and mend whatever else reduces over the batch.",
    "call=lambda module, batch: module(batch, train=False)",
)


def training_mode(subject: Subject) -> list[Finding]:
    """Outputs that change with the rest of the batch, as those of a layer in training mode do.

    `Finding.number` is the part of an output's size by which it changes without two thirds of the batch.
    """
    try:
        assert_batch_independent(subject.model, subject.variables, subject.example, call=subject.call)
    except BatchDependenceError as error:
        change = _change_with_the_batch(subject)
        text = (
            "no output has an axis of examples, so that `call` may have taken one example for the batch, `batch[0]` of "
            f"an array say. {error}"
            if change is None
            else f"without two thirds of a batch the outputs for the rest change by {change:.1%}. {error}"
        )
        return [TRAINING_MODE.finding("output", change or 0.0, 0, text)]
    return []


def _change_with_the_batch(subject: Subject) -> float | None:
    """By how much of their size outputs change where the batch is a third of itself: the largest of all outputs.

    None where no output has an axis of examples.
    """
    size = count_samples(subject.example)
    rows = split(size)[0]
    third = jax.tree.map(lambda a: a[rows], subject.example)
    found = (outputs(subject.model, subject.variables, batch, subject.call) for batch in (subject.example, third))
    changes = []
    for whole, again in zip(*found):
        if np.shape(whole)[:1] == (size,) and np.shape(again)[:1] == (len(rows),):
            difference = np.linalg.norm(np.ravel(whole[rows] - again))
            changes.append(float(difference / max(np.linalg.norm(np.ravel(whole[rows])), np.finfo(np.float32).tiny)))
    return max(changes, default=None)


PRECONDITIONS = (not_finite, training_mode, not_finite_statistics)
"""The rules that come first, in this order: where one finds something, nothing else is looked at."""
