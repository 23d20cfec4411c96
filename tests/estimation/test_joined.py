"""Moments of several calls, end to end: merged along batches, and fetched in few arrays."""

import jax
import numpy as np
import pytest

from flaxbn import Moments
from flaxbn.estimation.joined import Pending, Record, fetched, join, merge_joined

RNG = np.random.default_rng(0)
SHAPES = [(2, 3), (), (4,)]
STEPS = 5


def moments(shape, is_complex):
    """Those of some batches, along a leading axis."""
    count, mean, var = RNG.uniform(1, 2, size=(3, STEPS, *shape)).astype(np.float32)
    return Moments(count, (mean + 1j * var).astype(np.complex64) if is_complex else mean, var)


def records(given, single=()):
    """With a single value in the first channel of these (call, batch)."""
    flags = [np.zeros(m.count.shape, bool) for m in given]
    for call, batch in single:
        flags[call].reshape(STEPS, -1)[batch, 0] = True
    return [Record(*pair) for pair in zip(given, flags)]


def merged(given):
    """By the law of total variance, in float64."""
    count, mean, var = (np.asarray(field, np.result_type(field, np.float64)) for field in given)
    total = count.sum(0)
    middle = (count * mean).sum(0) / total
    return Moments(total, middle, (count * (var + np.abs(mean - middle) ** 2)).sum(0) / total)


@pytest.mark.parametrize("by_device", [False, True])
@pytest.mark.parametrize("is_complex", [[False] * 3, [True] * 3, [False, True, False]])
def test_what_is_joined_and_merged_comes_back(is_complex, by_device):
    given = [moments(shape, c) for shape, c in zip(SHAPES, is_complex)]
    steps = jax.vmap(join)(records(given))
    if by_device:  # of two devices alike
        steps = jax.tree.map(lambda a: np.stack([a, a], 1), steps)
    packed = jax.jit(merge_joined, static_argnames="by_device")(steps, by_device=by_device)
    assert len(jax.tree.leaves(packed)) == len(set(is_complex)) + any(is_complex)
    entries = [np.zeros(shape, int) for shape in SHAPES]
    (found,) = fetched([Pending(entries, range(STEPS), packed, is_complex)])
    assert found.first_bad == found.first_single == [-1, -1, -1]
    for one, own in zip(found.moments, given, strict=True):
        expected = merged(own)._replace(count=(1 + by_device) * own.count.sum(0))
        for a, b in zip(one, expected):
            np.testing.assert_allclose(a, b, rtol=1e-6)  # float32
            assert np.iscomplexobj(a) == np.iscomplexobj(b)


@pytest.mark.parametrize("by_device", [False, True])
@pytest.mark.parametrize("field", ["mean", "var"])
def test_the_first_batch_that_is_not_finite(field, by_device):
    """Of each call, whichever channel and whichever device it is in."""
    given = [moments(shape, is_complex=False) for shape in SHAPES]
    getattr(given[0], field)[3, 1, 2] = np.nan
    getattr(given[0], field)[2, 0, 1] = np.inf
    getattr(given[2], field)[4] = -np.inf
    steps = jax.vmap(join)(records(given, single=[(0, 4), (0, 3), (1, 0)]))
    if by_device:
        healthy = jax.tree.map(np.ones_like, steps)
        healthy = [r._replace(single=np.zeros_like(r.single)) for r in healthy]
        steps = jax.tree.map(lambda a, b: np.stack([a, b], 1), healthy, steps)
    packed = merge_joined(steps, by_device=by_device)
    (found,) = fetched([Pending([np.zeros(s, int) for s in SHAPES], range(STEPS), packed, [False] * 3)])
    assert found.first_bad == [2, -1, 4]
    assert found.first_single == [3, 0, -1]
