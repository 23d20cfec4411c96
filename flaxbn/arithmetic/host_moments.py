"""Moments in host memory: numpy, in float64, where parts are merged by the million and nothing may be lost.

In float32 a count stands still at 2**24 when ones are added to it, and of parts that are merged one after another each
may be too small to change the whole. Within a compiled program a few hundred parts are merged at once, and float32 is
enough.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from flaxbn.arithmetic.moments import Moments


def is_on_host(moments: Moments) -> bool:
    """Whether all fields are numpy arrays or plain numbers: `merge` then computes here."""
    return all(isinstance(field, np.ndarray | np.generic | int | float | complex) for field in moments)


def merge_stacked(moments: Moments) -> Moments:
    """Merges the Moments along axis 0."""
    return _merge(lambda values: np.sum(values, 0), lambda statistics: statistics, moments)


def merge_numbered(moments: Moments, numbers: np.ndarray, total: int) -> Moments:
    """Merges those of the Moments along axis 0 that have the same number, in [0, total).

    Returns:
        Moments of length `total`, with count 0 where no number leads.
    """

    def sums(values: np.ndarray) -> np.ndarray:
        if np.iscomplexobj(values):
            return sums(values.real) + 1j * sums(values.imag)
        return np.bincount(numbers, values, total)

    return _merge(sums, lambda statistics: statistics[numbers], moments)


def _merge(sums: Callable[[Any], Any], spread: Callable[[Any], Any], moments: Moments) -> Moments:
    """The law of total variance, about the rounded mean of the whole."""
    count, mean, var = (np.asarray(field, np.result_type(field, np.float64)) for field in moments)
    whole = sums(count)
    divisor = np.where(whole > 0, whole, 1)
    pivot = sums(count * mean) / divisor
    deviation = mean - spread(pivot)
    shift = sums(count * deviation) / divisor
    second = sums(count * (var + np.abs(deviation) ** 2)) / divisor
    return Moments(whole, pivot + shift, np.maximum(second - np.abs(shift) ** 2, 0))
