"""The statistics of a batch, as a layer passes them from where they are measured to where they are used and stored."""

from typing import NamedTuple

from jaxtyping import Array

from flaxbn.arithmetic.moments import Moments


class Batch(NamedTuple):
    """The statistics of a batch, whose mean is `pivot + deviations.mean` before that sum is rounded.

    Attributes:
        pivot: a constant to differentiation.
        deviations: the Moments of `x - pivot`.
        usable: for each channel, whether its statistics are those of more than one value, and did not overflow. Where
            the batch holds NaN they are NaN, and used, so that it shows.
    """

    pivot: Array
    deviations: Moments
    usable: Array
