"""Traps of layers that renormalize: a ramp that never began, and batches that are too small even so."""

import math

from flaxbn.diagnostics.batch_composition import NOISE_SHARE
from flaxbn.diagnostics.evidence import Evidence
from flaxbn.diagnostics.findings import Finding, Trap

NOT_BEGUN = Trap(
    "renormalization not begun",
    "Give `r_max` and `d_max` schedules that fit the length of the training: by default they are those of the paper, "
    "for runs of 40 000 updates and more.",
    "flaxbn.BatchRenorm(use_running_average=not train, r_max=optax.linear_schedule(1, 3, 1000, 500), "
    "d_max=optax.linear_schedule(0, 5, 1000, 500))",
)


def not_begun(evidence: Evidence) -> list[Finding]:
    """Layers of `BatchRenorm` whose ramp is still at its start: one finding for all of them.

    `Finding.number` is how many updates the furthest of them has had, `threshold` the one from which its ramp opens.
    Without any update nothing is known.
    """
    bounds = evidence.renormalized
    closed = {name: b for name, b in bounds.items() if b.is_scheduled and b.is_known and b.is_closed}
    if not closed:
        return []
    name, furthest = max(closed.items(), key=lambda item: item[1].steps)
    opens = "never" if math.isinf(furthest.opens) else f"from update {furthest.opens:.0f} on"
    text = (
        f"after {furthest.steps:.0f} updates r_max is 1 and d_max 0, so it has been plain batch normalization, as have "
        f"{len(closed)} of {len(bounds)} layers of BatchRenorm; its schedules open {opens}."
    )
    return [NOT_BEGUN.finding(name, furthest.steps, furthest.opens, text)]


TOO_SMALL = Trap(
    "batches too small to renormalize",
    "Normalize by more: larger batches or `axis_name` over devices; or let `r_max` and `d_max` go further, to 3 and 5 "
    "in the paper.",
    "flaxbn.BatchRenorm(use_running_average=not train, r_max=3.0, d_max=5.0)",
)


def out_of_bounds(evidence: Evidence) -> list[Finding]:
    """The layer of `BatchRenorm` with most noise that its bounds leave, where these are known and open."""
    known = {n for n, b in evidence.renormalized.items() if b.is_known and not (b.is_scheduled and b.is_closed)}
    left = [record for records in evidence.left_by_bounds.values() for record in records if record.layer in known]
    worst = max(left, key=lambda record: record.typical_share, default=None)
    if worst is None or worst.typical_share <= NOISE_SHARE:
        return []
    bounds = evidence.renormalized[worst.layer]
    text = (
        f"with r_max {bounds.r_max:.3g} and d_max {bounds.d_max:.3g}, {worst.typical_share:.0%} of what this layer "
        f"puts out is noise of its batches of {worst.batch_size} that is clipped (of the variance, in the median "
        "channel)."
    )
    return [TOO_SMALL.finding(worst.layer, worst.typical_share, NOISE_SHARE, text)]
