"""The traps, and how a finding speaks of one."""

from dataclasses import dataclass
from typing import Literal

Trap = Literal[
    "not finite",
    "training mode at inference",
    "never estimated",
    "lagging average",
    "mixed domains",
    "non-i.i.d. batches",
    "batches too small",
]
HARMLESS_SHARE = 1e-3
"""The part of a normalized value's variance up to which a change is harmless, however small the noise of a batch."""

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
    "non-i.i.d. batches": "Shuffle the examples before they are cut into batches. Where training cannot, use "
    "`flaxbn.BatchRenorm`; or, if each batch is of one domain, give `domain`, and keep statistics for each.",
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

    @classmethod
    def of(cls, trap: Trap, where: str, number: float, threshold: float, evidence: str) -> "Finding":
        """A finding with the cure of its trap."""
        return cls(trap, where, float(number), float(threshold), evidence, CURES[trap])

    def __str__(self) -> str:
        return f"{self.trap}: {self.where}: {self.evidence} {self.cure}"
