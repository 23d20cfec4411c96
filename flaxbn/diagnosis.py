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
from flaxbn.drift import Drift, compare
from flaxbn.gap import Gap, gap
from flaxbn.independence import BatchDependenceError, assert_batch_independent, outputs, split
from flaxbn.moments import merge
from flaxbn.noise import BatchNoise, noise_among, some_batches
from flaxbn.observe import Call
from flaxbn.population import population_moments, to_batch_stats
from flaxbn.request import call_directly, check_model

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
_PARTS = 8

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
    num_batches: int = 64,
    epsilon: float = 1e-5,
) -> Diagnosis:
    """Names the traps that a model is in, with the number that shows each, and its cure. Nothing is changed.

    The weights are frozen, and up to `num_batches` batches of the training data are each normalized by themselves, as
    in training. From their moments come the population, the error of its estimate (from eight parts) and the noise of
    a batch.

    | trap | when |
    | --- | --- |
    | not finite | a stored mean or variance is NaN or infinite, or a variance negative; nothing else is looked at |
    | training mode at inference | `assert_batch_independent` fails; nothing else is looked at |
    | never estimated | a layer's stored mean is all 0 and its variance all 1 |
    | mixed domains | each batch holds one domain, and in a layer the population of all is further from that of one \
domain than those of its batches are: no shared statistics can be right |
    | lagging average | else, in a layer the stored statistics are further from the population's than those of a \
batch are |
    | batches too small | `BatchNoise.share` of a layer exceeds 0.1: a tenth of what it puts out is noise of the batch |

    Distances are root mean squares over the channels, of the mean in standard deviations and of the logarithm of the
    variance, and must be more than three standard errors of the estimate. A distance within the noise of a batch is no
    finding: training has shown the network larger ones in every step.

    Args:
        model: the model.
        variables: its variables with the statistics to be looked at; read only.
        batches: a pytree of arrays of training data in the order of training: `batch_size` consecutive samples are
            normalized together.
        loss_fn: `(output, batch) -> losses`, one for each example.
        batch_size: of the training, on one device where devices do not synchronize.
        call: how the model is run for evaluation, `(module, batch) -> output`; by default `module(batch)`.
        domain: `batch -> labels`, one for each example.
        num_batches: at most so many batches, drawn at random, always the same; at least 16 for errors worth the name.
        epsilon: what the layers add to the variance.

    Raises:
        ValueError: if there are fewer than two batches, or an argument does not fit, as in `gap`.
        TypeError: if `model` is not a `flax.linen.Module`.
    """
    check_model(model)
    chosen = some_batches(batches, batch_size, num_batches)
    broken = _not_finite(variables.get("batch_stats", {})) or _mixing(model, variables, chosen[0], call)
    if broken:
        return Diagnosis(tuple(broken))
    moments = [population_moments(model, variables, [batch], call=call, keep_unseen=True) for batch in chosen]
    groups = _groups(chosen, moments, domain)
    noise = {label: noise_among(group, batch_size, epsilon=epsilon) for label, group in groups.items()}
    of_layer = by_layer(record for records in noise.values() for record in records)
    kept = variables["batch_stats"]
    drift = compare(kept, _parts(*groups.values()), epsilon=epsilon)
    pooled = to_batch_stats(jax.device_get(merge(*moments)), kept, keep_unseen=True)
    apart = [
        finding
        for label, group in groups.items()
        if label is not None
        for finding in _furthest(
            "mixed domains",
            compare(pooled, _parts(group), epsilon=epsilon),
            by_layer(noise[label]),
            f", domain {label}",
        )
    ]
    findings = [
        *_never_estimated(kept, drift),
        *sorted(apart, key=lambda finding: -finding.number)[:1],
        *_too_small(of_layer),
    ]
    if not apart and not _never_estimated(kept, drift):
        findings[:0] = _furthest("lagging average", drift, of_layer)
    losses = gap(model, variables, iter(chosen), loss_fn, call=call, domain=domain)
    return Diagnosis(tuple(findings), drift, noise, losses)


