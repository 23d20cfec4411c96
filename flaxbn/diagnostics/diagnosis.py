"""Which trap of batch normalization a model is in."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array

from flaxbn.arithmetic.moments import is_moments, merge
from flaxbn.data.batches import count_samples
from flaxbn.diagnostics.batch_composition import composition
from flaxbn.diagnostics.drift import Drift, compare
from flaxbn.diagnostics.findings import HARMLESS_SHARE, Finding, Trap
from flaxbn.diagnostics.loss_gap import Gap, gap
from flaxbn.diagnostics.noise import BatchNoise, by_layer, noise_among
from flaxbn.diagnostics.preconditions import mixing, not_finite, not_finite_loss, not_finite_statistics
from flaxbn.diagnostics.sample import by_shape, joined, reshuffled, some_batches
from flaxbn.estimation.layer_moments import NotFiniteError
from flaxbn.estimation.precise import batch_moments
from flaxbn.layers.linen import BatchRenorm
from flaxbn.models.arguments import call_directly, check_model
from flaxbn.models.batch_stats import Path
from flaxbn.models.linen import Call, trace
from flaxbn.models.rows import RowsByLayer, never_estimated, rows_of

_MOSTLY = 0.9
_PARTS = 8
_EXAMPLES = 8


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found; printed, it is the findings in words.

    Attributes:
        findings: the traps, those that hide others first; empty where nothing is wrong.
        drift: the stored statistics against those of all data.
        noise: of batches, by domain where batches hold one domain each, else under None.
        gap: what normalization adds to the loss, by domain, and under None for all.
        shuffled: as `noise`, where the examples of these batches, those of each domain by themselves, are shuffled.
    """

    findings: tuple[Finding, ...]
    drift: tuple[Drift, ...] = ()
    noise: Mapping[Any, tuple[BatchNoise, ...]] | None = None
    gap: Mapping[Any, Gap] | None = None
    shuffled: Mapping[Any, tuple[BatchNoise, ...]] | None = None

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
    batch_size: int | None = None,
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
    | not finite | statistics, weights, data, outputs or losses hold NaN or infinities, or a stored variance is \
negative |
    | training mode at inference | `assert_batch_independent` fails |
    | never estimated | a layer's stored mean is all 0 and its variance all 1 |
    | mixed domains | nine batches in ten or more hold one domain, and the population of all is far from that of one: \
no shared statistics can be right |
    | lagging average | else, the stored statistics of a layer are far from the population's |
    | non-i.i.d. batches | `BatchNoise.typical_share` of a layer is more than twice that of the same examples \
shuffled, significantly: the examples of a batch are alike |
    | batches too small | `BatchNoise.typical_share` of a layer exceeds 0.1, of the examples shuffled too: a tenth of \
