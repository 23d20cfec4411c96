"""Layers that synchronize over many members: the oracle is float64 numpy over the union of their values."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import batch_norm, batch_norm_gradient, moments
from jax.sharding import NamedSharding, PartitionSpec
from members import GROUPS, MEMBERS, SPLIT, C, N, by_pmap, by_vmap, data, every_map, grouping_maps, mesh, weights

from flaxbn import BatchNorm, BatchRenorm

SCALE, BIAS = np.float32([1.5, 0.7, -1.0]), np.float32([0.2, -0.4, 1.0])
RUNNING = np.float32([0.5, -1.0, 2.0]), np.float32([4.0, 0.25, 1.5])
VARIABLES = {"params": {"scale": SCALE, "bias": BIAS}, "batch_stats": {"mean": RUNNING[0], "var": RUNNING[1]}}


def train(layer, x, **kwargs):
    y, new = layer.apply(VARIABLES, x, use_running_average=False, mutable=["batch_stats"], **kwargs)
    return y, new["batch_stats"]


def assert_output(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max())


def assert_update(stats, x, w=None):
    """Every member stores the same: the statistics of the union."""
    _, mean, var = moments(x, w)
    np.testing.assert_allclose(
        stats["mean"], np.tile(0.99 * RUNNING[0] + 0.01 * mean, (len(stats["mean"]), 1)), rtol=2e-6
    )
    np.testing.assert_allclose(stats["var"], np.tile(0.99 * RUNNING[1] + 0.01 * var, (len(stats["var"]), 1)), rtol=2e-6)


@every_map
@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.usefixtures("devices")
def test_members_normalize_and_update_by_the_union(mapped, offset, masked):
    x, w = data(offset), weights() if masked else np.ones((MEMBERS, N), np.float32)
    y, stats = mapped(lambda x, w: train(BatchNorm(axis_name="i"), x, mask=w if masked else None))(x, w)
    assert_output(y.reshape(-1, C), batch_norm(x.reshape(-1, C), SCALE, BIAS, w.reshape(-1)))
    assert_update(stats, x.reshape(-1, C), w.reshape(-1))


@every_map
@pytest.mark.usefixtures("devices")
def test_gradients_are_those_of_the_union(mapped):
    """Each member holds the loss of its own part; a collective carries the cotangents of all to each."""
    x, w, cotangent = data(10.0), weights(), data()[::-1]

    def output(x, w):
        return train(BatchNorm(axis_name="i"), x, mask=w)[0]

    gradient = jax.grad(lambda x: jnp.sum(mapped(output)(x, w) * cotangent))(x)
    expected = batch_norm_gradient(x.reshape(-1, C), SCALE, cotangent.reshape(-1, C), w.reshape(-1))[0]
    np.testing.assert_allclose(gradient.reshape(-1, C), expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("mapped", [by_vmap, by_pmap])
@pytest.mark.usefixtures("devices")
def test_gradients_taken_within_the_members(mapped):
    x, w, cotangent = data(10.0), weights(), data()[::-1].copy()

    def gradient(x, w, cotangent):
        return jax.grad(lambda x: jnp.sum(train(BatchNorm(axis_name="i"), x, mask=w)[0] * cotangent))(x)

    expected = batch_norm_gradient(x.reshape(-1, C), SCALE, cotangent.reshape(-1, C), w.reshape(-1))[0]
    found = np.asarray(mapped(gradient)(x, w, cotangent)).reshape(-1, C)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max())


@grouping_maps
@pytest.mark.usefixtures("devices")
def test_groups_normalize_by_their_own_union(mapped):
    x, w = data(), weights()
    layer = BatchNorm(axis_name="i", axis_index_groups=GROUPS)
    y, stats = mapped(lambda x, w: train(layer, x, mask=w))(x, w)
    for group in map(np.array, GROUPS):
        union, mask = x[group].reshape(-1, C), w[group].reshape(-1)
        assert_output(np.asarray(y)[group].reshape(-1, C), batch_norm(union, SCALE, BIAS, mask))
        assert_update({k: np.asarray(v)[group] for k, v in stats.items()}, union, mask)


@every_map
@pytest.mark.usefixtures("devices")
def test_a_member_that_is_fully_masked_may_hold_anything(mapped):
    x, w = data(), weights()
    assert w[0].sum() == 0
    poisoned = x.copy()
    poisoned[0] = np.nan
    y, stats = mapped(lambda x, w: train(BatchNorm(axis_name="i"), x, mask=w))(poisoned, w)
    assert_output(y[1:], batch_norm(x.reshape(-1, C), SCALE, BIAS, w.reshape(-1)).reshape(x.shape)[1:])
    assert_update(stats, x.reshape(-1, C), w.reshape(-1))


@every_map
@pytest.mark.usefixtures("devices")
def test_nothing_anywhere_updates_nothing(mapped):
    x, w = data(), np.zeros((MEMBERS, N), np.float32)
    y, stats = mapped(lambda x, w: train(BatchRenorm(axis_name="i"), x, mask=w))(x, w)
    assert_output(y.reshape(-1, C), batch_norm(x.reshape(-1, C), SCALE, BIAS, statistics=RUNNING))
    np.testing.assert_array_equal(stats["mean"], np.tile(RUNNING[0], (MEMBERS, 1)))
    np.testing.assert_array_equal(stats["steps"], np.zeros(MEMBERS))


@every_map
@pytest.mark.usefixtures("devices")
def test_renorm_corrects_by_the_union(mapped):
    x, w = data(), weights()
    y, stats = mapped(lambda x, w: train(BatchRenorm(axis_name="i", r_max=1e6, d_max=1e6), x, mask=w))(x, w)
    assert_output(y.reshape(-1, C), batch_norm(x.reshape(-1, C), SCALE, BIAS, statistics=RUNNING))
    assert_update(stats, x.reshape(-1, C), w.reshape(-1))
    np.testing.assert_array_equal(stats["steps"], np.ones(MEMBERS))


@every_map
@pytest.mark.usefixtures("devices")
def test_without_an_axis_name_each_member_is_on_its_own(mapped):
    y, stats = mapped(lambda x: train(BatchNorm(), x))(data())
    for k in range(MEMBERS):
        assert_output(y[k], batch_norm(data()[k], SCALE, BIAS))
        assert_update({name: np.asarray(a)[k : k + 1] for name, a in stats.items()}, data()[k])


@every_map
@pytest.mark.usefixtures("devices")
def test_one_value_on_each_member_is_enough(mapped):
    x = data()[:, :1]
    y, stats = mapped(lambda x: train(BatchNorm(axis_name="i"), x))(x)
    assert_output(y.reshape(-1, C), batch_norm(x.reshape(-1, C), SCALE, BIAS))
    assert_update(stats, x.reshape(-1, C))


@every_map
@pytest.mark.usefixtures("devices")
def test_one_value_on_each_member_by_itself_is_an_error(mapped):
    with pytest.raises(ValueError, match="more than one value per channel"):
        mapped(lambda x: train(BatchNorm(), x))(data()[:, :1])


@pytest.mark.parametrize("groups", [[[k] for k in range(MEMBERS)], [[0], [1, 2, 3, 4, 5, 6, 7]]])
@pytest.mark.usefixtures("devices")
def test_one_value_in_a_group_is_an_error(groups):
    layer = BatchNorm(axis_name="i", axis_index_groups=groups)
    with pytest.raises(ValueError, match="more than one value per channel"):
        by_pmap(lambda x: train(layer, x))(data()[:, :1])


def test_one_value_over_an_axis_of_one_member_is_an_error():
    with pytest.raises(ValueError, match="more than one value per channel"):
        by_vmap(lambda x: train(BatchNorm(axis_name="i"), x))(data()[:1, :1])


def test_two_mapped_axes():
    x = data().reshape(2, 4, N, C)
    f = jax.vmap(jax.vmap(lambda x: train(BatchNorm(axis_name=("outer", "i")), x), axis_name="i"), axis_name="outer")
    y, stats = f(x)
    assert_output(y.reshape(-1, C), batch_norm(x.reshape(-1, C), SCALE, BIAS))
    assert_update({k: v.reshape(-1, C) for k, v in stats.items()}, x.reshape(-1, C))


def test_evaluation_needs_no_mapped_axis():
    y = BatchNorm(axis_name="nowhere").apply(VARIABLES, data()[0], use_running_average=True)
    assert_output(y, batch_norm(data()[0], SCALE, BIAS, statistics=RUNNING))


@pytest.mark.usefixtures("devices")
def test_shard_map_proves_the_statistics_replicated():
    """`out_specs` without the axis is accepted only where the result is known to be equal on all members."""
    layer = BatchRenorm(axis_name="i")
    f = jax.shard_map(lambda x: train(layer, x), mesh=mesh(), in_specs=SPLIT, out_specs=(SPLIT, PartitionSpec()))
    union = data().reshape(-1, C)
    _, stats = jax.jit(f)(union)
    assert_update({k: stats[k][None] for k in ("mean", "var")}, union)


class MaskedMLP(nn.Module):
    norm: type = BatchNorm

    @nn.compact
    def __call__(self, x, mask):
        for _ in range(2):
            x = self.norm(use_running_average=False)(nn.Dense(4)(x), mask=mask)
        return x


@pytest.mark.parametrize("norm", [BatchNorm, BatchRenorm])
@pytest.mark.usefixtures("devices")
def test_sharded_jit_equals_one_device_without_an_axis_name(norm):
    x, w = data(3.0).reshape(-1, C), weights().reshape(-1)
    held = MaskedMLP(norm).init(jax.random.key(0), x, w)

    def loss(params, x, w):
        y, new = MaskedMLP(norm).apply({**held, "params": params}, x, w, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y)), (y, new)

    step = jax.jit(jax.grad(loss, has_aux=True))
    split = NamedSharding(mesh(), SPLIT)
    found = step(held["params"], jax.device_put(x, split), jax.device_put(w, split))
    assert len(found[1][0].sharding.device_set) == MEMBERS
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(step(held["params"], x, w)), strict=True):
        # Two layers' sums in another order, and gradients of sums of 48 terms that cancel.
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.usefixtures("devices")
def test_sharded_jit_equals_the_oracle():
    x, w = data(1e3).reshape(-1, C), weights().reshape(-1)
    split = NamedSharding(mesh(), SPLIT)
    y, stats = jax.jit(lambda x, w: train(BatchNorm(), x, mask=w))(*(jax.device_put(a, split) for a in (x, w)))
    assert_output(y, batch_norm(x, SCALE, BIAS, w))
    assert_update({k: a[None] for k, a in stats.items()}, x, w)


@pytest.mark.parametrize("norm", [nn.BatchNorm, BatchNorm])
def test_unequal_masks_are_what_flax_gets_wrong(norm):
    layer = norm(axis_name="i", use_running_average=False, momentum=0.0)
    x, mask = np.float32([[[0.0], [4.0]], [[8.0], [8.0]]]), np.array([[[True], [True]], [[True], [False]]])
    held = layer.init(jax.random.key(0), x[0])
    f = jax.vmap(lambda x, m: layer.apply(held, x, mask=m, mutable=["batch_stats"])[1], axis_name="i")
    mean = f(x, mask)["batch_stats"]["mean"][0]
    np.testing.assert_allclose(mean, 5.0 if norm is nn.BatchNorm else 4.0, rtol=1e-6)