def _not_finite(batch_stats: Any) -> list[Finding]:
    layers = stored.stored_layers(batch_stats)
    wrong: dict[str, int] = {}
    for path, numbers in layers.entries.items():
        mean, var = stored.flat_statistics(batch_stats, layers._replace(entries={path: numbers}))
        if count := int(np.sum(~(np.isfinite(mean) & np.isfinite(var) & (var >= 0)))):
            wrong[stored.layer_name(path)] = count
    if not wrong:
        return []
    evidence = f"{sum(wrong.values())} channels in {len(wrong)} of {len(layers.entries)} layers are so."
    return [_finding("not finite", next(iter(wrong)), sum(wrong.values()), 0, evidence)]


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
    if None in groups or len(groups) < 2:
        return {None: [*moments]}
    few = [label for label, group in groups.items() if len(group) < 2]
    if few:
        raise ValueError(
            f"Each domain needs two batches at least: {few} have one. Give more data, or a larger `num_batches`."
        )
    return groups


def _parts(*groups: Sequence[Any]) -> list[Any]:
    """The moments of at most eight parts, each of batches of all groups."""
    count = min(_PARTS, *map(len, groups))
    return [merge(*(found for group in groups for found in group[i::count])) for i in range(count)]


def _never_estimated(batch_stats: Any, drift: Sequence[Drift]) -> list[Finding]:
    leaves, seen = stored.named_leaves(batch_stats), {record.layer for record in drift}
    names = [
        name
        for path in stored.stored_layers(batch_stats).entries
        for name, index in stored.rows(path, np.shape(leaves[(*path, "mean")]))
        if name in seen
        and not np.any(np.asarray(leaves[(*path, "mean")])[index])
        and np.all(np.asarray(leaves[(*path, "var")])[index] == 1)
    ]
    if not names:
        return []
    evidence = f"the stored mean is 0 and the variance 1, as `init` leaves them, in {len(names)} of {len(seen)} layers."
    return [_finding("never estimated", names[0], len(names), 0, evidence)]


def _furthest(trap: Trap, records: Sequence[Drift], noise: Mapping[str, BatchNoise], place: str = "") -> list[Finding]:
    """The layer whose statistics are further from the population's than a batch's are by the largest factor."""
    far = [found for record in records if (found := _excess(record, noise.get(record.layer))) is not None]
    if not far:
        return []
    factor, what, layer = max(far)
    evidence = (
        f"its {what} is {factor:.1f} times as far from the population's as a batch's is; {len(far)} of {len(records)} "
        "layers are further than a batch."
    )
    return [_finding(trap, layer + place, factor, 1, evidence)]


def _excess(drift: Drift, noise: BatchNoise | None) -> tuple[float, str, str] | None:
    """How many times further than a batch, in what, and the layer; None for a drift within that or within errors."""
    if noise is None or not drift.is_significant:
        return None
    pairs = (("mean", drift.rms_shift, noise.mean), ("variance", drift.rms_log_ratio, noise.var))
    factor, what = max((value / limit if value == value else math.inf, name) for name, value, limit in pairs)
    return (factor, what, drift.layer) if factor > 1 else None


def by_layer(records: Iterable[BatchNoise]) -> dict[str, BatchNoise]:
    """The largest noise of each layer."""
    found: dict[str, BatchNoise] = {}
    for record in sorted(records, key=lambda record: record.share):
        found[record.layer] = record
    return found


def _too_small(noise: Mapping[str, BatchNoise]) -> list[Finding]:
    worst = max(noise.values(), key=lambda record: record.share, default=None)
    if worst is None or worst.share <= NOISE_SHARE:
        return []
    needed = math.ceil(worst.batch_size * worst.share / NOISE_SHARE)
    evidence = (
        f"{worst.share:.0%} of the variance of what it puts out is noise of its batches of {worst.batch_size}; batches "
        f"of {needed} bring that to a tenth."
    )
    return [_finding("batches too small", worst.layer, worst.share, NOISE_SHARE, evidence)]


def _finding(trap: Trap, where: str, number: float, threshold: float, evidence: str) -> Finding:
    return Finding(trap, where, float(number), float(threshold), evidence, CURES[trap])
