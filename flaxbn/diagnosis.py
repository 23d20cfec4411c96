"""Which trap of batch normalization a model is in."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from flaxbn import batches as data
from flaxbn import stored
from flaxbn.batchwise import batch_moments
from flaxbn.drift import Drift, compare
from flaxbn.gap import Gap, gap
from flaxbn.independence import BatchDependenceError, assert_batch_independent, outputs, split
from flaxbn.initial import never_estimated
from flaxbn.moments import merge
from flaxbn.naming import layer_name
from flaxbn.noise import BatchNoise, noise_among, some_batches
from flaxbn.observe import Call
from flaxbn.population import to_batch_stats
from flaxbn.request import call_directly, check_model
from flaxbn.rows import RowsByLayer, rows_of

Trap = Literal[
    "not finite",
    "training mode at inference",
    "never estimated",
    "lagging average",
    "mixed domains",
    "batches too small",
]
NOISE_SHARE = 0.1
"""The part of a normalized value's variance, noise of the batch, from which batches are too small."""
DRIFT_SHARE = 1e-3
"""The part of a normalized value's variance up to which a drift is harmless, however small the noise of a batch."""
_MOSTLY = 0.9
_PARTS = 8
_EXAMPLES = 8

CURES: dict[Trap, str] = {
    "not finite": "Find the batch that did it, and estimate the statistics anew: a running average never forgets it.",
    "training mode at inference": "Evaluate with stored statistics (`use_running_average=True`, `train=False` in "
    "`call`), and mend whatever else reduces over the batch.",
    "never estimated": "Estimate the statistics before inference: `flaxbn.estimate_population_stats(model, variables, "
    "data, batch_size=...)`, with the weights frozen.",
    "lagging average": "Before inference take the statistics of `flaxbn.estimate_population_stats`; while training, "
    'validate with `flaxbn.apply(..., statistics="batch")`.',
    "mixed domains": "Keep statistics for each domain: `flaxbn.domains.estimate` and `flaxbn.domains.select` for this "
    "model, `num_domains` in a new one.",
    "batches too small": "Normalize by more: larger batches, `axis_name` over devices, or `flaxbn.BatchRenorm`; "
    'estimate with `method="exact"`, which does not depend on the batch size.',
}


@dataclass(frozen=True)
class Finding:
    """A trap, the number that shows it, and the cure.

    Attributes:
        trap: its name.
        where: the layer in which it shows most, and the domain.
        number: what was measured there.
        threshold: from where on it is a finding.
        evidence: both in words.
        cure: what to do.
    """

    trap: Trap
    where: str
    number: float
    threshold: float
    evidence: str
    cure: str

    def __str__(self) -> str:
        return f"{self.trap}: {self.where}: {self.evidence} {self.cure}"


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found; printed, it is the findings in words.

    Attributes:
        findings: the traps, those that hide others first; empty where nothing is wrong.
        drift: the stored statistics against those of all data.
        noise: of batches, by domain where batches hold one domain each, else under None.
        gap: what normalization adds to the loss, by domain, and under None for all.
    """

    findings: tuple[Finding, ...]
    drift: tuple[Drift, ...] = ()
    noise: Mapping[Any, tuple[BatchNoise, ...]] | None = None
    gap: Mapping[Any, Gap] | None = None

    def __str__(self) -> str:
        lines = [str(finding) for finding in self.findings] or ["Nothing is wrong with batch normalization."]
        if self.gap is not None:
            whole = self.gap[None]
            lines.append(
                f"Stored statistics instead of the batch's add {whole.normalization:+.4f} (standard error "
                f"{whole.error:.4f}) to a training loss of {whole.batch:.4f}."
            )
        return "\n".join(lines)


def diagnose(
    model: nn.Module,
    variables: Mapping[str, Any],
    batches: Any,
    loss_fn: Callable[[Any, Any], Array],
    *,
    batch_size: int,
    call: Call | None = None,
    domain: Callable[[Any], Any] | None = None,
    only: Callable[[str], bool] | None = None,
    num_batches: int = 64,
    epsilon: float = 1e-5,
) -> Diagnosis:
    """Names the traps that a model is in, with the number that shows each, and its cure. Nothing is changed.

    The weights are frozen, and up to `num_batches` batches of the training data are each normalized by themselves, as
    in training. From their moments come the population, the error of its estimate (from eight parts) and the noise of
    a batch.

    | trap | when |
    | --- | --- |
    | not finite | statistics, weights, data or outputs hold NaN or infinities, or a stored variance is negative |
    | training mode at inference | `assert_batch_independent` fails |
    | never estimated | a layer's stored mean is all 0 and its variance all 1 |
    | mixed domains | nine batches in ten or more hold one domain, and the population of all is far from that of one: \
no shared statistics can be right |
    | lagging average | else, the stored statistics of a layer are far from the population's |
    | batches too small | `BatchNoise.typical_share` of a layer exceeds 0.1: a tenth of what half of its channels put \
