"""Schedules of momentum and the average that they make, against float64 numpy and the formulas of peers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxbn import Debiased, cumulative
from flaxbn.arithmetic.averages import averaged, weight_of_new

STEPS = np.array([0, 1, 2, 7, 100, 1_000, 10_000, 99_999])
VALUES = np.random.default_rng(0).normal(3.0, 2.0, size=(300, 4)).astype(np.float32)


def run(momentum, values=VALUES, initial=(0.0, 1.0, -5.0, 1e8)):
    """The averages after each value."""

    def step(average, numbered):
        value, t = numbered
        average = averaged(average, value, weight_of_new(momentum, t))
        return average, average

    start = jnp.float32(initial)
    return jax.jit(lambda v: jax.lax.scan(step, start, (v, jnp.arange(len(v), dtype=jnp.float32)))[1])(values)


def exact(m, steps):
    """The weight of a new value in the debiased average, in float64."""
    return (1 - m) / (1 - m ** (np.float64(steps) + 1))


def test_cumulative_is_the_mean_of_all():
    expected = np.cumsum(np.float64(VALUES), 0) / np.arange(1, len(VALUES) + 1)[:, None]
    np.testing.assert_allclose(run(cumulative), expected, rtol=0, atol=2e-6)  # a rounding of values of 5 a step


@pytest.mark.parametrize("m", [0.001, 0.5, 0.9, 0.99, 0.999])
def test_debiased_is_haiku_s_average_divided_by_its_weight(m):
    """`hk.ExponentialMovingAverage`: hidden = m hidden + (1 - m) value, from 0; average = hidden / (1 - m^t)."""
    hidden, expected = np.zeros(4), []
    for t, value in enumerate(np.float64(VALUES), 1):
        hidden = m * hidden + (1 - m) * value
        expected.append(hidden / (1 - m**t))
    np.testing.assert_allclose(run(Debiased(m)), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("m", [0.01, 0.9, 0.999, 0.9999])
def test_the_weight_of_a_new_value(m):
    """Its own digits are right, where those of `1 - momentum` would be off by 3e-5 at 0.999 already."""
    found = weight_of_new(Debiased(m), jnp.float32(STEPS))
    np.testing.assert_allclose(found, exact(m, STEPS), rtol=1e-6)
    np.testing.assert_allclose(Debiased(m)(jnp.float32(STEPS)), 1 - exact(m, STEPS), rtol=0, atol=2e-7)
    np.testing.assert_allclose(weight_of_new(cumulative, jnp.float32(STEPS)), 1 / (STEPS + 1), rtol=1e-7)
    np.testing.assert_allclose(cumulative(jnp.float32(STEPS)), STEPS / (STEPS + 1), rtol=0, atol=1e-7)


@pytest.mark.parametrize("momentum", [cumulative, Debiased(0.3), Debiased(0.999)])
def test_the_first_value_replaces_what_was_there(momentum):
    np.testing.assert_array_equal(run(momentum, VALUES[:1])[0], VALUES[0])


def test_of_what_was_not_finite_nothing_is_left():
    found = averaged(jnp.float32([jnp.nan, jnp.inf, 3]), jnp.float32([1, 2, 4]), jnp.float32(1))
    assert found.tolist() == [1, 2, 4]


def test_integer_steps_do_as_well():
    for momentum in (cumulative, Debiased(0.9)):
        found, expected = (momentum(jnp.asarray(STEPS, dtype)) for dtype in (jnp.int32, jnp.float32))
        np.testing.assert_array_equal(found, expected)


def test_an_average_does_not_drift():
    """Of a constant it stays that constant, where weights that do not add up to 1 shift it by 6e-5."""
    values = np.full((30_000, 4), 3.0, np.float32)
    np.testing.assert_allclose(run(Debiased(0.999), values)[-1], 3.0, rtol=2e-7)


def test_a_small_value_after_a_large_one_keeps_its_digits():
    found = averaged(jnp.float32(1.0), jnp.float32(1e-9), jnp.float32(1 - 2**-24))
    np.testing.assert_allclose(found, 2.0**-24 + 1e-9, rtol=1e-6)


@pytest.mark.parametrize("m", [0, 1, -0.1, 1.5, math.nan])
def test_a_momentum_out_of_range_is_an_error(m):
    with pytest.raises(ValueError, match=f"must be more than 0 and less than 1: got {m}"):
        Debiased(m)


@pytest.mark.parametrize("m", ["0.9", None, jnp.float32(0.9)])
def test_a_momentum_that_is_no_number_is_an_error(m):
    with pytest.raises(TypeError, match="`momentum` of Debiased must be a number: got a "):
        Debiased(m)


def test_equal_ones_compare_equal():
    assert Debiased(0.9) == Debiased(0.9)
    assert hash(Debiased(0.9)) == hash(Debiased(0.9))
    assert Debiased(0.9) != Debiased(0.99)
