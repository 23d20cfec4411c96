"""Moments merged over the members of a mapped axis: the oracle is float64 numpy over the union of their values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import assert_moments, moments
from members import GROUPS, MEMBERS, C, N, data, every_map, grouping_maps, weights

from flaxbn import measure, merge_across


@every_map
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.usefixtures("devices")
def test_merge_across_is_the_union_weighted_by_count(mapped, offset):
    found = mapped(lambda x, w: merge_across(measure(x, (0,), weights=w[:, None]), "i"))(data(offset), weights())
    for k in range(MEMBERS):
        assert_moments(
            jax.tree.map(lambda a: np.asarray(a[k]), found),  # noqa: B023
            moments(data(offset).reshape(-1, C), weights().reshape(-1)),
        )


@grouping_maps
@pytest.mark.usefixtures("devices")
def test_merge_across_merges_within_groups(mapped):
    found = mapped(lambda x, w: merge_across(measure(x, (0,), weights=w[:, None]), "i", GROUPS))(data(), weights())
    for group in GROUPS:
        expected = moments(data()[group].reshape(-1, C), weights()[group].reshape(-1))
        for k in group:
            assert_moments(jax.tree.map(lambda a: np.asarray(a[k]), found), expected)  # noqa: B023


def test_merge_across_in_forward_and_reverse_mode():
    merged = jax.vmap(lambda x: merge_across(measure(x, (0,)), "i"), axis_name="i")
    x, tangent = data(10.0), data()[::-1]
    union, count = x.reshape(-1, C).astype(np.float64), MEMBERS * N
    slope = 2 * (union - union.mean(0)) / count
    _, found = jax.jvp(merged, (x,), (tangent,))
    np.testing.assert_allclose(found.var[0], (slope * tangent.reshape(-1, C)).sum(0), rtol=1e-5)
    gradient = jax.grad(lambda x: jnp.sum(merged(x).var[0]))(x).reshape(-1, C)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-7)
