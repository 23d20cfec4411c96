"""What the rules of a diagnosis look at, gathered once.

A rule is a function from evidence to findings that computes nothing with the model: whatever costs a pass over data is
measured here. Some rules come first and look at the subject alone, see preconditions.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from flaxbn.arithmetic.moments import is_moments, merge
from flaxbn.data.batches import count_samples
from flaxbn.data.progress import Counter
from flaxbn.data.samples import hide
from flaxbn.diagnostics.drift import Drift, compare
from flaxbn.diagnostics.findings import HARMLESS_SHARE
from flaxbn.diagnostics.loss_gap import Gap, gap
from flaxbn.diagnostics.noise import BatchNoise, noise_among
from flaxbn.diagnostics.renorm_layers import Bounds, bounds_of_rows, renormalized
from flaxbn.diagnostics.sample import by_shape, joined, labels_of, reshuffled, some_batches, strided
from flaxbn.estimation.precise import batch_moments
from flaxbn.models.arguments import Model
from flaxbn.models.batch_stats import select, with_wide_statistics
from flaxbn.models.entries import read_layers
from flaxbn.models.linen import Call, check_layers, trace
from flaxbn.models.rows import RowsByLayer, never_estimated, rows_of
from flaxbn.models.unseen import leaves_unseen, note

_MOSTLY = 0.9
"""The share of batches that must hold one domain each for domains to be told apart; a few borders do no harm."""
_PARTS = 8
"""Into so many parts the batches go for the error of the estimate, which is then known to about a quarter."""
_EXAMPLES = 8
"""So many examples at least show whether predictions depend on the batch: both parts of them are then unlike ones."""

NoiseByDomain = Mapping[Any, tuple[BatchNoise, ...]]
"""The noise of each layer by the label of a domain, or under None where batches are not of one domain each."""


@dataclass(frozen=True, eq=False)
class Subject:
    """What is diagnosed: a model, and batches of one size to look at it with.

    Attributes:
        model: the model.
        variables: its variables, with the statistics that are to be looked at.
        call: how it is run for evaluation.
        only: the layers that training normalizes by their batches.
        batches: those that are looked at, in the order of training.
        are_cut: whether they were cut out of arrays, which an estimate cuts in another way.
        batch_size: how many samples each of them holds.
        example: a batch of at least eight samples, if there are as many, to look at outputs with.
        counter: counts the batches that are passed, those of every pass.
    """

    model: Model
    variables: Mapping[str, Any]
    call: Call | None
    only: Callable[[str], bool] | None
    batches: Sequence[Any]
    are_cut: bool
    batch_size: int
    example: Any
    counter: Counter

    @classmethod
    def of(
        cls,
        model: Model,
        variables: Mapping[str, Any],
        batches: Any,
        *,
        call: Call | None,
        only: Callable[[str], bool] | None,
        batch_size: int | None,
        num_batches: int,
        counter: Counter,
    ) -> "Subject":
        """The subject of `diagnose`, which has the same arguments."""
        drawn = some_batches(batches, batch_size, num_batches)
        size = count_samples(drawn[0])
        several = joined(by_shape(drawn)[0][: -(-_EXAMPLES // size)])
        example = jax.tree.map(lambda a: a[: max(size, _EXAMPLES)], several)
        return cls(model, variables, call, only, drawn, batch_size is not None, size, example, counter)

    def note_unseen(self) -> None:
        """Notes what takes part in the model without a tap; a model that runs no batch-norm layer is an error."""
        variables, batch = with_wide_statistics(self.variables), hide(self.batches[0])
        traced = trace(self.model, variables, batch, self.call, None)
        check_layers(traced.program, self.model, variables)
        others = len(jax.tree.leaves(batch))
        reading = read_layers(traced.program, variables, others)
        wanted = select(reading.layers, self.only).entries
        note(leaves_unseen(traced.program, traced.written, variables, others, reading, wanted))

    def moments_of(self, batches: Iterable[Any]) -> list[Any]:
        """The moments of each batch, which is normalized by itself in all layers, as in training."""
        found = batch_moments(self.model, self.variables, batches, call=self.call, only=self.only)
        return [*self.counter.each(found)]

    @functools.cached_property
    def moments(self) -> list[Any]:
        """Those of `batches`, a tree for each; what is not finite in them is a NotFiniteError."""
        return self.moments_of(self.batches)

    @functools.cached_property
    def rows(self) -> RowsByLayer:
        """Which channels of each layer are normalized together."""
        return rows_of(self.model, self.variables, self.batches[0], call=self.call)


@dataclass(frozen=True, eq=False)
class Evidence:
    """All that is known of a subject whose values are finite and whose predictions do not depend on the batch.

    Attributes:
        drift: the stored statistics against those of all data, a record for each row of statistics that saw data.
        never_estimated: the rows among these whose stored statistics are the initial ones.
        domain_drift: for each domain the statistics of all data against those of this domain; empty where batches do
            not hold one domain each.
        noise: of batches, by domain where batches hold one domain each, else under None.
        shuffled: as `noise`, of the same examples in batches drawn anew within each domain.
        renormalized: the rows of `BatchRenorm` layers, which do not put out what the batch makes of their input, with
            their bounds.
        losses: what normalization adds to the loss, by domain, and under None for all.
        left_by_bounds: of these rows, what `shuffled` is where they renormalize.
    """

    drift: tuple[Drift, ...]
    never_estimated: tuple[str, ...]
    domain_drift: Mapping[Any, tuple[Drift, ...]]
    noise: NoiseByDomain
    shuffled: NoiseByDomain
    renormalized: Mapping[str, Bounds]
    losses: Mapping[Any, Gap]
    left_by_bounds: NoiseByDomain = field(default_factory=dict)


def gather(
    subject: Subject, loss_fn: Callable[[Any, Any], Array], domain: Callable[[Any], Any] | None, epsilon: float
) -> Evidence:
    """Measures everything: the noise of batches, as they are and shuffled, the drift of what is stored, and losses.

    Args:
        subject: the model and its data.
        loss_fn: `(output, batch) -> losses`, one for each example.
        domain: `batch -> labels`, one for each example, or None.
        epsilon: what the layers add to the variance.

    Raises:
        ValueError: if a domain has one batch only, or `loss_fn` or `domain` does not give one value for each example.
        NotFiniteError: if moments of the shuffled batches overflow, where those of the batches themselves did not.
    """
    model, variables, call, rows = subject.model, subject.variables, subject.call, subject.rows
    stored = variables["batch_stats"]
    numbers = _numbers_by_domain(subject.batches, domain)
    groups = {label: [subject.moments[i] for i in of_one] for label, of_one in numbers.items()}
    batches = {label: [subject.batches[i] for i in of_one] for label, of_one in numbers.items()}
    anew = {label: subject.moments_of(reshuffled(of_one)) for label, of_one in batches.items()}
    drift = _drift(subject, groups, batches, epsilon)
    ran = {record.layer for record in drift}
    bounds = bounds_of_rows(model, variables, subject.batches[0], call, rows)
    left = {label: renormalized(moments, rows, bounds, epsilon) for label, moments in anew.items()}
    return Evidence(
        drift=drift,
        never_estimated=tuple(row.name for row in never_estimated(stored, rows) if row.name in ran),
        domain_drift=_domain_drift(subject, groups, epsilon),
        noise=_noise_by_domain(subject, groups, epsilon),
        shuffled=_noise_by_domain(subject, anew, epsilon),
        renormalized=bounds,
        losses=gap(model, variables, subject.counter.each(subject.batches), loss_fn, call=call, domain=domain),
        left_by_bounds={} if not bounds else _noise_by_domain(subject, left, epsilon),
    )


def _drift(
    subject: Subject, groups: Mapping[Any, Sequence[Any]], batches: Mapping[Any, Sequence[Any]], epsilon: float
) -> tuple[Drift, ...]:
    """What is stored against the population of batches as in training or, if that is much closer, as an estimate's.

    Behind the first layer a population depends on the batches that it is measured by. A running average is that of
    those of training; an estimate of arrays is that of strided ones, which differ where the data are sorted.
    """

    def against(population: Mapping[Any, Sequence[Any]]) -> tuple[Drift, ...]:
        stored = subject.variables["batch_stats"]
        return compare(stored, _parts(*population.values()), rows=subject.rows, epsilon=epsilon)

    def distance(records: tuple[Drift, ...]) -> float:
        return max((record.rms_shift**2 + record.rms_log_ratio**2 / 4 for record in records), default=0.0)

    drift = against(groups)
    if not subject.are_cut or distance(drift) <= HARMLESS_SHARE:
        return drift
    as_estimated = against({label: subject.moments_of(strided(of_one)) for label, of_one in batches.items()})
    return as_estimated if distance(as_estimated) < distance(drift) / 2 else drift


def _numbers_by_domain(batches: Sequence[Any], domain: Callable[[Any], Any] | None) -> dict[Any, list[int]]:
    """The numbers of batches by domain, where each batch holds one domain; else all of them."""
    everything = {None: [*range(len(batches))]}
    if domain is None:
        return everything
    groups: dict[Any, list[int]] = {}
    for number, batch in enumerate(batches):
        labels = np.unique(labels_of(domain, batch)).tolist()
        groups.setdefault(labels[0] if len(labels) == 1 else None, []).append(number)
    mixed = groups.pop(None, [])
    if len(groups) < 2 or len(mixed) > (1 - _MOSTLY) * len(batches):
        return everything
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


def _domain_drift(
    subject: Subject, groups: Mapping[Any, Sequence[Any]], epsilon: float
) -> dict[Any, tuple[Drift, ...]]:
    """The best statistics that all domains can share against those of each: what is far here no estimate can mend."""
    pooled = jax.tree.map(lambda m: {"mean": m.mean, "var": m.var}, merge(*subject.moments), is_leaf=is_moments)
    return {
        label: compare(pooled, _parts(group), rows=subject.rows, epsilon=epsilon)
        for label, group in groups.items()
        if label is not None
    }


def _noise_by_domain(subject: Subject, groups: Mapping[Any, Sequence[Any]], epsilon: float) -> NoiseByDomain:
    """Of the batches whose moments are given, those of each domain about a population of their own."""
    return {
        label: noise_among(group, subject.batch_size, subject.rows, epsilon=epsilon) for label, group in groups.items()
    }