what half of its channels put out is noise of the batch; or it is twice that of the examples shuffled, but the batches \
are too few to say that their order did it |

    After one of the first two nothing else is looked at. *Far* is what changes a layer's output by more than the noise
    of a batch does, `Drift.share` against `BatchNoise.share`: training has shown the network that much in every step;
    by more than a thousandth of its variance; and by more than three standard errors of the estimate.

    Layers of `BatchRenorm` are never found to have such batches: they put out what the running average makes of their
    input.

    Args:
        model: the model.
        variables: its variables with the statistics to be looked at; read only.
        batches: training data in the order of training. With `batch_size` a pytree of arrays, of which so many
            consecutive samples are normalized together; without, an iterable of batches of one size, each normalized
            by itself. It is read once, up to `num_batches` batches, which are held; a smaller last one is left out.
        loss_fn: `(output, batch) -> losses`, one for each example.
        batch_size: of the training, on one device where devices do not synchronize; where arrays are given.
        call: how the model is run for evaluation, `(module, batch) -> output`; by default `module(batch)`.
        domain: `batch -> labels`, one for each example.
        only: `path -> bool`, the layers that training normalizes by their batches; by default all. Leave
            out frozen ones.
        num_batches: at most so many batches, at least 16 for errors worth the name. Of arrays or of a list of batches
            they are drawn at random, always the same. Of another iterable they are the first: then the population is
            that of these, which is not that of all where the data are sorted, and an order that changes more slowly
            does not show.
        epsilon: what the layers add to the variance.

    Raises:
        ValueError: if there are fewer than two batches, or of several sizes; or an argument does not fit, as in `gap`.
        TypeError: if `model` is not a `flax.linen.Module`, or `batches` does not fit `batch_size`.
    """
    check_model(model)
    chosen = some_batches(batches, batch_size, num_batches)
    size = count_samples(chosen[0])
    example = jax.tree.map(lambda a: a[: max(size, _EXAMPLES)], joined(by_shape(chosen)[0][: -(-_EXAMPLES // size)]))
    broken = not_finite(model, variables, chosen, example, call) or mixing(model, variables, example, call)
    if broken:
        return Diagnosis(tuple(broken))
    rows = rows_of(model, variables, chosen[0], call=call)

    def measured(batches: Iterable[Any]) -> list[Any]:
        return [*batch_moments(model, variables, batches, call=call, only=only)]

    def noise_of(groups: Mapping[Any, Sequence[Any]]) -> dict[Any, tuple[BatchNoise, ...]]:
        return {label: noise_among(group, size, rows, epsilon=epsilon) for label, group in groups.items()}

    try:
        moments, numbers = measured(chosen), _groups(chosen, domain)
    except NotFiniteError as error:
        return Diagnosis((not_finite_statistics(error),))
    groups = {label: [moments[i] for i in group] for label, group in numbers.items()}
    noise = noise_of(groups)
    shuffled = noise_of({k: measured(reshuffled([chosen[i] for i in group])) for k, group in numbers.items()})
    of_layer = by_layer(record for records in noise.values() for record in records)
    kept = variables["batch_stats"]
    drift = compare(kept, _parts(*groups.values()), rows=rows, epsilon=epsilon)
    ran = {record.layer for record in drift}
    untouched = [row.name for row in never_estimated(kept, rows) if row.name in ran]
    far = _apart(moments, groups, noise, rows, epsilon)
    if not far:
        far = _furthest("lagging average", [r for r in drift if r.layer not in untouched], of_layer)
    composed = composition(noise, shuffled, _renormalized(model, variables, chosen[0], call, rows))
    losses = gap(model, variables, iter(chosen), loss_fn, call=call, domain=domain)
    findings = (*not_finite_loss(losses[None]), *_never_estimated(untouched, drift), *far, *composed)
    return Diagnosis(findings, drift, noise, losses, shuffled)


def _apart(
    moments: Sequence[Any],
    groups: Mapping[Any, Sequence[Any]],
    noise: Mapping[Any, Any],
    rows: RowsByLayer,
    epsilon: float,
) -> list[Finding]:
    """The domain that is furthest from the population of all."""
    pooled = jax.tree.map(lambda m: {"mean": m.mean, "var": m.var}, merge(*moments), is_leaf=is_moments)
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


def _groups(chosen: Sequence[Any], domain: Callable[[Any], Any] | None) -> dict[Any, list[int]]:
    """The numbers of batches by domain, where each batch holds one domain; else all of them."""
    groups: dict[Any, list[int]] = {}
    if domain is None:
        return {None: [*range(len(chosen))]}
    for number, batch in enumerate(chosen):
        labels = np.unique(np.asarray(domain(batch))).tolist()
        groups.setdefault(labels[0] if len(labels) == 1 else None, []).append(number)
    mixed = groups.pop(None, [])
    if len(groups) < 2 or len(mixed) > (1 - _MOSTLY) * len(chosen):
        return {None: [*range(len(chosen))]}
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
    evidence = f"the stored mean is 0 and the variance 1, as `init` leaves them, in {len(names)} of {_all(drift)}."
    return [Finding.of("never estimated", names[0], len(names), 0, evidence)] if names else []


def _all(records: Sequence[Drift]) -> str:
    return f"{len(records)} {'rows of statistics' if any(r.layer.endswith(']') for r in records) else 'layers'}"


def _furthest(trap: Trap, records: Sequence[Drift], noise: Mapping[str, BatchNoise], place: str = "") -> list[Finding]:
    """The layer whose output its statistics change most, against what the noise of a batch does."""

    def limit(record: Drift) -> float:
        return max(noise[record.layer].share, HARMLESS_SHARE)

    known = [record for record in records if record.layer in noise]
    far = [record for record in known if not record.share <= limit(record)]
    if not far:
        return []
    worst = max(far, key=lambda record: record.share / limit(record))
    evidence = (
        f"its statistics change the mean square of what it puts out by {worst.share:.1%}, the noise of a batch by "
        f"{noise[worst.layer].share:.1%}; {len(far)} of {_all(known)} are far from the population."
    )
    return [Finding.of(trap, worst.layer + place, worst.share, limit(worst), evidence)]


def _renormalized(
    model: nn.Module, variables: Mapping[str, Any], batch: Any, call: Call | None, rows: RowsByLayer
) -> set[str]:
    """The rows of `BatchRenorm` layers, which do not put out what the batch makes of their input."""
    paths: set[Path] = set()

    def note(method: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, BatchRenorm):
            paths.add(context.module.path)
        return method(*args, **kwargs)

    with nn.intercept_methods(note):
        trace(model, variables, batch, call or call_directly, None)
    return {row.name for path in paths for row in rows.get(path, ())}
