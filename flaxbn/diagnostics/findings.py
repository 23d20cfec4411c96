"""What a trap of batch normalization is, and how a finding speaks of one."""

from dataclasses import dataclass

HARMLESS_SHARE = 1e-3
"""The part of a normalized value's variance up to which a change is harmless, however small the noise of a batch."""


@dataclass(frozen=True)
class Finding:
    """A trap that a model is in, the number that shows it, and the cure; printed, a sentence of these.

    Examples:
        >>> from flaxbn import diagnostics
        >>> print(diagnostics.Finding("lagging average", "norm", 0.09, 0.001, "the mean is off.", "Estimate it."))
        lagging average: norm: the mean is off. Estimate it.

    Attributes:
        trap: its name, one of those in the table of `diagnose`.
        where: the layer in which it shows most, and the domain.
        number: what was measured there.
        threshold: from where on it is a finding.
        evidence: both in words.
        cure: what to do.
    """

    trap: str
    where: str
    number: float
    threshold: float
    evidence: str
    cure: str

    def __str__(self) -> str:
        return f"{self.trap}: {self.where}: {self.evidence} {self.cure}"


@dataclass(frozen=True)
class Trap:
    """A kind of finding. It is defined beside the rule that finds it, and nowhere else.

    Attributes:
        name: what users know it by, in findings and in the documentation.
        cure: what to do about it, in sentences.
    """

    name: str
    cure: str

    def finding(self, where: str, number: float, threshold: float, evidence: str) -> Finding:
        """That a model is in this trap; the arguments are the fields of a `Finding`."""
        return Finding(self.name, where, float(number), float(threshold), evidence, self.cure)
