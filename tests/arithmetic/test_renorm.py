"""The correction of batch renormalization at statistics that are easy to see through, and the ramps of Ioffe 2017."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import EPSILON

from flaxbn import Moments, correction, paper_d_max, paper_r_max


@pytest.mark.parametrize(
    ("batch", "running", "r", "d"),
    [
        ((0.0, 4.0), (0.0, 1.0), 2.0, 0.0),
        ((1.0, 1.0), (0.0, 4.0), 0.5, 0.5),  # d divides by the running sigma
        ((0.0, 100.0), (0.0, 1.0), 3.0, 0.0),
        ((0.0, 1.0), (0.0, 100.0), 1 / 3, 0.0),
        ((9.0, 1.0), (0.0, 1.0), 1.0, 5.0),
        ((-9.0, 1.0), (0.0, 1.0), 1.0, -5.0),
        ((3.0, 16.0), (-1.0, 4.0), 2.0, 2.0),
    ],
)
def test_correction_at_chosen_statistics(batch, running, r, d):
    batch, running = (Moments(1.0, *(np.float32(s) for s in pair)) for pair in (batch, running))
    found = correction(batch, running, r_max=3.0, d_max=5.0, epsilon=0.0)
    np.testing.assert_allclose(found, (r, d), rtol=1e-6)


def test_epsilon_is_added_to_both_variances_once():
    batch, running = Moments(1.0, np.float32(0.05), np.float32(1e-3)), Moments(1.0, np.float32(0), np.float32(0.0))
    found = correction(batch, running, r_max=9.0, d_max=9.0, epsilon=1e-3)
    np.testing.assert_allclose(found, (np.sqrt(2), 0.05 / np.sqrt(1e-3)), rtol=1e-6)


@pytest.mark.parametrize("field", range(4))
def test_correction_is_a_constant(field):
    def total(values):
        return sum(correction(Moments(1.0, *values[:2]), Moments(1.0, *values[2:]), r_max=3, d_max=5, epsilon=EPSILON))

    values = [jnp.float32(v) for v in (1.0, 1.2, 0.5, 1.1)]
    assert jax.grad(total)(values)[field] == 0.0


@pytest.mark.parametrize(
    ("step", "r_max", "d_max"),
    [
        (0, 1, 0),
        (5_000, 1, 0),
        (5_001, 1 + 2 / 35_000, 5 / 20_000),
        (15_000, 1 + 20 / 35, 2.5),
        (22_500, 2, 4.375),
        (25_000, 1 + 40 / 35, 5),
        (40_000, 3, 5),
        (1_000_000, 3, 5),
    ],
)
def test_the_paper_s_ramps(step, r_max, d_max):
    for given in (step, jnp.int32(step)):
        np.testing.assert_allclose(paper_r_max(given), r_max, rtol=1e-6)
        np.testing.assert_allclose(paper_d_max(given), d_max, rtol=1e-6)
