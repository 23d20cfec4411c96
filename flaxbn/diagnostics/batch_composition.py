"""Traps of batches that are too small, or hold examples that are alike: the same examples shuffled tell them apart.

Both show as noise of the batch. Noise that shuffling takes away came from the order of the examples; what shuffling
leaves came from the size of the batch.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from flaxbn.diagnostics.drift import SIGNIFICANT
from flaxbn.diagnostics.evidence import Evidence
from flaxbn.diagnostics.findings import HARMLESS_SHARE, Finding, Trap, percent
from flaxbn.diagnostics.noise import BatchNoise

NOISE_SHARE = 0.1
"""The part of a normalized value's variance, noise of the batch, from which batches are too small."""
_ORDER = 2.0
"""So many times the noise of the same examples shuffled, and their order adds more than is there without it."""
Pair = tuple[BatchNoise, BatchNoise]
"""The noise of one row of statistics: of the batches as they are, and of the same examples shuffled."""

ALIKE = Trap(
    "non-i.i.d. batches",
    "Shuffle the examples before they are cut into batches. Where training cannot, use `flaxbn.BatchRenorm`; or, if "
    "each batch is of one domain, give `domain`, and keep statistics for each.",
    "rows = np.random.default_rng(epoch).permutation(num_examples)  # in each epoch, before batches are cut",
)


def alike_batches(evidence: Evidence) -> list[Finding]:
    """The layer to which the order of the examples adds most noise, where their order did it significantly."""
    alike = [pair for pair in _pairs(evidence) if pair[0].typical_share > _limit(*pair)]
    if not alike:
        return []
    given, anew = max(alike, key=_added)
    worth = max(1.0, given.batch_size * anew.typical_share / given.typical_share)
    text = (
        f"{_both(given, anew)} The {given.batch_size} examples of a batch are alike: they are worth {worth:.2g} "
        "independent ones."
    )
    return [ALIKE.finding(given.layer, given.typical_share, _limit(given, anew), text)]


TOO_SMALL = Trap(
    "batches too small",
    "Normalize by more: larger batches, `axis_name` over devices, or `flaxbn.BatchRenorm`; estimate with "
    '`method="exact"`, which does not depend on the batch size.',
    "flaxbn.BatchRenorm(use_running_average=not train, r_max=optax.linear_schedule(1, 3, 1000, 500), "
    "d_max=optax.linear_schedule(0, 5, 1000, 500))",
)


def small_batches(evidence: Evidence) -> list[Finding]:
    """The layer with most noise that shuffling leaves; else noise of which too few batches tell what did it."""
    pairs = _pairs(evidence)
    return _small(pairs) or ([] if alike_batches(evidence) else _undecided(pairs))


def _small(pairs: Sequence[Pair]) -> list[Finding]:
    """Noise that is there in either order: the smaller of the two, since examples may also be drawn to differ."""
    quieter = [min(pair, key=lambda record: record.typical_share) for pair in pairs]
    worst = max(quieter, key=lambda record: record.typical_share, default=None)
    if worst is None or worst.typical_share <= NOISE_SHARE:
        return []
    needed = math.ceil(worst.batch_size * worst.typical_share / NOISE_SHARE)
    text = (
        f"{worst.typical_share:.0%} of what this layer puts out is noise of its batches of {worst.batch_size} (of the "
        f"variance, in the median channel), although they are drawn independently. Batches of {needed} bring that to a "
        "tenth."
    )
    return [TOO_SMALL.finding(worst.layer, worst.typical_share, NOISE_SHARE, text)]


def _undecided(pairs: Sequence[Pair]) -> list[Finding]:
    """Noise of batches that are too few to tell what did it, their size or their order."""
    loud = [pair for pair in pairs if pair[0].typical_share > max(NOISE_SHARE, _ORDER * pair[1].typical_share)]
    if not loud:
        return []
    given, anew = max(loud, key=_added)
    text = (
        f"{_both(given, anew)} With {given.batches} batches that cannot be told from chance. Give more batches to see "
        "whether they are too small, or their examples alike."
    )
    return [TOO_SMALL.finding(given.layer, given.typical_share, NOISE_SHARE, text)]


def _pairs(evidence: Evidence) -> list[Pair]:
    """Of each row, in each domain; layers that renormalize are no part of it."""
    pairs: list[Pair] = []
    for label, records in evidence.noise.items():
        others = {record.layer: record for record in evidence.shuffled[label]}
        compared = [r for r in records if r.layer in others and r.layer not in evidence.renormalized]
        pairs += [(r, _over_as_many(r.batches, others[r.layer])) for r in compared]
    return pairs


def _over_as_many(batches: int, shuffled: BatchNoise) -> BatchNoise:
    """The noise of the examples that a row met, over at most so many batches: the more share them, the fewer in each.

    A row of one domain meets only its own batches, but shuffled a part of every batch.
    """
    if shuffled.batches <= batches:
        return shuffled
    return replace(shuffled, typical_share=shuffled.typical_share * batches / shuffled.batches, batches=batches)


def _added(pair: Pair) -> float:
    """What the order of the examples adds."""
    return pair[0].typical_share - pair[1].typical_share


def _both(given: BatchNoise, shuffled: BatchNoise) -> str:
    """Both noises in a sentence."""
    return (
        f"{percent(given.typical_share)} of what this layer puts out is noise of its batches of {given.batch_size} (of "
        f"the variance, in the median channel), and {percent(shuffled.typical_share)} where the same examples are "
        "shuffled."
    )


def _limit(given: BatchNoise, shuffled: BatchNoise) -> float:
    """The noise of batches from which their order did it, `shuffled` being that of the same examples shuffled.

    Twice that, so that what the order adds exceeds what is there without it; three standard errors of the logarithm of
    the ratio, as if all channels strayed together, each variance of K batches having `2 / (K - 1)`; and a thousandth
    more.
    """
    batches = min(given.batches, shuffled.batches)
    ratio = max(_ORDER, math.exp(SIGNIFICANT * math.sqrt(4 / (batches - 1))))
    return max(ratio * shuffled.typical_share, shuffled.typical_share + HARMLESS_SHARE)
