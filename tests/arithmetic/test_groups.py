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