out is noise of the batch |

    After one of the first two nothing else is looked at. *Far* is what changes a layer's output by more than the noise
    of a batch does, `Drift.share` against `BatchNoise.share`: training has shown the network that much in every step;
    by more than a thousandth of its variance; and by more than three standard errors of the estimate.

    Layers of `BatchRenorm` are never found to have too small batches: they put out what the running average makes of
    their input.

    Args:
        model: the model.
        variables: its variables with the statistics to be looked at; read only.
        batches: a pytree of arrays of training data in the order of training: `batch_size` consecutive samples are
            normalized together.
        loss_fn: `(output, batch) -> losses`, one for each example.
        batch_size: of the training, on one device where devices do not synchronize.
        call: how the model is run for evaluation, `(module, batch) -> output`; by default `module(batch)`.
        domain: `batch -> labels`, one for each example.
        only: `path -> bool`, the layers that training normalizes by their batches; by default all. Leave
            out frozen ones.
        num_batches: at most so many batches, drawn at random, always the same; at least 16 for errors worth the name.
        epsilon: what the layers add to the variance.

    Raises:
        ValueError: if there are fewer than two batches, or an argument does not fit, as in `gap`.
        TypeError: if `model` is not a `flax.linen.Module`.
    """
    check_model(model)
    chosen = some_batches(batches, batch_size, num_batches)
    example = jax.tree.map(lambda a: a[: max(batch_size, _EXAMPLES)], batches)
    broken = _not_finite(model, variables, example, call) or _mixing(model, variables, example, call)
    if broken:
        return Diagnosis(tuple(broken))
    moments = [*batch_moments(model, variables, chosen, call=call, only=only)]
    rows = rows_of(model, variables, chosen[0], call=call)
    groups = _groups(chosen, moments, domain)
    noise = {label: noise_among(group, batch_size, rows, epsilon=epsilon) for label, group in groups.items()}
    of_layer = by_layer(record for records in noise.values() for record in records)
    kept = variables["batch_stats"]
    drift = compare(kept, _parts(*groups.values()), rows=rows, epsilon=epsilon)
    ran = {record.layer for record in drift}
    untouched = [row.name for row in never_estimated(kept, rows) if row.name in ran]
    far = _apart(kept, moments, groups, noise, rows, epsilon)
    if not far:
        far = _furthest("lagging average", [r for r in drift if r.layer not in untouched], of_layer)
    findings = (*_never_estimated(untouched, drift), *far, *_too_small(_by_batch(of_layer, kept, rows)))
    losses = gap(model, variables, iter(chosen), loss_fn, call=call, domain=domain)
    return Diagnosis(findings, drift, noise, losses)


def _apart(
    kept: Any,
    moments: Sequence[Any],
    groups: Mapping[Any, Sequence[Any]],
    noise: Mapping[Any, Any],
    rows: RowsByLayer,
    epsilon: float,
) -> list[Finding]:
    """The domain that is furthest from the population of all."""
    pooled = to_batch_stats(jax.device_get(merge(*moments)), kept, keep_unseen=True)
    found = [
        finding
        for label, group in groups.items()
        if label is not None
        for finding in _furthest(
            "mixed domains",
            compare(pooled, _parts(group), rows=rows, epsilon=epsilon),
            by_layer(noise[label]),
            f", domain {label}",
        )
    ]
    return sorted(found, key=lambda finding: -finding.number)[:1]


def _not_finite(model: nn.Module, variables: Mapping[str, Any], batch: Any, call: Call | None) -> list[Finding]:
    named = {"batch_stats": variables.get("batch_stats", {}), "params": variables.get("params", {}), "data": batch}
    leaves = {jax.tree_util.keystr(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(named)}
    wrong = [name for name, leaf in leaves.items() if not _is_finite(leaf)]
    stored_leaves = stored.named_leaves(named["batch_stats"])
    negative = [names for names, leaf in stored_leaves.items() if names[-1] == "var" and np.any(np.asarray(leaf) < 0)]
    wrong += [f"stored {layer_name(names)}" for names in negative]
    if not wrong:
        found = outputs(model, variables, batch, call or call_directly)
        wrong = [f"output {i}" for i, leaf in enumerate(found) if not _is_finite(leaf)]
    evidence = f"{', '.join(wrong[:3])}{' and others' if len(wrong) > 3 else ''} should be finite, variances positive."
    return [_finding("not finite", wrong[0], len(wrong), 0, evidence)] if wrong else []


def _is_finite(leaf: Any) -> bool:
    return not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) or bool(jnp.all(jnp.isfinite(leaf)))


def _mixing(model: nn.Module, variables: Mapping[str, Any], batch: Any, call: Call | None) -> list[Finding]:
    try:
        assert_batch_independent(model, variables, batch, call=call)
    except BatchDependenceError as error:
        change = _change(model, variables, batch, call or call_directly)
        evidence = f"without two thirds of a batch the outputs for the rest change by {change:.1%}. {error}"
        return [_finding("training mode at inference", "output", change, 0, evidence)]
    return []


def _change(model: nn.Module, variables: Mapping[str, Any], batch: Any, call: Call) -> float:
    """By how much of their size outputs change where the batch is smaller."""
    rows, size = split(data.count_samples(batch))[0], data.count_samples(batch)
    part = outputs(model, variables, jax.tree.map(lambda a: jnp.asarray(a)[rows], batch), call)
    changes = [0.0]
    for whole, again in zip(outputs(model, variables, batch, call), part):
        if len(whole) == size and len(again) == len(rows):
            difference = np.linalg.norm(np.ravel(whole[rows] - again))
            changes.append(float(difference / max(np.linalg.norm(np.ravel(whole[rows])), np.finfo(np.float32).tiny)))
    return max(changes)


def _groups(chosen: Sequence[Any], moments: Sequence[Any], domain: Callable[[Any], Any] | None) -> dict[Any, list[Any]]:
    """The moments of batches by domain, where each batch holds one domain; else all of them."""
    groups: dict[Any, list[Any]] = {}
    if domain is not None:
        for batch, found in zip(chosen, moments):
            labels = np.unique(np.asarray(domain(batch))).tolist()
            groups.setdefault(labels[0] if len(labels) == 1 else None, []).append(found)
    mixed = groups.pop(None, [])
    if len(groups) < 2 or len(mixed) > (1 - _MOSTLY) * len(chosen):
        return {None: [*moments]}
    few = [label for label, group in groups.items() if len(group) < 2]
    if few:
        raise ValueError(
            f"Each domain needs two batches at least: {few} have one. Give more data, or a larger `num_batches`."
        )
    return groups


def _parts(*groups: Sequence[Any]) -> list[Any]:
    """The moments of at most eight parts, each of batches of all groups, drawn at random: data may have periods."""
    count = min(_PARTS, *map(len, groups))
    orders = [np.random.default_rng(0).permutation(len(group)) for group in groups]
    return [merge(*(g[k] for g, order in zip(groups, orders) for k in order[i::count])) for i in range(count)]


def _never_estimated(names: Sequence[str], drift: Sequence[Drift]) -> list[Finding]:
    evidence = (
        f"the stored mean is 0 and the variance 1, as `init` leaves them, in {len(names)} of {len(drift)} layers."
    )
    return [_finding("never estimated", names[0], len(names), 0, evidence)] if names else []


def _furthest(trap: Trap, records: Sequence[Drift], noise: Mapping[str, BatchNoise], place: str = "") -> list[Finding]:
    """The layer whose output its statistics change most, against what the noise of a batch does."""

    def limit(record: Drift) -> float:
        return max(noise[record.layer].share, DRIFT_SHARE)

    known = [record for record in records if record.layer in noise]
    far = [record for record in known if not record.share <= limit(record)]
    if not far:
        return []
    worst = max(far, key=lambda record: record.share / limit(record))
    evidence = (
        f"its statistics change the mean square of what it puts out by {worst.share:.1%}, the noise of a batch by "
        f"{noise[worst.layer].share:.1%}; {len(far)} of {len(known)} layers are far from the population."
    )
    return [_finding(trap, worst.layer + place, worst.share, limit(worst), evidence)]


def by_layer(records: Iterable[BatchNoise]) -> dict[str, BatchNoise]:
    """The largest noise of each layer."""
    found: dict[str, BatchNoise] = {}
    for record in sorted(records, key=lambda record: record.share):
        found[record.layer] = record
    return found


def _by_batch(noise: Mapping[str, BatchNoise], batch_stats: Any, rows: RowsByLayer) -> list[BatchNoise]:
    """The noise of layers that put out what the batch makes of their input: those without a counter of renorm steps."""
    leaves = stored.named_leaves(batch_stats)
    renorm = {row.name for path, of_layer in rows.items() if (*path, "steps") in leaves for row in of_layer}
    return [record for name, record in noise.items() if name not in renorm]


def _too_small(noise: Sequence[BatchNoise]) -> list[Finding]:
    worst = max(noise, key=lambda record: record.typical_share, default=None)
    if worst is None or worst.typical_share <= NOISE_SHARE:
        return []
    needed = math.ceil(worst.batch_size * worst.typical_share / NOISE_SHARE)
    evidence = (
        f"{worst.typical_share:.0%} of the variance of what half of its channels put out, or more, is noise of its "
        f"batches of {worst.batch_size}. If these are drawn independently, {needed} samples bring that to a tenth; if "
        "they are sorted, or of one domain each, more do not help: shuffle, or give `domain`."
    )
    return [_finding("batches too small", worst.layer, worst.typical_share, NOISE_SHARE, evidence)]


def _finding(trap: Trap, where: str, number: float, threshold: float, evidence: str) -> Finding:
    return Finding(trap, where, float(number), float(threshold), evidence, CURES[trap])
