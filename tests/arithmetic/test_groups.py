"""How many values share statistics, and on how many members."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxbn.arithmetic.groups import Sharing, members, values_per_channel


@pytest.mark.parametrize(("axes", "count"), [((), 1), ((0,), 4), ((0, 1), 20), ((2,), 3)])
def test_values_are_those_along_the_axes(axes, count):
    assert values_per_channel((4, 5, 3), axes) == count


def test_members_multiply_values():
    counts = jax.vmap(lambda x: jnp.full((), values_per_channel(x.shape, (0,), "i")), axis_name="i")(jnp.ones((7, 2)))
    np.testing.assert_array_equal(counts, np.full(7, 14))


def test_the_smallest_group_decides():
    assert members("i", [[0, 1, 2], [3]]) == 1
    assert members(None, [[0, 1]]) == 1


def test_statistics_come_back_to_the_examples_they_are_of():
    sharing = Sharing((0, 1), jnp.array([1, 0, 1, 2]), 2)
    totals = sharing.total(jnp.arange(8.0).reshape(4, 2, 1))
    np.testing.assert_array_equal(totals, [[5], [10]])
    np.testing.assert_array_equal(sharing.spread(totals)[:, 0, 0], [10, 5, 10, np.nan])


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 1, 1), (4, 2, 1), (1, 2, 3), (4, 1, 3), (4, 2, 3)])
def test_counts_are_those_of_weights_written_out(shape):
    weights = np.random.default_rng(0).uniform(0.5, 2, shape).astype(np.float32)
    domain = jnp.array([1, 0, 1, 3])  # the last takes no part
    for sharing in (Sharing((0, 1)), Sharing((0, 1), domain, 3)):
        expected = sharing.total(jnp.broadcast_to(weights, (4, 2, 3)))
        found = sharing.count(weights, (4, 2, 3))
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=2e-7)  # of sums of eight terms


def test_counts_of_examples_are_summed_before_they_are_spread():
    sharing = Sharing((0,), jnp.zeros(64, jnp.int32), 2)
    equations = jax.make_jaxpr(lambda w: sharing.count(w, (64, 1000)))(jnp.ones((64, 1))).jaxpr.eqns
    scattered = [v.aval.size for e in equations if "scatter" in e.primitive.name for v in e.invars]
    assert max(scattered, default=0) <= 64


@pytest.mark.parametrize("examples", [1, 511, 512, 513, 2**20])
@pytest.mark.parametrize("dtype", [np.int8, np.int32])
def test_many_examples_of_a_domain(examples, dtype):
    """In one row, a million float32 values would be off by 2e-4."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0.5, 1.5, (examples, 2)).astype(np.float32)
    domain = rng.integers(-1, 4, examples).astype(dtype)
    found = jax.jit(lambda x, domain: Sharing((0,), domain, 3).total(x))(x, domain)
    expected = [x[domain == k].sum(0, dtype=np.float64) for k in range(3)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)  # some ten roundings
    counts = Sharing((0,), jnp.asarray(domain), 3).count(jnp.ones((1, 1)), x.shape)
    np.testing.assert_array_equal(counts[:, 0], [np.sum(domain == k) for k in range(3)])
