"""Moments against float64 numpy, and the laws of their monoid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import assert_moments, moments
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import flaxbn
from flaxbn import Moments, measure, merge
from flaxbn.arithmetic.moments import is_moments, merge_along, merge_numbered

N, C, PARTS = 24, 3, 4
RATIOS = [0.0, 10.0, 1e3, 1e4]  # |mean| / std

measured = jax.jit(lambda x, w: measure(x, (0,), weights=w))
gradients = jax.jit(jax.jacrev(lambda x, w: tuple(jnp.sum(m) for m in measure(x, (0,), weights=w)[1:]), (0, 1)))
by_label = jax.jit(lambda x, labels: [measure(x, (0,), weights=(labels == k)[:, None]) for k in range(PARTS)])
merged = jax.jit(merge)


def unstacked(m):
    return [Moments(*fields) for fields in zip(*m)]


def data(ratio=0.0, n=N, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, C)) * [1.0, 0.5, 3.0]
    return (x + ratio * np.array([1.0, -0.5, 3.0])).astype(np.float32)


# Half-precision numbers around a large offset: constant columns, ties and outliers are all likely.
values = st.builds(
    lambda x, offset: x.astype(np.float32) + np.float32(offset),
    hnp.arrays(np.float32, (N, C), elements=st.floats(-100, 100, width=16, allow_subnormal=False)),
    st.sampled_from([0.0, -3.0, 1e3, 1e6]),
)
labels = hnp.arrays(np.int32, N, elements=st.integers(0, PARTS - 1))
repeats = hnp.arrays(np.int32, N, elements=st.integers(0, 4)).filter(lambda k: k.sum() > 0)
law = settings(max_examples=60)


@law
@given(values, labels, st.permutations(range(PARTS)))
def test_any_split_merged_in_any_order_is_the_whole(x, labels, order):
    parts = by_label(x, labels)
    assert_moments(merged(*(parts[k] for k in order)), moments(x))


@law
@given(values, labels)
def test_merge_is_associative(x, labels):
    a, b, c, d = by_label(x, labels)
    for found in (merged(merged(merged(a, b), c), d), merged(a, merged(b, merged(c, d)))):
        assert_moments(found, moments(x), rounding=8e-7)  # three merges, each of which rounds the mean


@law
@given(values, labels)
def test_merge_is_commutative(x, labels):
    a, b, *_ = by_label(x, labels)
    assert_moments(merged(b, a), np.asarray(merged(a, b), np.float64), rounding=1.2e-7)


@law
@given(values)
def test_merge_has_a_zero(x):
    alone = measured(x, None)
    zero = jax.tree.map(jnp.zeros_like, alone)
    for found in (merged(alone, zero), merged(zero, alone), merged(alone, Moments(0, 0, 0)), merged(alone)):
        assert_moments(found, np.asarray(alone, np.float64), rounding=1.2e-7)


def test_zero_merged_with_zero_is_zero():
    for field in merge(Moments(0, 0, 0), Moments(0, 0, 0)):
        np.testing.assert_array_equal(field, 0.0)


@law
@given(values, repeats)
def test_weight_k_is_k_repetitions(x, k):
    assert_moments(measured(x, k[:, None].astype(np.float32)), moments(np.repeat(x, k, axis=0)))
    assert_moments(measured(x, k[:, None]), moments(np.repeat(x, k, axis=0)))


@law
@given(values, st.permutations(range(N)))
def test_order_of_the_values_is_irrelevant(x, order):
    assert_moments(measured(x[np.array(order)], None), moments(x))


@law
@given(values, repeats, st.sampled_from([np.nan, np.inf, -np.inf]))
def test_what_weight_zero_hides_is_irrelevant(x, k, hidden):
    poisoned = np.where(k[:, None] > 0, x, np.float32(hidden))
    assert_moments(measured(poisoned, (k > 0)[:, None]), moments(x[k > 0]))


@pytest.mark.parametrize("ratio", RATIOS)
def test_variance_within_1e_5_of_float64(ratio):
    x = data(ratio, n=4096)
    _, mean, var = moments(x)
    found = measured(x, None)
    np.testing.assert_allclose(found.var, var, rtol=1e-5)
    assert np.all(
        np.abs(found.mean - mean) <= 1e-6 * np.sqrt(var) + 6e-8 * np.abs(mean)
    )  # half a unit in the last place


def test_variance_of_a_large_data_set_in_batches_of_64():
    x = data(1e4, n=100_000)
    batches = measure(x[: 22 * 71 * 64].reshape(22, 71, 64, C).swapaxes(0, 1), (2,))
    chunks = jax.jit(lambda parts: merge(*unstacked(parts)))(batches)
    found = merge(*unstacked(chunks), measure(x[22 * 71 * 64 :], (0,)))
    count, mean, var = moments(x)
    np.testing.assert_array_equal(found.count, count)
    np.testing.assert_allclose(found.var, var, rtol=1e-5)
    np.testing.assert_allclose(found.mean, mean, rtol=1.2e-7)


def test_the_split_of_fvcore():
    x = data(10.0, n=128)
    parts = np.split(x, np.cumsum([2, 2, 4, 8, 16, 32]))
    assert [len(part) for part in parts] == [2, 2, 4, 8, 16, 32, 64]
    assert_moments(merge(*(measure(part, (0,)) for part in parts)), moments(x))


def test_the_variance_between_sorted_parts_counts():
    x = np.sort(data(n=64), axis=0)
    parts = [measure(part, (0,)) for part in np.split(x, [5, 20])]
    assert_moments(merge(*parts), moments(x))
    assert np.all(np.mean([part.var for part in parts], axis=0) < 0.5 * moments(x)[2])


def test_unequal_counts_weigh_the_mean():
    found = merge(Moments(1, 8.0, 0.0), Moments(3, 0.0, 4.0))
    assert (float(found.count), float(found.mean), float(found.var)) == (4.0, 2.0, 15.0)


def test_trees_merge_leaf_by_leaf():
    a, b = data(), data(10.0)
    trees = [{"one": measure(x, (0,)), "many": [measure(-x, (0,))]} for x in (a, b)]
    found = merge(*trees)
    assert_moments(found["one"], moments(np.concatenate([a, b])))
    assert_moments(found["many"][0], moments(-np.concatenate([a, b])))


def test_merge_along_merges_an_array_axis():
    x = data(1e3, n=64)
    stacked = Moments(*(jnp.stack(field, axis=1) for field in zip(*(measure(p, (0,)) for p in np.split(x, [5, 20])))))
    assert stacked.mean.shape == (C, 3)
    assert_moments(merge_along(stacked, axis=1), moments(x))


def test_is_moments_tells_them_from_other_tuples():
    assert is_moments(Moments(0, 0, 0))
    assert not is_moments((0, 0, 0))


@pytest.mark.parametrize("axes", [(0, 2), (2, 0), (-3, -1), (1,), (-1,), (0, 1, 2)])
def test_any_axes_are_reduced(axes):
    x = np.random.default_rng(1).normal(2.0, 1.5, size=(4, 3, 5)).astype(np.float32)
    rest = sorted({0, 1, 2} - {a % 3 for a in axes})
    shape = tuple(x.shape[a] for a in rest)
    flat = np.transpose(x, [*sorted(a % 3 for a in axes), *rest]).reshape(-1, int(np.prod(shape)))
    assert_moments(measure(x, axes), [field.reshape(shape) for field in moments(flat)])


@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 1, 1), (1, 3, 1), (1, 1, 5), (4, 1, 5), (1, 1, 1)])
def test_weights_broadcast_along_axes_of_length_1(shape):
    rng = np.random.default_rng(2)
    x, w = rng.normal(7.0, size=(4, 3, 5)).astype(np.float32), rng.uniform(0.1, 3.0, shape).astype(np.float32)
    full = np.broadcast_to(w, x.shape)
    expected = moments(x.transpose(0, 2, 1).reshape(20, 3), full.transpose(0, 2, 1).reshape(20, 3))
    assert_moments(measure(x, (0, 2), weights=w), expected)


@pytest.mark.parametrize("nothing", [-2.0, np.nan, 0.0, -np.inf])
def test_a_weight_that_is_not_positive_takes_no_part(nothing):
    x, w = data(3.0), np.linspace(0.5, 2.0, N, dtype=np.float32)
    w[5:9] = nothing
    assert_moments(measured(x, w[:, None]), moments(x[w > 0], w[w > 0]))


@pytest.mark.parametrize("x", [data()[:0], np.full((N, C), np.nan, np.float32)], ids=["no values", "no weight"])
def test_no_weight_at_all_is_the_zero(x):
    for field in measure(x, (0,), weights=jnp.zeros((len(x), 1))):
        np.testing.assert_array_equal(field, np.zeros(C))


@pytest.mark.parametrize("ratio", RATIOS)
def test_gradients_are_those_of_float64(ratio):
    x, w = data(ratio), np.random.default_rng(3).uniform(0.2, 2.0, (N, 1)).astype(np.float32)
    count, mean, var = moments(x, w)
    of_mean, of_var = gradients(x, w)
    centered = x.astype(np.float64) - mean
    tolerance = {"rtol": 2e-6, "atol": 2e-7}  # the mean within the deviations is exact to some 1e-7 of the spread
    np.testing.assert_allclose(of_mean[0], np.broadcast_to(w / count, x.shape), **tolerance)
    np.testing.assert_allclose(of_var[0], 2 * w * centered / count, **tolerance)
    np.testing.assert_allclose(of_mean[1][:, 0], (centered / count).sum(1), **tolerance)
    np.testing.assert_allclose(of_var[1][:, 0], ((centered**2 - var) / count).sum(1), **tolerance)


def test_no_gradient_at_or_from_hidden_values():
    x, w = data(5.0), np.arange(N)[:, None] % 3 > 0
    poisoned = np.where(w, x, np.nan).astype(np.float32)
    found = jax.grad(lambda x: jnp.sum(measured(x, w).var + 2 * measured(x, w).mean))(poisoned)
    _, mean, _ = moments(x[w[:, 0]])
    expected = np.where(w, 2 * (x - mean) + 2, 0) / w.sum()
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-7)


def test_gradient_of_a_constant_channel_is_zero():
    x = np.full((N, C), np.float32(0.1))
    for fast in (False, True):
        found = jax.grad(lambda x: jnp.sum(measure(x, (0,), fast=fast).var))(x)  # noqa: B023
        np.testing.assert_allclose(found, 0.0, atol=1e-8)


def total_variance(theta):
    count, mean, var = theta
    center = (count * mean).sum(0) / count.sum(0)
    return center, (count * (var + (mean - center) ** 2)).sum(0) / count.sum(0)


merge_gradients = jax.jit(
    jax.jacrev(lambda t: tuple(field[0] for field in merge(*(Moments(*t[:, i]) for i in range(3)))[1:]))
)


@pytest.mark.parametrize("ratio", [0.0, 1e3])
def test_gradient_of_merge_is_that_of_the_law_of_total_variance(ratio):
    theta = np.stack([[[3.0], [7.0], [2.0]], [[ratio + 1], [ratio - 1], [ratio + 0.5]], [[0.5], [1.5], [0.25]]])
    for field in (0, 1):
        found, step = merge_gradients(theta.astype(np.float32))[field], 1e-4
        for index in np.ndindex(3, 3):
            delta = np.zeros_like(theta)
            delta[index] = step
            expected = (total_variance(theta + delta)[field] - total_variance(theta - delta)[field])[0] / (2 * step)
            # Central differences of order step**2, of numbers of size `ratio` in float64.
            np.testing.assert_allclose(found[index][0], expected, rtol=2e-6, atol=1e-8 + 1e-11 * ratio)


def test_second_derivatives():
    x = np.array([[1.0], [2.5], [-0.5]], np.float32)
    w = np.array([[1.0], [2.0], [0.5]], np.float32)
    p = (w / w.sum())[:, 0]
    hessian = jax.jit(jax.hessian(lambda x: measure(x, (0,), weights=w)))(x)
    np.testing.assert_allclose(hessian.var[0, :, 0, :, 0], 2 * (np.diag(p) - np.outer(p, p)), atol=2e-7)
    np.testing.assert_allclose(hessian.mean, 0, atol=1e-8)


def test_forward_mode():
    x, tangent = data(10.0), data(seed=7)
    _, found = jax.jvp(jax.jit(lambda x: measure(x, (0,))), (x,), (tangent,))
    centered = x - moments(x)[1]
    np.testing.assert_allclose(found.mean, tangent.mean(0, dtype=np.float64), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.var, 2 * (centered * tangent).mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.count, 0.0)


def test_vmap_measures_each_batch():
    x, w = np.stack([data(r) for r in (0.0, 1e3)]), np.stack([np.arange(N) % 2 > 0, np.arange(N) % 3 > 0])[..., None]
    found = jax.vmap(lambda x, w: measure(x, (0,), weights=w))(x, w)
    for k in range(2):
        assert_moments(jax.tree.map(lambda a: a[k], found), moments(x[k], w[k]))  # noqa: B023


def test_the_one_pass_form_is_good_at_small_ratios_only():
    x = data(1.0)
    assert_moments(measure(x, (0,), fast=True), moments(x), rounding=2e-6)
    far = data(1e4, n=4096)
    fast, var = measure(far, (0,), fast=True).var, moments(far)[2]
    assert np.all(fast >= 0)
    assert np.max(np.abs(fast - var) / var) > 0.1


def test_the_one_pass_form_clips_at_zero():
    for seed in range(20):
        x = np.random.default_rng(seed).normal(3e4, 1e-3, size=(64, 8)).astype(np.float32)
        assert np.all(measure(x, (0,), fast=True).var >= 0)


@pytest.mark.parametrize("fast", [False, True])
def test_complex_values(fast):
    x = (data(1.0) + 1j * data(2.0, seed=4)).astype(np.complex64)
    found = measure(x, (0,), weights=(np.arange(N) > 2)[:, None], fast=fast)
    assert_moments(found, moments(x[3:]), rounding=4e-6 if fast else 4e-7)
    assert (found.count.dtype, found.mean.dtype, found.var.dtype) == (jnp.float32, jnp.complex64, jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.int8, jnp.uint8, jnp.int32])
def test_narrow_values_are_measured_in_float32(dtype):
    x = jnp.asarray(np.random.default_rng(5).integers(90, 120, (3000, C)), dtype)  # 3000 is no bfloat16
    found = measure(x, (0,))
    assert all(field.dtype == jnp.float32 for field in found)
    assert_moments(found, moments(np.asarray(x, np.float64)))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_computing_in_half_precision_keeps_the_count(dtype):
    found = measure(data(n=3001), (0,), dtype=dtype)
    np.testing.assert_array_equal(found.count, 3001.0)
    assert all(field.dtype == jnp.float32 for field in found)
    np.testing.assert_allclose(found.var, moments(data(n=3001))[2], rtol=0.02)  # two to three digits


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x = np.random.default_rng(6).normal(1e6, 1.0, size=(N, C))
        found = merge(measure(x[:9], (0,)), measure(x[9:], (0,)))
        assert all(field.dtype == jnp.float64 for field in found)
        np.testing.assert_allclose(found.var, moments(x)[2], rtol=1e-9)


def test_measure_is_not_numpys_unbiased_variance():
    x = data(n=4)
    np.testing.assert_allclose(measure(x, (0,)).var, x.astype(np.float64).var(0, ddof=0), rtol=1e-6)


@pytest.mark.parametrize("shape", [(N,), (N, 2), (2, C), (1, N, 1), ()])
def test_weights_of_another_shape_are_an_error(shape):
    with pytest.raises(ValueError, match=r"`weights` must have rank 2.*got weights of shape .* shape \(24, 3\)"):
        measure(data(), (0,), weights=np.ones(shape))


@pytest.mark.parametrize("axes", [(2,), (-3,), (0, 5)])
def test_an_axis_out_of_range_is_an_error(axes):
    with pytest.raises(ValueError, match=r"ax[ei]s"):
        measure(data(), axes)


def test_merging_nothing_is_an_error():
    with pytest.raises(ValueError, match="`merge` needs at least one Moments"):
        merge()


def test_merging_different_shapes_is_an_error():
    with pytest.raises(ValueError, match=r"must have the same shape: got means of shapes \(3,\), \(1,\)"):
        merge(measure(data(), (0,)), measure(data()[:, :1], (0,)))


def test_the_catalogue_exports_the_monoid():
    assert flaxbn.Moments is Moments
    assert flaxbn.Moments._fields == ("count", "mean", "var")


class TestOnTheHost:
    """Numpy Moments merge in float64, whatever order and however many."""

    def test_many_small_parts_one_after_another(self):
        """In float32 the count stands still at 2**24."""
        total, one = Moments(np.float64(1e9), np.float64(0), np.float64(1)), Moments(*map(np.float64, (30, 1, 1)))
        for _ in range(2000):
            total = merge(total, one)
        share = 60_000 / (1e9 + 60_000)
        assert total.count == 1e9 + 60_000
        np.testing.assert_allclose(total.mean, share, rtol=1e-12)
        np.testing.assert_allclose(total.var, 1 + share * (1 - share), rtol=1e-12)

    @pytest.mark.parametrize("offset", [0.0, 1e4, 1e4 + 1e4j])
    def test_millions_at_once(self, offset):
        """Values of variance 1/4 in two million parts, as a long pass collects them."""
        mean = np.tile([offset, offset + 1], 10**6)
        moments = Moments(np.full(len(mean), 30.0), mean, np.zeros(len(mean)))
        found = merge_numbered(moments, np.zeros(len(mean), int), 2)
        np.testing.assert_allclose(found.count, [6e7, 0])
        np.testing.assert_allclose(found.mean, [offset + 0.5, 0], rtol=1e-14)
        np.testing.assert_allclose(found.var, [0.25, 0], rtol=1e-9)  # roundings of 1e4 in float64, many times

    def test_nothing_is_nothing_in_floats(self):
        empty = Moments(*np.zeros((3, 0)))
        found = merge_numbered(empty, np.zeros(0, int), 2)
        for field in found:
            assert (field.dtype, field.tolist()) == (np.float64, [0, 0])

    def test_what_has_a_number_of_its_own_stays_to_the_last_digit(self):
        """And what has none, or a count of 0, is zero, whatever stands beside that."""
        given = Moments(np.array([3.0, 0, 7]), np.array([1 / 3, 5, 0.1 + 2j]), np.array([0.1, np.nan, 0.3]))
        found = merge_numbered(given, np.array([3, 1, 0]), 4)
        np.testing.assert_array_equal(found.count, [7, 0, 0, 3])
        np.testing.assert_array_equal(found.mean, [0.1 + 2j, 0, 0, 1 / 3])
        np.testing.assert_array_equal(found.var, [0.3, 0, 0, 0.1])

    def test_beside_an_array_of_jax_it_is_one_of_jax(self):
        host, device = Moments(*np.ones((3, 2))), Moments(*jnp.ones((3, 2)))
        assert all(isinstance(field, np.ndarray) for field in merge(host, host, Moments(0, 0, 0)))
        assert all(isinstance(field, jax.Array) for field in merge(host, device))

    def test_trees(self):
        tree = {"a": Moments(*np.ones((3, 2), np.float32))}
        assert merge(tree, tree)["a"].mean.dtype == np.float64
