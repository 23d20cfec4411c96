"""Traps of stored statistics that do not fit the data: never estimated, behind the weights, or of several domains.

What does not fit is said in one unit, the share of a normalized value's variance that it changes. A change is a finding
where it exceeds what the noise of a batch does in every step of training, and a thousandth, and three standard errors
of the estimate.
"""

from collections.abc import Mapping, Sequence

from flaxbn.diagnostics.drift import Drift
from flaxbn.diagnostics.evidence import Evidence
from flaxbn.diagnostics.findings import ESTIMATE, HARMLESS_SHARE, SIZE, Finding, Trap, percent
from flaxbn.diagnostics.noise import BatchNoise, by_layer

NEVER_ESTIMATED = Trap(
    "never estimated",
    "Estimate the statistics before inference, with the weights frozen.",
    ESTIMATE,
)


def never_estimated(evidence: Evidence) -> list[Finding]:
    """Layers that ran, and whose stored statistics are still those of `init`: one finding for all of them.

    `Finding.number` is how many there are, and `where` the first of them.
    """
    names = evidence.never_estimated
    if not names:
        return []
    text = f"the stored mean is 0 and the variance 1, as `init` leaves them, in {len(names)} of {_all(evidence.drift)}."
    return [NEVER_ESTIMATED.finding(names[0], len(names), 0, text)]


MIXED_DOMAINS = Trap(
    "mixed domains",
    "Keep statistics for each domain: `flaxbn.domains.estimate` and `flaxbn.domains.select` for this model, "
    "`num_domains` in a new one.",
    f'stats = flaxbn.domains.estimate(model, variables, {{"one": one, "other": other}}{SIZE})',
)


def mixed_domains(evidence: Evidence) -> list[Finding]:
    """The domain that is furthest from the population of all, which is the best that they can share.

    Only where batches hold one domain each: where they are mixed, training normalizes domains together as well.
    """
    found = [
        finding
        for label, drift in evidence.domain_drift.items()
        for finding in _furthest(
            MIXED_DOMAINS, drift, by_layer(evidence.noise[label]), "this domain alone", f", domain {label}"
        )
    ]
    return sorted(found, key=lambda finding: -finding.number)[:1]


LAGGING_AVERAGE = Trap(
    "lagging average",
    "Before inference take the statistics of `flaxbn.estimate_population_stats`; while training, validate with "
    '`flaxbn.apply(..., statistics="batch")`.',
    ESTIMATE,
)


def lagging_average(evidence: Evidence) -> list[Finding]:
    """The layer whose stored statistics are furthest from the population's.

    Where no shared statistics can be right they are far however well they were estimated, and mixed domains say so.
    """
    if mixed_domains(evidence):
        return []
    estimated = [record for record in evidence.drift if record.layer not in evidence.never_estimated]
    largest = by_layer(record for records in evidence.noise.values() for record in records)
    return _furthest(LAGGING_AVERAGE, estimated, largest, "the data")


def _furthest(
    trap: Trap, records: Sequence[Drift], noise: Mapping[str, BatchNoise], whose: str, place: str = ""
) -> list[Finding]:
    """The layer whose output its statistics change most, against what the noise of a batch does.

    Args:
        trap: what it is a finding of.
        records: how far its statistics are from a population.
        noise: that of a batch, by layer; of a layer without noise nothing is known.
        whose: what that is the population of.
        place: what comes behind the layer's name.

    Returns:
        One finding, or none where no layer is far; NaN is far.
    """

    def limit(record: Drift) -> float:
        return max(noise[record.layer].share, HARMLESS_SHARE)

    known = [record for record in records if record.layer in noise]
    far = [record for record in known if not record.share <= limit(record)]
    if not far:
        return []
    worst = max(far, key=lambda record: record.share / limit(record))
    text = (
        f"changing to the statistics of {whose} would change what this layer puts out by {percent(worst.share)} (mean "
        f"square, in units of its variance); noise of the batch explains {percent(noise[worst.layer].share)}. "
        f"{len(far)} of {_all(known)} are far off."
    )
    return [trap.finding(worst.layer + place, worst.share, limit(worst), text)]


def _all(records: Sequence[Drift]) -> str:
    """How many records there are, and what they are of."""
    return f"{len(records)} {'rows of statistics' if any(r.layer.endswith(']') for r in records) else 'layers'}"
