"""Ghost batches: each group of examples against float64 numpy on that group alone, the update against all of them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import EPSILON, batch_norm, batch_norm_gradient, moments, wide
from jax.sharding import NamedSharding
from members import MEMBERS, SPLIT, every_map, mesh

import flaxbn
from flaxbn import BatchNorm, BatchRenorm

B, V, C = 24, 8, 3
GROUPS = [slice(k, k + V) for k in range(0, B, V)]
SCALE, BIAS = np.float32([1.5, 0.7, -1.0]), np.float32([0.2, -0.4, 1.0])
RUNNING = np.float32([0.5, -1.0, 2.0]), np.float32([4.0, 0.25, 1.5])
WEIGHTS = (np.linspace(0.5, 2.0, B) * (np.arange(B) % 5 > 0)).astype(np.float32)


def data(offset=0.0, shape=(B, C), seed=0):
    """Groups differ in their means, so that what normalizes them can be seen, and the variance between them counts."""
    rng = np.random.default_rng(seed)
    group = 3 * rng.normal(size=(shape[0] // V, *[1] * (len(shape) - 1)))
    return (rng.normal(size=shape) + np.repeat(group, V, 0) + offset).astype(np.float32)


def variables(mean=RUNNING[0], var=RUNNING[1], **steps):
    return {"params": {"scale": SCALE, "bias": BIAS}, "batch_stats": {"mean": mean, "var": var, **steps}}


@functools.partial(jax.jit, static_argnums=0)
def step(layer, held, x, options):
    y, new = layer.apply(held, x, False, mutable=["batch_stats"], **options)
    return y, new["batch_stats"]


def train(layer, x, held=None, **options):
    return step(layer, held or variables(), x, options)


def with_gradient(layer, x, cotangent, **options):
    y, pull, stats = jax.vjp(lambda x: train(layer, x, **options), x, has_aux=True)
    return y, pull(cotangent)[0], stats


def ghost(layer=BatchNorm, **options):
    return layer(virtual_batch_size=V, momentum=0.75, **options)


def by_group(function, x, *others):
    """`function` of each group of positions and of the same part of what else there is."""
    return np.concatenate([function(x[g], *(a[g] for a in others)) for g in GROUPS])


def normalized(x, weights):
    return batch_norm(x, SCALE, BIAS, weights)


def assert_update(stats, x, weights=None, rounding=1e-6):
    """One update, by the moments of all values."""
    _, mean, var = moments(x.reshape(-1, C), weights)
    np.testing.assert_allclose(stats["mean"], 0.75 * RUNNING[0] + 0.25 * mean, rtol=rounding)
    np.testing.assert_allclose(stats["var"], 0.75 * RUNNING[1] + 0.25 * var, rtol=rounding)


# ---- numbers


@pytest.mark.parametrize("offset", [0.0, 10.0, 1e3, 1e4])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_each_group_is_normalized_alone_and_the_update_is_of_all(offset, weights):
    x, cotangent = data(offset), data(seed=1)
    mask = None if weights is None else weights[:, None]
    y, gradient, stats = jax.jit(functools.partial(with_gradient, ghost()))(x, cotangent, mask=mask)
    weights = np.ones(B) if weights is None else weights
    expected = by_group(normalized, x, weights)
    # Roundings of a normalized value, and of sums of eight.
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    expected = by_group(lambda x, g, w: batch_norm_gradient(x, SCALE, g, w)[0], x, cotangent, weights)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    assert_update(stats, x, weights)


def test_large_groups_are_measured_about_a_sample():
    """Images, of whose positions a part gives the pivot: of each group its own, however far groups lie apart."""
    x = (data(shape=(B, 16, 16, C)) + 1e4 * np.repeat(np.arange(B // V), V)[:, None, None, None]).astype(np.float32)
    y, stats = train(ghost(), x)
    expected = by_group(lambda x: batch_norm(x.reshape(-1, C), SCALE, BIAS), x)
    np.testing.assert_allclose(y.reshape(-1, C), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    assert_update(stats, x)


def test_domains_within_groups():
    domain, held = np.arange(B) // 2 % 2, variables(*(np.stack([a, a]) for a in RUNNING))
    y, stats = train(ghost(num_domains=2), data(), held, domain=domain)
    for number in range(2):
        own = domain == number
        for g in GROUPS:
            expected = batch_norm(data()[g][own[g]], SCALE, BIAS)
            np.testing.assert_allclose(y[g][own[g]], expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
        assert_update(jax.tree.map(lambda a, number=number: a[number], stats), data()[own])


@pytest.mark.parametrize("domain", [1, jnp.array(1)])
def test_a_batch_of_one_domain(domain):
    held = variables(*(np.stack([a, a]) for a in RUNNING))
    y, stats = train(ghost(num_domains=2), data(), held, domain=domain)
    expected = by_group(lambda x: batch_norm(x, SCALE, BIAS), data())
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    assert_update(jax.tree.map(lambda a: a[1], stats), data())
    np.testing.assert_array_equal([stats["mean"][0], stats["var"][0]], RUNNING)


def test_renormalization_within_groups():
    def renormalized(x):
        _, mean, var = moments(x)
        sigma = np.sqrt(wide(RUNNING[1])[0] + EPSILON)
        r = np.clip(np.sqrt(var + EPSILON) / sigma, 1 / 1.5, 1.5)
        d = np.clip((mean - wide(RUNNING[0])[0]) / sigma, -0.5, 0.5)
        return (batch_norm(x) * r + d) * SCALE + BIAS

    y, stats = train(ghost(BatchRenorm, r_max=1.5, d_max=0.5), data())
    expected = by_group(renormalized, data())
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=2e-6 * np.abs(expected).max())  # r, d and both sigmas
    assert_update(stats, data())
    assert stats["steps"] == 1


@pytest.mark.parametrize(("axis", "place"), [(1, 1), (-2, 2)])
def test_the_feature_axis_may_be_any_but_the_first(axis, place):
    x = data(shape=(B, 2, 2, C))
    y, stats = train(ghost(axis=axis), np.moveaxis(x, -1, place))
    expected = by_group(lambda x: batch_norm(x.reshape(-1, C), SCALE, BIAS), x).reshape(x.shape)
    np.testing.assert_allclose(np.moveaxis(y, place, -1), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    assert_update(stats, x)


def test_several_feature_axes():
    x = data(shape=(B, 2, C))
    layer = ghost(axis=(1, 2), use_scale=False, use_bias=False)
    y, _ = train(layer, x, {"batch_stats": {"mean": np.zeros((2, C), "f"), "var": np.ones((2, C), "f")}})
    np.testing.assert_allclose(y, by_group(batch_norm, x.reshape(B, -1)).reshape(x.shape), rtol=1e-6, atol=2e-6)


def test_half_precision_is_measured_in_float32():
    x = jnp.asarray(data(10.0), jnp.bfloat16)
    y, stats = train(ghost(dtype=jnp.bfloat16), x)
    assert (y.dtype, stats["mean"].dtype) == (jnp.bfloat16, jnp.float32)
    expected = by_group(lambda x: batch_norm(x, SCALE, BIAS), np.float64(x))
    np.testing.assert_allclose(np.float64(y), expected, rtol=2.0**-8, atol=1e-6)  # cast once
    assert_update(stats, np.float64(x))


def test_float64_and_complex_values():
    with jax.enable_x64(True):
        x = np.float64(data(1e6))
        held = jax.tree.map(np.float64, variables())
        y, stats = train(ghost(dtype=jnp.float64), x, held)
        np.testing.assert_allclose(y, by_group(lambda x: batch_norm(x, SCALE, BIAS), x), rtol=1e-9, atol=1e-9)
        assert_update(stats, x, rounding=1e-13)
    z = data() + 1j * data(seed=2)
    y, stats = train(ghost(), z.astype(np.complex64), variables(RUNNING[0].astype(np.complex64)))
    np.testing.assert_allclose(y, by_group(lambda z: batch_norm(z, SCALE, BIAS), z), rtol=2e-6, atol=4e-6)
    assert_update(stats, z, rounding=2e-6)


# ---- groups that cannot be used


def by_running_average(x):
    return batch_norm(x, SCALE, BIAS, statistics=RUNNING)


@pytest.mark.parametrize("left", [0, 1])
def test_a_group_of_which_a_mask_leaves_nothing_or_one_value(left):
    x, mask = data(), np.ones(B, bool)
    mask[V + left : 2 * V] = False
    x[~mask] = np.nan
    y, gradient, stats = with_gradient(ghost(), x, np.ones_like(x), mask=mask)
    expected = batch_norm(x[:V], SCALE, BIAS)
    np.testing.assert_allclose(y[:V], expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    one = slice(V, V + left)
    np.testing.assert_allclose(y[one], by_running_average(x[one]), rtol=1e-6, atol=1e-6)
    assert np.all(np.isfinite(y))
    assert np.all(np.isfinite(gradient))
    assert_update(stats, x[mask])  # one value is a value among all


def test_nothing_is_stored_of_a_single_value_in_all_groups():
    for count, steps in ((0, 3), (1, 3), (2, 4)):
        mask = np.arange(B) % V < (np.arange(B) // V < count)  # the first of so many groups
        y, stats = train(ghost(BatchRenorm), data(), variables(steps=np.float32(3)), mask=mask)
        np.testing.assert_allclose(y[mask], by_running_average(data()[mask]), rtol=1e-6, atol=1e-6)
        assert stats["steps"] == steps
        if steps == 3:
            np.testing.assert_array_equal([stats["mean"], stats["var"]], RUNNING)
        else:
            assert_update(stats, data()[mask])


@pytest.mark.parametrize("bad", [np.nan, 3e38])
def test_what_is_not_finite_stays_in_its_group_and_is_not_stored(bad):
    x = data()
    x[0] = bad
    y, stats = train(ghost(), x)
    expected = by_group(lambda x: batch_norm(x, SCALE, BIAS), data())
    np.testing.assert_allclose(y[V:], expected[V:], rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_array_equal([stats["mean"], stats["var"]], RUNNING)


# ---- members, devices


@every_map
@pytest.mark.usefixtures("devices")
def test_groups_stay_within_a_member_and_the_update_is_of_all(mapped):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(MEMBERS, 2 * V, C)) + 5 * rng.normal(size=(MEMBERS, 1, C))).astype(np.float32)
    weights = (rng.random((MEMBERS, 2 * V)) * (np.arange(MEMBERS)[:, None] > 0)).astype(np.float32)
    y, stats = mapped(lambda x, w: train(ghost(axis_name="i"), x, mask=w))(x, weights)
    for k in range(1, MEMBERS):
        for g in GROUPS[:2]:
            expected = batch_norm(x[k, g], SCALE, BIAS, weights[k, g])
            np.testing.assert_allclose(y[k, g], expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max())
    for k in range(MEMBERS):
        member = jax.tree.map(lambda a, k=k: np.asarray(a)[k], stats)
        assert_update(member, x.reshape(-1, C), weights.reshape(-1), 2e-6)


@pytest.mark.usefixtures("devices")
def test_domains_of_members_are_merged_by_their_numbers():
    x = data(shape=(MEMBERS * V, C)).reshape(MEMBERS, V, C)
    domain, held = np.arange(MEMBERS) % 2, variables(*(np.stack([a, a]) for a in RUNNING))
    layer = ghost(axis_name="i", num_domains=2)
    y, stats = jax.vmap(lambda x, d: train(layer, x, held, domain=d), axis_name="i")(x, domain)
    for k in range(MEMBERS):
        expected = batch_norm(x[k], SCALE, BIAS)
        np.testing.assert_allclose(y[k], expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
        for number in range(2):
            row = jax.tree.map(lambda a, k=k, number=number: a[k, number], stats)
            assert_update(row, x[domain == number])


@pytest.mark.usefixtures("devices")
def test_a_sharded_batch_is_the_same():
    x = data(shape=(MEMBERS * V, C))
    split = jax.device_put(x, NamedSharding(mesh(), SPLIT))
    y, stats = train(ghost(), split)
    normalize = jax.jit(lambda x: train(ghost(), x)[0]).lower(split).compile()
    assert "all-reduce" not in normalize.as_text()  # devices exchange nothing to normalize
    assert "all-gather" not in normalize.as_text()
    expected = np.concatenate([batch_norm(x[k : k + V], SCALE, BIAS) for k in range(0, len(x), V)])
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    assert_update(stats, x)


# ---- where it has no effect


def test_evaluation_and_init_take_any_batch():
    for size in (1, V + 1):
        x = data()[:size]
        held = ghost().init(jax.random.key(0), x, use_running_average=False)
        np.testing.assert_array_equal(held["batch_stats"]["mean"], np.zeros(C))
        y = ghost().apply(variables(), x, use_running_average=True)
        np.testing.assert_allclose(y, by_running_average(x), rtol=1e-6, atol=1e-6)


def test_an_update_in_evaluation_is_of_all():
    y, new = ghost().apply(variables(), data(), True, update_running_average=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y, by_running_average(data()), rtol=1e-6, atol=2e-6)
    assert_update(new["batch_stats"], data())


def test_apply_normalizes_by_the_whole_batch():
    y = flaxbn.apply(ghost(use_running_average=True), variables(), data(), statistics="batch")
    np.testing.assert_allclose(y, batch_norm(data(), SCALE, BIAS), rtol=1e-6, atol=4e-6)


def test_an_activation_sees_the_whole_output():
    y = train(ghost(activation=lambda y: y - jnp.max(y, 0, keepdims=True)), data())[0]
    expected = by_group(lambda x: batch_norm(x, SCALE, BIAS), data())
    np.testing.assert_allclose(y, expected - expected.max(0), rtol=1e-6, atol=1e-5)


# ---- what is kept, errors


@pytest.mark.parametrize("layer", [ghost(), ghost(activation=nn.relu), ghost(BatchRenorm, r_max=1.5, d_max=0.5)])
@pytest.mark.parametrize("mask", [None, WEIGHTS[:, None, None, None]])
def test_the_backward_pass_is_handed_the_input_and_sums(layer, mask):
    x = jnp.asarray(data(shape=(B, 16, 16, C)))
    pullback = jax.vjp(lambda x: train(layer, x, mask=mask)[0], x)[1]
    kept = list({id(leaf): leaf for leaf in jax.tree.leaves(pullback)}.values())
    assert sum(leaf.size >= x.size for leaf in kept) == 1
    assert sum(leaf.nbytes for leaf in kept) < 1.02 * x.nbytes  # a few values for each of 2 048 in a group


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "8"])
def test_a_size_that_is_none_is_an_error(size):
    with pytest.raises(ValueError, match=f"`virtual_batch_size` must be a positive integer.*: got {size!r}"):
        BatchNorm(virtual_batch_size=size)


def test_a_batch_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match=r"`virtual_batch_size` must divide .*: got 8 for x of shape \(12, 3\). Use"):
        train(ghost(), data()[:12])


def test_features_along_the_leading_axis_are_an_error():
    with pytest.raises(ValueError, match=r"the leading axis of x must be that of examples: got .*\(0,\).*\(3, 24\)"):
        train(ghost(axis=0), data().T)


def test_one_value_in_each_group_is_an_error():
    layer = BatchNorm(virtual_batch_size=1)
    with pytest.raises(ValueError, match=r"more than one value per channel.*\(24, 3\).*`virtual_batch_size=1`"):
        train(layer, data())
    y, _ = train(layer, data(shape=(B, 2, C)))  # two positions are two values
    np.testing.assert_allclose(y[5], batch_norm(data(shape=(B, 2, C))[5], SCALE, BIAS), rtol=1e-5, atol=1e-5)
