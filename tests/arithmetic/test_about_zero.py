"""Sums of the values themselves, as an estimate takes them on a CPU, against float64 numpy."""

import functools

import jax
import numpy as np
import pytest
from formulas import moments
from hard_data import KINDS, hard_data

from flaxbn.arithmetic.groups import Sharing
from flaxbn.arithmetic.measure import measure_deviations

SHAPE = (64, 8, 8, 32)  # 131 072 values; of fewer than 65 536 the mean is taken first
SHARING = Sharing((0, 1, 2))
TWO_VALUES = "two values"  # whose squares are all rounded alike


def measured(x, on="cpu"):
    return jax.jit(functools.partial(measure_deviations, sharing=SHARING, on=on))(x)


def data(kind, ratio):
    if kind != TWO_VALUES:
        return hard_data(kind, ratio, SHAPE)
    return (ratio + np.where(np.random.default_rng(0).random(SHAPE) < 0.5, 1, -1)).astype(np.float32)


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1.9, 2.1, 10.0, 1e3, 1e4])
@pytest.mark.parametrize(("kind", "tolerance"), [*KINDS, (TWO_VALUES, 2e-6)])
def test_no_data_spoils_the_variance(kind, ratio, tolerance):
    x = data(kind, ratio)
    found = measured(x)
    count, mean, var = moments(x.reshape(-1, SHAPE[-1]))
    deviations = found.deviations
    np.testing.assert_array_equal(deviations.count, count)
    assert np.linalg.norm(deviations.var - var) <= tolerance * np.linalg.norm(var)
    assert np.all(np.abs(deviations.mean - (mean - found.pivot)) <= tolerance * np.sqrt(var) + 6e-8 * np.abs(mean))


@pytest.mark.parametrize(("ratio", "about_zero"), [(0.0, True), (1.9, True), (2.1, False)])
def test_one_channel_that_would_lose_digits_decides(ratio, about_zero):
    """The bound is two standard deviations."""
    x = hard_data("ordinary", 0.0, SHAPE)
    x[..., 7] += ratio
    pivot = measured(x).pivot
    assert np.all(pivot == 0) == about_zero
    if not about_zero:
        np.testing.assert_allclose(pivot, x.mean((0, 1, 2)), atol=1e-5)


def test_a_constant_channel():
    x = hard_data("ordinary", 0.0, SHAPE)
    x[..., 3], x[..., 4] = 0, 0.1
    found = measured(x).moments
    np.testing.assert_array_equal(found.mean[3:5], np.float32([0, 0.1]))
    assert found.var[3] == 0
    assert found.var[4] <= 1e-15  # a rounding of 0.1 squared


def test_squares_that_overflow_about_zero_only():
    x = 1e17 * hard_data("ordinary", 300.0, SHAPE)  # squares of 3e19 are above 3.4e38, those of 1e17 are not
    found = measured(x)
    assert not np.any(found.overflow)
    np.testing.assert_allclose(found.deviations.var, x.astype(np.float64).var((0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e25])
def test_what_is_not_finite_is_told_as_ever(value):
    x = hard_data("ordinary", 0.0, SHAPE)
    x[0, 0, 0, 1] = value
    alone, together = measured(x, None), measured(x)
    for name in ("var", "mean"):
        np.testing.assert_array_equal(*(np.isfinite(getattr(m.moments, name)) for m in (alone, together)))
    np.testing.assert_array_equal(alone.overflow, together.overflow)
