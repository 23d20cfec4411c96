"""Sums in few kernels, as accelerators take them, against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import moments
from hard_data import KINDS, ORDINARY, RATIOS, hard_data

from flaxbn.arithmetic import blocks
from flaxbn.arithmetic.groups import Sharing
from flaxbn.arithmetic.measure import measure_deviations

IN_BLOCKS, AT_ONCE = (64, 8, 8, 256), (4096, 16)
ONE_BY_ONE = 8e-6  # a CPU adds 4096 numbers in their order where several sums are taken at once, a GPU in a tree


def reductions(function, *args):
    """How many arrays each sum of a program takes."""
    return [len(e.outvars) for e in jax.make_jaxpr(function)(*args).eqns if e.primitive.name.startswith("reduce")]


def error(found, expected):
    return np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("ratio", [RATIOS[0], RATIOS[-1]])
@pytest.mark.parametrize(
    ("shape", "kind", "tolerance"),
    [*((IN_BLOCKS, *kind) for kind in KINDS), *((AT_ONCE, kind, ONE_BY_ONE) for kind in ORDINARY)],
)
def test_no_data_spoils_the_variance(shape, ratio, kind, tolerance):
    x = hard_data(kind, ratio, shape)
    sharing = Sharing(tuple(range(x.ndim - 1)))
    pivot, found, _, _ = jax.jit(lambda x: measure_deviations(x, sharing, on="accelerator"))(x)
    count, mean, var = moments(x.reshape(-1, shape[-1]))
    np.testing.assert_array_equal(found.count, count)
    assert error(found.var, var) <= tolerance
    assert np.all(np.abs(found.mean - (mean - pivot)) <= tolerance * np.sqrt(var) + 6e-8 * np.abs(mean))


@pytest.mark.parametrize(("shape", "expected"), [(IN_BLOCKS, [1, 1, 1, 1]), (AT_ONCE, [2]), ((1002, 512), [2])])
def test_all_sums_of_large_arrays_are_taken_at_once(shape, expected):
    """Or those of few positions in blocks, whose sums are added with what follows."""
    x = jnp.zeros(shape)
    axes = tuple(range(x.ndim - 1))
    assert reductions(lambda x: blocks.sums([x, x + 1], axes), x) == expected


@pytest.mark.parametrize("axes", [(0, 1), (1, 2), (0, 2), (1,)])
@pytest.mark.parametrize("arrays", [1, 2])
def test_any_axes(axes, arrays):
    values = [np.random.default_rng(i).normal(size=(32, 3, 300)).astype(np.float32) for i in range(arrays)]
    for found, given in zip(jax.jit(lambda *v: blocks.sums(v, axes))(*values), values, strict=True):
        np.testing.assert_allclose(
            found, given.sum(axes, dtype=np.float64), rtol=1e-5, atol=1e-4
        )  # up to 9600, of which a sum is about 100


def test_in_lanes():
    x = np.random.default_rng(0).normal(1e3, 1.0, size=(3, 64, 300)).astype(np.float32)
    found = jax.vmap(lambda x: measure_deviations(x, Sharing((0,)), on="accelerator").moments)(x)
    np.testing.assert_allclose(found.var, x.astype(np.float64).var(1), rtol=1e-6)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_told_as_ever(value):
    x = np.random.default_rng(0).normal(size=IN_BLOCKS).astype(np.float32)
    x[0, 0, 0, 1] = value
    sharing = Sharing((0, 1, 2))
    alone, together = jax.jit(
        lambda x: [measure_deviations(x, sharing, on=platform) for platform in (None, "accelerator")]
    )(x)
    for name in ("var", "mean"):
        np.testing.assert_array_equal(*(np.isfinite(getattr(m.moments, name)) for m in (alone, together)))
    np.testing.assert_array_equal(alone.overflow, together.overflow)
