"""Whether batches are too small, or composed of examples that are alike: the same examples shuffled tell them apart."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flaxbn.diagnostics.drift import SIGNIFICANT
from flaxbn.diagnostics.findings import HARMLESS_SHARE, Finding
from flaxbn.diagnostics.noise import BatchNoise

NOISE_SHARE = 0.1
"""The part of a normalized value's variance, noise of the batch, from which batches are too small."""
_ORDER = 2.0
Pair = tuple[BatchNoise, BatchNoise]


def composition(
    noise: Mapping[Any, Sequence[BatchNoise]], shuffled: Mapping[Any, Sequence[BatchNoise]], left_out: Iterable[str]
) -> list[Finding]:
    """What the noise of batches shows, beside that of the same examples shuffled, both by domain."""
    pairs: list[Pair] = []
    for label, records in noise.items():
        others = {record.layer: record for record in shuffled[label]}
        compared = [r for r in records if r.layer in others and r.layer not in left_out]
        pairs += [(r, _over_as_many(r.batches, others[r.layer])) for r in compared]
    alike, small = _alike(pairs), _too_small(pairs)
    return [*alike, *small] or _undecided(pairs)


def _over_as_many(batches: int, shuffled: BatchNoise) -> BatchNoise:
    """The noise of the examples that a row met, over at most so many batches: the more share them, the fewer in each.

    A row of one domain meets only its own batches, but shuffled a part of every batch.
    """
    if shuffled.batches <= batches:
        return shuffled
    return replace(shuffled, typical_share=shuffled.typical_share * batches / shuffled.batches, batches=batches)


def _alike(pairs: Sequence[Pair]) -> list[Finding]:
    alike = [pair for pair in pairs if pair[0].typical_share > _limit(*pair)]
    if not alike:
        return []
    given, anew = max(alike, key=_added)
    worth = max(1.0, given.batch_size * anew.typical_share / given.typical_share)
    evidence = f"{_both(given, anew)}: the examples of a batch are alike, and worth {worth:.2g} independent ones."
    return [Finding.of("non-i.i.d. batches", given.layer, given.typical_share, _limit(given, anew), evidence)]


def _undecided(pairs: Sequence[Pair]) -> list[Finding]:
    """Noise of batches that are too few to tell what did it, their size or their order."""
    loud = [pair for pair in pairs if pair[0].typical_share > max(NOISE_SHARE, _ORDER * pair[1].typical_share)]
    if not loud:
        return []
    given, anew = max(loud, key=_added)
    evidence = (
        f"{_both(given, anew)}: with {given.batches} batches that cannot be told from chance. Give more batches to see "
        "whether they are too small, or their examples alike."
    )
    return [Finding.of("batches too small", given.layer, given.typical_share, NOISE_SHARE, evidence)]


def _added(pair: Pair) -> float:
    """What the order of the examples adds."""
    return pair[0].typical_share - pair[1].typical_share


def _both(given: BatchNoise, shuffled: BatchNoise) -> str:
    shares = _percent(given.typical_share), _percent(shuffled.typical_share)
    return (
        f"{shares[0]} of the variance of what half of its channels put out, or more, is noise of its batches of "
        f"{given.batch_size}, and {shares[1]} where the same examples are shuffled"
    )


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{100 * share:.2g}%"


def _limit(given: BatchNoise, shuffled: BatchNoise) -> float:
    """The noise of batches from which their order did it, `shuffled` being that of the same examples shuffled.

    Twice that, so that what the order adds exceeds what is there without it; three standard errors of the logarithm of
    the ratio, as if all channels strayed together, each variance of K batches having `2 / (K - 1)`; and a thousandth
    more.
    """
    batches = min(given.batches, shuffled.batches)
    ratio = max(_ORDER, math.exp(SIGNIFICANT * math.sqrt(4 / (batches - 1))))
    return max(ratio * shuffled.typical_share, shuffled.typical_share + HARMLESS_SHARE)


def _too_small(pairs: Sequence[Pair]) -> list[Finding]:
    quieter = [min(pair, key=lambda record: record.typical_share) for pair in pairs]
    worst = max(quieter, key=lambda record: record.typical_share, default=None)
    if worst is None or worst.typical_share <= NOISE_SHARE:
        return []
    needed = math.ceil(worst.batch_size * worst.typical_share / NOISE_SHARE)
    evidence = (
        f"{worst.typical_share:.0%} of the variance of what half of its channels put out, or more, is noise of its "
        f"batches of {worst.batch_size}, drawn independently; {needed} samples bring that to a tenth."
    )
    return [Finding.of("batches too small", worst.layer, worst.typical_share, NOISE_SHARE, evidence)]
