"""What a trap of batch normalization is, and how a finding speaks of one."""

import re
from dataclasses import dataclass, replace
from html import escape

HARMLESS_SHARE = 1e-3
"""The part of a normalized value's variance up to which a change is harmless, however small the noise of a batch."""
SIZE = ", batch_size=256"
"""The size of batches in a line of code, until that of the user is known."""
ESTIMATE = f'variables["batch_stats"] = flaxbn.estimate_population_stats(model, variables, data{SIZE})'
"""The line of code that cures statistics which do not fit the data."""


@dataclass(frozen=True)
class Finding:
    """A trap that a model is in, the number that shows it, and the cure; printed, these in words and a line of code.

    Examples:
        >>> from flaxbn import diagnostics
        >>> print(diagnostics.Finding("lagging average", "norm", 0.09, 0.001, "The mean is off.", "Estimate it."))
        lagging average: norm: The mean is off.
            Estimate it.

    Attributes:
        trap: its name, one of those in the table of `diagnose`.
        where: the layer in which it shows most, and the domain.
        number: what was measured there.
        threshold: from where on it is a finding.
        evidence: both in words.
        cure: what to do.
        code: the line of code that does it, with names of your own to be put in; in the words of flax.nnx for a model
            of nnx.
    """

    trap: str
    where: str
    number: float
    threshold: float
    evidence: str
    cure: str
    code: str = ""

    def __str__(self) -> str:
        code = [self.code] if self.code else []
        return "\n    ".join([f"{self.trap}: {self.where}: {self.evidence}", self.cure, *code])

    def _repr_html_(self) -> str:
        code = f"<pre>{escape(self.code)}</pre>" if self.code else ""
        place, words = (escape(text) for text in (f"{self.trap}: {self.where}", f"{self.evidence} {self.cure}"))
        return f"<p><b>{place}</b><br>{words}</p>{code}"


@dataclass(frozen=True)
class Trap:
    """A kind of finding. It is defined beside the rule that finds it, and nowhere else.

    Attributes:
        name: what users know it by, in findings and in the documentation.
        cure: what to do about it, in sentences.
        code: the same as a line of code, for a model of Linen.
    """

    name: str
    cure: str
    code: str

    def finding(self, where: str, number: float, threshold: float, evidence: str) -> Finding:
        """That a model is in this trap; the arguments are the fields of a `Finding`."""
        return Finding(self.name, where, float(number), float(threshold), evidence, self.cure, self.code)


_IN_NNX = (
    (r"\bmodel, variables\b", "*nnx.split(model)"),
    (r'^variables\["batch_stats"\] = (.*)$', r"nnx.update(model, \1)"),
    (r"flaxbn\.(Batch\w+)\(use_running_average=not train", r"flaxbn.nnx.\1(num_features, rngs=rngs"),
    (r", train=False", ""),
)
"""What a line of code says for Linen, and what it says for flax.nnx."""


def to_be_pasted(finding: Finding, *, is_nnx: bool, has_call: bool, batch_size: int | None) -> Finding:
    """The finding with its line of code in the words of the user.

    Args:
        finding: with the line as its trap has it, for Linen.
        is_nnx: whether the model is one of flax.nnx.
        has_call: whether `call` was given, which the line then hands on.
        batch_size: that which was given; None where data is an iterable, which has its own.
    """
    code = finding.code
    for linen, nnx in _IN_NNX if is_nnx else ():
        code = re.sub(linen, nnx, code)
    if has_call:
        code = code.replace(SIZE, f", call=call{SIZE}")
    return replace(finding, code=code.replace(SIZE, "" if batch_size is None else f", batch_size={batch_size}"))


def percent(share: float) -> str:
    """With two digits where it is small, so that a share of a thousandth is not said to be 0 %."""
    return f"{share:.0%}" if share >= 0.1 else f"{100 * share:.2g}%"
