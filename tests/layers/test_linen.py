"""The layers against float64 numpy and against `flax.linen.BatchNorm`."""

import dataclasses
import functools
from collections.abc import Callable

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from formulas import EPSILON, batch_norm, batch_norm_gradient, moments, wide

import flaxbn
from flaxbn import BatchNorm, BatchRenorm

N, C = 16, 3
SCALE, BIAS = np.float32([1.5, 0.7, -1.0]), np.float32([0.2, -0.4, 1.0])
RUNNING = np.float32([0.5, -1.0, 2.0]), np.float32([4.0, 0.25, 1.5])
RATIOS = [0.0, 10.0, 1e3, 1e4]  # |mean| / std
LAYERS = [BatchNorm, BatchRenorm]
KEY = jax.random.key(0)
EVEN = np.arange(N) % 2 == 0
WEIGHTS = np.linspace(0.5, 2.0, N, dtype=np.float32) * (np.arange(N) % 5 > 0)

either = pytest.mark.parametrize("layer", LAYERS)


def data(ratio=0.0, n=N, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, C)) * [1.0, 0.5, 3.0]
    return (x + ratio * np.array([1.0, -0.5, 3.0])).astype(np.float32)


def variables(mean=RUNNING[0], var=RUNNING[1]):
    return {"params": {"scale": SCALE, "bias": BIAS}, "batch_stats": {"mean": mean, "var": var}}


def train(layer, variables, x, **kwargs):
    y, new = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"], **kwargs)
    return y, new["batch_stats"]


def assert_output(found, expected):
    # A few roundings of numbers of the size of the output and of its terms.
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6 * max(1, np.abs(expected).max()))


def assert_gradients(found, expected):
    for name, one, other in zip(("x", "scale", "bias"), found, expected):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=2e-6 * np.abs(other).max(), err_msg=name)


def assert_update(stats, x, weights=None, momentum=0.99):
    _, mean, var = moments(x, weights)
    expected = momentum * RUNNING[0] + (1 - momentum) * mean
    np.testing.assert_allclose(stats["mean"], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(stats["var"], momentum * RUNNING[1] + (1 - momentum) * var, rtol=1e-6)


def vjp(layer, x, cotangent, **kwargs):
    def output(x, scale, bias):
        return train(layer, variables() | {"params": {"scale": scale, "bias": bias}}, x, **kwargs)[0]

    def both(x, scale, bias, cotangent):
        y, pull = jax.vjp(output, x, scale, bias)
        return y, pull(cotangent)

    return jax.jit(both)(x, SCALE, BIAS, cotangent)


# ---- numbers


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("masked", [None, EVEN, WEIGHTS], ids=["all", "bool", "float"])
@pytest.mark.parametrize("n", [N, 1024])
def test_output_and_gradients_are_those_of_float64(ratio, masked, n):
    x, cotangent = data(ratio, n), data(n=n, seed=1)
    mask = None if masked is None else np.resize(masked, n)
    found, gradients = vjp(BatchNorm(), x, cotangent, mask=mask)
    assert_output(found, batch_norm(x, SCALE, BIAS, mask))
    assert_gradients(gradients, batch_norm_gradient(x, SCALE, cotangent, mask))


@pytest.mark.parametrize("ratio", RATIOS)
def test_never_worse_than_flax(ratio):
    x, cotangent = data(ratio, 1024), data(n=1024, seed=1)
    expected = batch_norm(x, SCALE, BIAS), *batch_norm_gradient(x, SCALE, cotangent)

    def errors(layer):
        y, gradients = vjp(layer, x, cotangent)
        return [np.abs(one - other).max() / np.abs(other).max() for one, other in zip((y, *gradients), expected)]

    ours, theirs = errors(BatchNorm()), errors(nn.BatchNorm(use_fast_variance=False))
    assert np.all(np.array(ours) <= np.array(theirs) + 5e-7), (ours, theirs)  # rounding noise of both


@pytest.mark.parametrize("ratio", RATIOS)
def test_stored_variance_within_1e_5_of_float64(ratio):
    x = data(ratio, 1024)
    _, stats = train(BatchNorm(momentum=0.0), variables(), x)
    np.testing.assert_allclose(stats["var"], moments(x)[2], rtol=1e-5)
    np.testing.assert_allclose(stats["mean"], moments(x)[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.99, 0.5, 0.0])
def test_update_is_weighted_by_momentum(momentum):
    assert_update(train(BatchNorm(momentum=momentum), variables(), data(10.0))[1], data(10.0), momentum=momentum)


def test_a_layer_called_twice_updates_twice():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = BatchNorm(use_running_average=False, momentum=0.5)
            return norm(norm(x))

    held = Twice().init(KEY, data())
    _, new = Twice().apply(held, data(10.0), mutable=["batch_stats"])
    first, second = moments(data(10.0)), moments(batch_norm(data(10.0)))
    expected = 0.25 * np.ones(C) + 0.25 * first[2] + 0.5 * second[2]
    np.testing.assert_allclose(new["batch_stats"]["BatchNorm_0"]["var"], expected, rtol=1e-6)


def test_forward_mode():
    x, tangent = data(10.0), data(seed=3)
    _, found = jax.jvp(jax.jit(lambda x: train(BatchNorm(), variables(), x)[0]), (x,), (tangent,))
    step, (x, tangent) = 1e-5, wide(x, tangent)
    ahead, behind = (batch_norm(x + s * tangent, SCALE, BIAS) for s in (step, -step))
    np.testing.assert_allclose(found, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-5)


def test_second_derivatives():
    x, step = np.array([[0.3], [1.0], [-0.8]]), 1e-4
    layer = BatchNorm(use_scale=False, use_bias=False)
    held = {"batch_stats": {"mean": np.zeros(1, np.float32), "var": np.ones(1, np.float32)}}

    def loss64(x):
        return (batch_norm(x) ** 3).sum()

    found = jax.jit(jax.hessian(lambda x: jnp.sum(train(layer, held, x[:, None])[0] ** 3)))(x[:, 0].astype(np.float32))
    for i, j in np.ndindex(3, 3):
        a, b = step * np.eye(3)[:, [i]], step * np.eye(3)[:, [j]]
        expected = loss64(x + a + b) - loss64(x + a - b) - loss64(x - a + b) + loss64(x - a - b)
        np.testing.assert_allclose(found[i, j], expected / (4 * step**2), rtol=1e-4, atol=1e-4)  # of terms of size 10


def test_vmap_normalizes_each_batch_by_itself():
    x = np.stack([data(), data(10.0)])
    y, stats = jax.vmap(lambda x: train(BatchNorm(), variables(), x))(x)
    for k in range(2):
        assert_output(y[k], batch_norm(x[k], SCALE, BIAS))
        assert_update(jax.tree.map(lambda a: a[k], stats), x[k])  # noqa: B023


@pytest.mark.parametrize("axis", [1, -3, 0, (1, 3), (-1, 1), (3, 0), (0, 1, 2)])
def test_feature_axes_anywhere(axis):
    x = np.random.default_rng(4).normal(3.0, 2.0, size=(4, 3, 2, 5)).astype(np.float32)
    features = sorted(a % 4 for a in ([axis] if isinstance(axis, int) else axis))
    rest = tuple(a for a in range(4) if a not in features)
    shape = tuple(x.shape[a] for a in features)
    rng = np.random.default_rng(5)
    params = {"scale": rng.uniform(0.5, 2, shape).astype(np.float32), "bias": rng.normal(size=shape).astype(np.float32)}
    layer = BatchNorm(axis=axis, use_running_average=False)
    held = layer.init(KEY, x)
    assert held["params"]["scale"].shape == shape
    y, new = layer.apply(held | {"params": params}, x, mutable=["batch_stats"])
    mean, var = (np.expand_dims(s, rest) for s in (x.mean(rest, np.float64), x.var(rest, np.float64)))
    scale, bias = (np.expand_dims(params[name], rest) for name in ("scale", "bias"))
    assert_output(y, (x - mean) / np.sqrt(var + EPSILON) * scale + bias)
    np.testing.assert_allclose(new["batch_stats"]["var"], 0.99 + 0.01 * x.var(rest, np.float64), rtol=1e-6)


@either
def test_a_constant_channel_has_finite_gradients(layer):
    x = data()
    x[:, 1] = 7.0
    y, gradients = vjp(layer(), x, data(seed=1))
    np.testing.assert_allclose(y[:, 1], BIAS[1], rtol=1e-6)
    assert all(np.all(np.isfinite(g)) for g in gradients)


# ---- masks

HIDDEN = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("mask", [EVEN, WEIGHTS, EVEN.astype(np.int32), EVEN[:, None], WEIGHTS[:, None]])
@pytest.mark.parametrize("update", [True, False])
def test_masks_are_honoured_as_weights(mask, update):
    y, stats = train(BatchNorm(), variables(), data(3.0), mask=mask, update_running_average=update)
    assert_output(y, batch_norm(data(3.0), SCALE, BIAS, mask))
    if update:
        assert_update(stats, data(3.0), mask)


def test_a_mask_of_full_rank_may_differ_by_channel():
    mask = np.random.default_rng(6).random((N, C)) > 0.4
    y, stats = train(BatchNorm(), variables(), data(), mask=mask)
    assert_output(y, batch_norm(data(), SCALE, BIAS, mask))
    assert_update(stats, data(), mask)


def test_a_vector_masks_examples_even_where_there_are_as_many_channels():
    x = np.random.default_rng(7).normal(size=(4, 4)).astype(np.float32)
    mask = np.array([True, True, True, False])
    layer = BatchNorm(use_running_average=False, momentum=0.0)
    _, new = layer.apply(layer.init(KEY, x), x, mask=mask, mutable=["batch_stats"])
    np.testing.assert_allclose(new["batch_stats"]["var"], x[:3].astype(np.float64).var(0), rtol=1e-6)


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("short", [True, False])
def test_masks_of_images(axis, short):
    x = np.random.default_rng(8).normal(2.0, size=(3, 4, 5, 6)).astype(np.float32)
    mask = np.random.default_rng(9).random((3, 5, 6) if axis == 1 else (3, 4, 5)) > 0.3
    layer = BatchNorm(use_running_average=False, axis=axis, momentum=0.0)
    given = mask if short else np.expand_dims(mask, axis)
    y, new = layer.apply(layer.init(KEY, x), x, mask=given, mutable=["batch_stats"])
    flat, weights = np.moveaxis(x, axis, -1), mask.reshape(-1)
    _, mean, var = moments(flat.reshape(-1, flat.shape[-1]), weights)
    np.testing.assert_allclose(new["batch_stats"]["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(new["batch_stats"]["var"], var, rtol=1e-6)
    assert_output(y, np.moveaxis((flat - mean) / np.sqrt(var + EPSILON), -1, axis))


@pytest.mark.parametrize(
    ("shape", "mask"),
    [((8, 28, 28, 64), (8,)), ((4, 4, 4), (4,)), ((4, 5, 3), (4, 1)), ((4, 5, 3), (5, 4)), ((4, 3), (2, 1))]
    + [((4, 3), shape) for shape in [(), (1,), (3,), (1, 4, 3)]],
)
@pytest.mark.parametrize("evaluation", [False, True])
def test_masks_of_another_shape_are_an_error(shape, mask, evaluation):
    x = np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match=r"`mask` must have rank \d .*or exactly the shape.*got a mask of shape") as e:
        BatchNorm().init(KEY, x, use_running_average=evaluation, mask=np.ones(mask, bool))
    assert str(mask) in str(e.value)
    assert str(shape) in str(e.value)
    assert "`mask[:" + ", None" * (len(shape) - 1) + "]`" in str(e.value)


def test_with_several_feature_axes_a_mask_has_full_rank():
    x = data().reshape(4, 4, 3)
    with pytest.raises(ValueError, match=r"`mask` must have rank 3 \(each axis equal to that of x or 1\): got"):
        BatchNorm(axis=(1, 2)).init(KEY, x, False, mask=np.ones(4, bool))
    BatchNorm(axis=(1, 2)).init(KEY, x, False, mask=np.ones((4, 1, 1), bool))


@either
@pytest.mark.parametrize("hidden", HIDDEN)
def test_what_a_mask_hides_reaches_neither_statistics_nor_other_outputs(layer, hidden):
    x = np.where(EVEN[:, None], data(), np.float32(hidden))
    y, stats = train(layer(), variables(), x, mask=EVEN)
    assert_output(y[EVEN], batch_norm(data()[EVEN], SCALE, BIAS))
    assert_update(stats, data()[EVEN])


@either
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("evaluation", [False, True])
def test_what_a_mask_hides_reaches_no_gradient(layer, hidden, evaluation):
    cotangent = data(seed=1) * EVEN[:, None]  # the loss ignores what is masked

    def loss(x, scale, bias):
        held = variables() | {"params": {"scale": scale, "bias": bias}}
        y, _ = layer().apply(held, x, use_running_average=evaluation, mask=EVEN, mutable=["batch_stats"])
        return jnp.sum(jnp.where(EVEN[:, None], y, 0) * cotangent)

    x = np.where(EVEN[:, None], data(), np.float32(hidden))
    found = jax.jit(jax.grad(loss, (0, 1, 2)))(x, SCALE, BIAS)
    expected = batch_norm_gradient(data()[EVEN], SCALE, cotangent[EVEN])
    if evaluation:
        inverse = 1 / np.sqrt(np.float64(RUNNING[1]) + EPSILON)
        standard = (data()[EVEN] - RUNNING[0]) * inverse
        expected = cotangent[EVEN] * SCALE * inverse, (cotangent[EVEN] * standard).sum(0), expected[2]
    assert_gradients((found[0][EVEN], *found[1:]), expected)
    np.testing.assert_array_equal(found[0][~EVEN], 0)


@either
@pytest.mark.parametrize("hidden", [2.0, np.nan])
def test_a_fully_masked_batch_uses_and_keeps_the_running_statistics(layer, hidden):
    x, mask = np.where(EVEN[:, None], data(), np.float32(hidden)), np.zeros(N, bool)
    y, stats = train(layer(), variables(), x, mask=mask)
    assert_output(y[EVEN], batch_norm(data()[EVEN], SCALE, BIAS, statistics=RUNNING))
    np.testing.assert_array_equal(stats["mean"], RUNNING[0])
    np.testing.assert_array_equal(stats["var"], RUNNING[1])
    _, gradients = vjp(layer(), data(), data(seed=1), mask=mask)
    assert all(np.all(np.isfinite(g)) for g in gradients)


def test_a_fully_masked_channel_is_kept_alone():
    mask = np.ones((N, C), bool)
    mask[:, 1] = False
    y, stats = train(BatchNorm(momentum=0.0), variables(), data(), mask=mask)
    expected = batch_norm(data(), SCALE, BIAS)
    expected[:, 1] = batch_norm(data(), SCALE, BIAS, statistics=RUNNING)[:, 1]
    assert_output(y, expected)
    np.testing.assert_allclose(stats["var"], np.where([0, 1, 0], RUNNING[1], moments(data())[2]), rtol=1e-6)


# ---- one value per channel


@pytest.mark.parametrize("shape", [(1, 3), (3,), (1, 1, 1, 3)])
def test_one_value_per_channel_is_an_error(shape):
    x = np.full(shape, 2.0, np.float32)
    with pytest.raises(ValueError, match=r"more than one value per channel: got an input of shape .* feature axis -1"):
        train(BatchNorm(), variables(), x)
    with pytest.raises(ValueError, match="more than one value per channel"):
        BatchNorm().apply(variables(), x, use_running_average=False, update_running_average=False)


def test_one_value_per_channel_is_allowed_in_init_and_evaluation():
    held = BatchNorm().init(KEY, data()[:1], use_running_average=False)
    y = BatchNorm().apply(held, data()[:1], use_running_average=True)
    assert_output(y, batch_norm(data()[:1], statistics=(np.zeros(C), np.ones(C))))
    assert_output(BatchNorm().apply(held, data()[0], use_running_average=True), y[0])


def test_one_example_with_several_positions_is_allowed():
    y, _ = train(BatchNorm(), variables(), data()[None])
    assert_output(y[0], batch_norm(data(), SCALE, BIAS))


def test_the_error_names_the_layer():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Sequential([BatchNorm(use_running_average=False, name="deep")])(x)

    held = Model().init(KEY, data())
    with pytest.raises(ValueError, match=r"BatchNorm '.*deep' normalizes by batch statistics"):
        Model().apply(held, data()[:1], mutable=["batch_stats"])
    with pytest.raises(ValueError, match=r"BatchNorm '.*deep' updates its running average"):
        Model().apply(held, data())


# ---- using and updating


@either
def test_an_update_of_an_immutable_collection_is_an_error(layer):
    with pytest.raises(ValueError, match="updates its running average") as e:
        layer().apply(variables(), data(), use_running_average=False)
    remedies = ['mutable=["batch_stats"]', "update_running_average=False", 'statistics="batch"', "variable_axes"]
    for remedy in [*remedies, "variable_carry", "nn.scan"]:
        assert remedy in str(e.value)


def test_an_update_inside_scan_without_batch_stats_is_that_error():
    scan = nn.scan(Step, variable_broadcast="params", split_rngs={"params": False}, length=2)
    with pytest.raises(ValueError, match="list 'batch_stats' in `variable_axes` or `variable_carry`"):
        scan(BatchNorm).apply({"params": {"norm": variables()["params"]}}, data(), None, mutable=["batch_stats"])


@either
def test_without_update_batch_statistics_need_nothing_mutable(layer):
    y = layer().apply(variables(), data(5.0), use_running_average=False, update_running_average=False)
    assert_output(y, batch_norm(data(5.0), SCALE, BIAS))
    _, stats = train(layer(), variables(), data(5.0), update_running_average=False)
    np.testing.assert_array_equal(stats["mean"], RUNNING[0])
    np.testing.assert_array_equal(stats["var"], RUNNING[1])


@either
def test_evaluation_may_update(layer):
    y, new = layer().apply(
        variables(), data(5.0), use_running_average=True, update_running_average=True, mutable=["batch_stats"]
    )
    assert_output(y, batch_norm(data(5.0), SCALE, BIAS, statistics=RUNNING))
    assert_update(new["batch_stats"], data(5.0))


@either
def test_evaluation_uses_and_keeps_the_running_statistics(layer):
    for given in ({"use_running_average": True}, {}):
        own = layer() if given else layer(use_running_average=True)
        y, new = own.apply(variables(), data(5.0), mutable=["batch_stats"], **given)
        assert_output(y, batch_norm(data(5.0), SCALE, BIAS, statistics=RUNNING))
        chex.assert_trees_all_equal(new["batch_stats"], variables()["batch_stats"])


def test_use_running_average_is_given_once():
    with pytest.raises(ValueError, match="use_running_average"):
        BatchNorm().init(KEY, data())
    with pytest.raises(ValueError, match="use_running_average"):
        BatchNorm(use_running_average=True).init(KEY, data(), use_running_average=False)


@either
def test_init_updates_nothing_and_needs_no_mapped_axis(layer):
    held = layer(axis_name="nowhere").init(KEY, data(10.0), use_running_average=False, update_running_average=True)
    np.testing.assert_array_equal(held["batch_stats"]["mean"], np.zeros(C))
    np.testing.assert_array_equal(held["batch_stats"]["var"], np.ones(C))


@either
def test_what_is_stored_has_no_gradient(layer):
    def stored(x, mean, var):
        _, stats = train(layer(), variables(mean, var), x)
        return jnp.sum(stats["mean"] + stats["var"])

    for gradient in jax.grad(stored, (0, 1, 2))(data(), *RUNNING):
        np.testing.assert_array_equal(gradient, 0)


@either
@pytest.mark.parametrize("bad", HIDDEN)
def test_a_batch_that_is_not_finite_does_not_poison_the_running_average(layer, bad):
    x = data()
    x[2, 1] = bad
    _, stats = train(layer(momentum=0.0), variables(), x)
    _, mean, var = moments(data())
    np.testing.assert_allclose(stats["mean"], np.where([0, 1, 0], RUNNING[0], mean), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(stats["var"], np.where([0, 1, 0], RUNNING[1], var), rtol=1e-6)


def test_an_overflowing_variance_does_not_poison_the_running_average():
    x = data() * np.float32([1.0, 1e30, 1.0])
    _, stats = train(BatchNorm(), variables(), x)
    assert (stats["mean"][1], stats["var"][1]) == (RUNNING[0][1], RUNNING[1][1])


def test_an_empty_batch_updates_nothing():
    y, stats = train(BatchNorm(), variables(), data()[:0])
    assert y.shape == (0, C)
    chex.assert_trees_all_equal(stats, variables()["batch_stats"])


def test_the_given_variables_are_not_modified():
    held = jax.tree.map(np.copy, variables())
    train(BatchRenorm(), held, data())
    chex.assert_trees_all_equal(held, variables())


# ---- dtypes

DTYPES = [jnp.float16, jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize("given", [*DTYPES, jnp.int32])
@pytest.mark.parametrize("dtype", [None, *DTYPES])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_the_dtypes_are_flax_s(given, dtype, param_dtype, affine):
    options = {"dtype": dtype, "param_dtype": param_dtype, "use_bias": affine, "use_scale": affine}
    shapes = [
        jax.eval_shape(lambda x: layer(**options).init_with_output(KEY, x, False), jnp.zeros((N, C), given))  # noqa: B023
        for layer in (BatchNorm, nn.BatchNorm)
    ]
    chex.assert_trees_all_equal(*(jax.tree.map(lambda s: (s.shape, str(s.dtype)), both) for both in shapes))


@either
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("force", [True, False])
def test_statistics_are_stored_in_float32(layer, dtype, force):
    own = layer(dtype=dtype, param_dtype=dtype, force_float32_reductions=force)
    x = jnp.asarray(data(), dtype)
    held = own.init(KEY, x, use_running_average=False)
    _, stats = train(own, held, x)
    for tree in (held["batch_stats"], stats):
        assert (tree["mean"].dtype, tree["var"].dtype) == (jnp.float32, jnp.float32)
    _, mean, var = moments(np.float64(x))
    eps = 1e-6 if force else float(jnp.finfo(dtype).eps)  # the batch's, in half precision, with weight 0.01
    np.testing.assert_allclose(stats["mean"], 0.01 * mean, rtol=eps, atol=0.01 * eps)
    np.testing.assert_allclose(stats["var"], 0.99 + 0.01 * var, rtol=0.1 * eps + 1e-6)


@either
def test_stored_statistics_become_float32_again(layer):
    held = variables(*(jnp.asarray(s, jnp.bfloat16) for s in RUNNING))
    _, stats = train(layer(), held, data())
    assert (stats["mean"].dtype, stats["var"].dtype) == (jnp.float32, jnp.float32)
    assert_update(stats, data())  # RUNNING is exact in bfloat16


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    x = jnp.asarray(data(10.0), dtype)
    y, _ = train(BatchNorm(dtype=dtype), variables(), x)
    assert y.dtype == dtype
    expected = batch_norm(np.float64(x), SCALE, BIAS)
    np.testing.assert_allclose(np.float64(y), expected, rtol=0.51 * float(jnp.finfo(dtype).eps), atol=1e-5)


def test_without_float32_reductions_statistics_are_as_good_as_flax_s():
    x = jnp.asarray(data(), jnp.bfloat16)
    errors = []
    for layer in (BatchNorm, nn.BatchNorm):
        own = layer(use_running_average=False, momentum=0.0, force_float32_reductions=False)
        _, new = own.apply(own.init(KEY, x), x, mutable=["batch_stats"])
        errors.append(np.max(np.abs(new["batch_stats"]["var"] / moments(np.float64(x))[2] - 1)))
    assert 1e-6 < errors[0] <= errors[1] + float(jnp.finfo(jnp.bfloat16).eps)  # in bfloat16 indeed


def test_float16_reductions_do_not_overflow_the_count():
    x = np.random.default_rng(10).normal(1.0, 2.0, size=(70_000, 2)).astype(np.float16)  # more than 65 504
    own = BatchNorm(use_running_average=False, momentum=0.0, force_float32_reductions=False)
    _, new = own.apply(own.init(KEY, x), x, mutable=["batch_stats"])
    np.testing.assert_allclose(new["batch_stats"]["mean"], moments(x)[1], rtol=0.01)  # as Flax's layer
    np.testing.assert_allclose(new["batch_stats"]["var"], moments(x)[2], rtol=0.01)


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("mask", [None, WEIGHTS], ids=["all", "float"])
def test_integers_are_not_measured_as_integers(force, mask):
    x = np.random.default_rng(11).integers(0, 255, size=(N, C)).astype(np.uint8)
    y, stats = train(BatchNorm(force_float32_reductions=force), variables(), x, mask=mask)
    assert_output(y, batch_norm(x, SCALE, BIAS, mask))
    assert_update(stats, x, mask)


def test_dtype_float64_is_normalized_in_float64():
    with jax.enable_x64(True):
        x = np.random.default_rng(12).normal(3.0, size=(N, C))
        own = BatchNorm(use_running_average=False)
        y, new = own.apply(own.init(KEY, x), x, mutable=["batch_stats"])
        np.testing.assert_allclose(y, batch_norm(x), rtol=1e-12, atol=1e-12)
        assert new["batch_stats"]["mean"].dtype == jnp.float64


def test_the_one_pass_form_is_an_option():
    x = data(1e4, 1024)
    _, stats = train(BatchNorm(use_fast_variance=True, momentum=0.0), variables(), x)
    assert np.max(np.abs(stats["var"] / moments(x)[2] - 1)) > 0.1
    y, stats = train(BatchNorm(use_fast_variance=True), variables(), data())
    np.testing.assert_allclose(y, batch_norm(data(), SCALE, BIAS), rtol=1e-5, atol=1e-5)
    assert_update(stats, data())


# ---- Flax as the peer


def test_the_fields_are_flax_s_with_one_other_default():
    ours, theirs = (
        [(f.name, f.default) for f in dataclasses.fields(layer) if f.name not in ("parent", "name")]
        for layer in (BatchNorm, nn.BatchNorm)
    )
    # Flax's come first, in its order, so that positional arguments mean the same.
    assert [(a, b) for a, b in zip(ours, theirs) if a != b] == [
        (("use_fast_variance", False), ("use_fast_variance", True))
    ]
    assert ours[len(theirs) :] == [
        ("num_domains", None),
        ("domain_affine", False),
        ("virtual_batch_size", None),
        ("activation", None),
    ]


class AutoNamed(nn.Module):
    norm: Callable

    @nn.compact
    def __call__(self, x, train):
        for _ in range(2):
            x = nn.Dense(4)(x)
            x = self.norm(scale_init=nn.initializers.normal(1.0), bias_init=nn.initializers.normal(1.0))(x, not train)
            x = nn.tanh(x)
        return self.norm(use_running_average=not train, name="last", use_bias=False)(x)


class Sub(BatchNorm):
    pass


def test_names_and_initial_values_are_flax_s():
    ours, theirs = (AutoNamed(norm).init(KEY, data(), train=True) for norm in (BatchNorm, nn.BatchNorm))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert set(ours["params"]) == {"Dense_0", "Dense_1", "BatchNorm_0", "BatchNorm_1", "last"}
    chex.assert_trees_all_equal(ours, theirs)
    chex.assert_trees_all_equal_dtypes(ours, theirs)


def test_a_stock_checkpoint_loads_unchanged():
    stock = AutoNamed(nn.BatchNorm)
    held = stock.init(KEY, data(), train=True)
    for seed in range(3):
        _, new = stock.apply(held, data(3.0, seed=seed), train=True, mutable=["batch_stats"])
        held = held | new
    loaded = serialization.from_bytes(AutoNamed(BatchNorm).init(KEY, data(), train=True), serialization.to_bytes(held))
    for norm in (BatchNorm, BatchRenorm):
        found = AutoNamed(norm).apply(loaded if norm is BatchNorm else renamed(loaded), data(3.0), train=False)
        # Three layers of some roundings each.
        np.testing.assert_allclose(found, stock.apply(held, data(3.0), train=False), rtol=1e-5, atol=1e-5)


def renamed(variables):
    return {
        collection: {name.replace("BatchNorm_", "BatchRenorm_"): leaf for name, leaf in tree.items()}
        for collection, tree in variables.items()
    }


def test_training_is_flax_s():
    two_pass = functools.partial(nn.BatchNorm, use_fast_variance=False)
    held = AutoNamed(BatchNorm).init(KEY, data(), train=True)
    for seed in range(3):
        x = data(3.0, seed=seed)
        (y, new), (z, other) = (
            AutoNamed(norm).apply(held, x, train=True, mutable=["batch_stats"]) for norm in (BatchNorm, two_pass)
        )
        np.testing.assert_allclose(y, z, rtol=2e-5, atol=2e-5)  # roundings, amplified by three small variances
        chex.assert_trees_all_close(new, other, rtol=1e-6, atol=1e-6)
        held = held | new


@pytest.mark.parametrize("evaluation", [False, True])
def test_complex_input_is_flax_s(evaluation):
    x = (data(1.0) + 1j * data(2.0, seed=1)).astype(np.complex64)
    outputs = []
    for norm in (BatchNorm, nn.BatchNorm):
        own = norm(use_running_average=evaluation, momentum=0.9)
        held = own.init(KEY, x)
        y, new = own.apply(held, x, mutable=["batch_stats"])
        y, new = own.apply(held | new, x, mutable=["batch_stats"])
        outputs.append((y, new["batch_stats"]))
    chex.assert_trees_all_close(*outputs, rtol=1e-5, atol=1e-5)
    assert outputs[0][0].dtype == jnp.complex64
    if not evaluation:
        assert_output(outputs[0][0], batch_norm(x))
        assert outputs[0][1]["mean"].dtype == jnp.complex64
        assert outputs[0][1]["var"].dtype == jnp.float32


@pytest.mark.parametrize(("use_scale", "use_bias"), [(True, False), (False, True), (False, False)])
def test_scale_and_bias_may_be_left_out(use_scale, use_bias):
    own = BatchNorm(use_scale=use_scale, use_bias=use_bias, use_running_average=False)
    held = own.init(KEY, data())
    assert set(held.get("params", {})) == {name for name, used in (("scale", use_scale), ("bias", use_bias)) if used}
    params = {k: v for k, v in variables()["params"].items() if k in held.get("params", {})}
    y, _ = own.apply(held | {"params": params}, data(), mutable=["batch_stats"])
    assert_output(y, batch_norm(data(), params.get("scale", 1.0), params.get("bias", 0.0)))


@pytest.mark.parametrize(
    ("axis", "message"), [(2, "within"), (-3, "within"), ((0, 5), "within"), ((1, -1), "each axis once")]
)
def test_an_axis_that_cannot_be_is_an_error(axis, message):
    with pytest.raises(ValueError, match=f"`axis` must .*{message}.*: got axis .* rank 2"):
        BatchNorm(axis=axis).init(KEY, data(), False)


# ---- transformations of Flax


class Step(nn.Module):
    norm: type = BatchNorm

    @nn.compact
    def __call__(self, x, _):
        return self.norm(use_running_average=False, name="norm", momentum=0.5)(x) * 2 + 1, None


def scanned(norm=BatchNorm, **kwargs):
    return nn.scan(Step, split_rngs={"params": "params" in kwargs.get("variable_axes", {})}, length=2, **kwargs)(norm)


@either
def test_scan_over_layers_with_their_own_statistics(layer):
    model = scanned(layer, variable_axes={"params": 0, "batch_stats": 0})
    held = model.init(KEY, data(), None)
    (y, _), new = model.apply(held, data(5.0), None, mutable=["batch_stats"])
    middle = batch_norm(data(5.0)) * 2 + 1
    assert_output(y, batch_norm(middle) * 2 + 1)
    expected = [0.5 + 0.5 * moments(x)[2] for x in (data(5.0), middle)]
    np.testing.assert_allclose(new["batch_stats"]["norm"]["var"], expected, rtol=1e-5)


@either
def test_scan_with_carried_statistics(layer):
    model = scanned(layer, variable_carry="batch_stats", variable_broadcast="params")
    held = Step(layer).init(KEY, data(), None)  # Flax's scan does not create what it carries
    _, new = model.apply(held, data(5.0), None, mutable=["batch_stats"])
    middle = batch_norm(data(5.0)) * 2 + 1
    expected = 0.25 + 0.25 * moments(data(5.0))[2] + 0.5 * moments(middle)[2]
    np.testing.assert_allclose(new["batch_stats"]["norm"]["var"], expected, rtol=1e-5)
    if layer is BatchRenorm:
        assert new["batch_stats"]["norm"]["steps"] == 2


class OverTime(nn.Module):
    """A recurrent cell over axis 1 of its input, with one pair of statistics for all steps."""

    norm: type = BatchNorm

    @nn.compact
    def __call__(self, x):
        statistics = {"variable_broadcast": "params", "variable_carry": "batch_stats"}
        if self.is_initializing():
            statistics = {"variable_broadcast": ["params", "batch_stats"]}
        step = nn.scan(Step, split_rngs={"params": False}, in_axes=1, **statistics)
        return step(self.norm, name="step")(x[:, 0], x)[0]


@either
def test_carried_statistics_are_initialized_as_the_message_says(layer):
    with pytest.raises(ValueError, match=r"while the model is initializing .* in `variable_broadcast` instead"):
        layer().apply(variables(), data(), use_running_average=False)
    x = np.stack([data(5.0), data(), data(seed=1)], 1)
    held = OverTime(layer).init(KEY, x)
    chex.assert_trees_all_equal(held["batch_stats"]["step"]["norm"]["var"], np.ones(C, np.float32))
    _, new = OverTime(layer).apply(held, x, mutable=["batch_stats"])
    first, var = data(5.0), np.ones(C)
    for _ in range(3):
        var = 0.5 * var + 0.5 * moments(first)[2]
        first = batch_norm(first) * 2 + 1
    np.testing.assert_allclose(new["batch_stats"]["step"]["norm"]["var"], var, rtol=1e-5)
    if layer is BatchRenorm:
        assert new["batch_stats"]["step"]["norm"]["steps"] == 3


@either
def test_remat_gives_the_same(layer):
    x, cotangent = data(5.0), data(seed=1)

    step = nn.remat(Step)(layer)
    held = step.init(KEY, x, None)

    def output(x):
        (y, _), new = step.apply(held, x, None, mutable=["batch_stats"])
        return y, new["batch_stats"]["norm"]["var"]

    y, pull, var = jax.vjp(output, x, has_aux=True)
    assert_output(y, batch_norm(x) * 2 + 1)
    assert_gradients(pull(cotangent), [batch_norm_gradient(x, np.ones(C), 2 * cotangent)[0]])
    np.testing.assert_allclose(var, 0.5 + 0.5 * moments(x)[2], rtol=1e-6)


@either
def test_nn_vmap_with_own_statistics(layer):
    own = {"params": 0, "batch_stats": 0}
    model = nn.vmap(Step, in_axes=(0, None), variable_axes=own, split_rngs={"params": True})(layer)
    x = np.stack([data(), data(5.0)])
    held = model.init(KEY, x, None)
    (y, _), new = model.apply(held, x, None, mutable=["batch_stats"])
    for k in range(2):
        assert_output(y[k], batch_norm(x[k]) * 2 + 1)
        np.testing.assert_allclose(new["batch_stats"]["norm"]["var"][k], 0.5 + 0.5 * moments(x[k])[2], rtol=1e-6)


def test_nn_vmap_with_shared_statistics_and_an_axis_name():
    class Synchronized(nn.Module):
        @nn.compact
        def __call__(self, x):
            return BatchNorm(use_running_average=False, axis_name="members", name="norm", momentum=0.5)(x)

    model = nn.vmap(
        Synchronized,
        variable_axes={"params": None, "batch_stats": None},
        split_rngs={"params": False},
        axis_name="members",
    )()
    x = np.stack([data(), data(5.0)])
    held = model.init(KEY, x)
    y, new = model.apply(held, x, mutable=["batch_stats"])
    assert_output(y.reshape(-1, C), batch_norm(x.reshape(-1, C)))
    np.testing.assert_allclose(new["batch_stats"]["norm"]["var"], 0.5 + 0.5 * moments(x.reshape(-1, C))[2], rtol=1e-6)


def test_nn_jit():
    model = nn.jit(Step)(BatchNorm)
    held = model.init(KEY, data(), None)
    (y, _), _ = model.apply(held, data(5.0), None, mutable=["batch_stats"])
    assert_output(y, batch_norm(data(5.0)) * 2 + 1)


def test_training_steps_trace_once():
    @chex.assert_max_traces(1)
    def traced(variables, x):
        return train(BatchNorm(), variables, x)[1]

    step, held = jax.jit(traced), BatchNorm().init(KEY, data(), use_running_average=False)
    for _ in range(3):
        held = {**held, "batch_stats": step(held, data())}


def test_a_subclass_keeps_its_own_name():
    held = AutoNamed(Sub).init(KEY, data(), train=True)
    assert {"Sub_0", "Sub_1"} <= set(held["params"])


@pytest.mark.parametrize("layer", [BatchNorm, BatchRenorm])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_running_average": 8}, r"True, False or None: got 8\. The number of features"),
        ({"momentum": 99}, r"`momentum` must lie in \[0, 1\]: got 99\..*0.9 where PyTorch has 0.1"),
        ({"momentum": -0.1}, r"`momentum` must lie"),
        ({"momentum": float("nan")}, r"`momentum` must lie"),
        ({"epsilon": -1e-3}, r"`epsilon` must not be negative: got -0.001"),
    ],
)
def test_fields_are_checked(layer, fields, message):
    with pytest.raises(ValueError, match=message):
        layer(**fields)


def test_fields_may_be_traced_or_numpy():
    """A momentum that is searched by vmap, and flags that numpy made."""
    x = np.arange(6, dtype=np.float32).reshape(3, 2)

    def mean(momentum):
        layer = BatchNorm(np.bool_(False), momentum=momentum)
        variables = layer.init(jax.random.key(0), x)
        return layer.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]["mean"]

    np.testing.assert_allclose(jax.vmap(mean)(jnp.array([0.0, 1.0])), [x.mean(0), [0, 0]])
    assert BatchNorm(1).use_running_average == 1


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_float64_input_has_statistics_of_float64(dtype):
    """A mean of 1e4 stored in float32 shifts the evaluation by 3e-4 of a standard deviation."""
    x = np.random.default_rng(0).normal(1e4, 1.0, (64, 3)).astype(dtype)
    with jax.enable_x64(True):
        layer = BatchNorm(momentum=0.0, param_dtype=jnp.float64)
        variables = layer.init(jax.random.key(0), x, False)
        y, new = layer.apply(variables, x, False, mutable=["batch_stats"])
        again = layer.apply({**variables, **new}, x, True)
        stats = flaxbn.estimate_population_stats(layer, variables, x, batch_size=16, call=lambda m, b: m(b, True))
    expected = batch_norm(x)
    assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {np.dtype(dtype), np.dtype(np.float64)}
    for found in (y, again):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11)  # 1e4 times the rounding of float64
    for found in (new["batch_stats"], stats):
        np.testing.assert_allclose(found["mean"], x.mean(0), rtol=1e-15)
        np.testing.assert_allclose(found["var"], x.var(0), rtol=1e-12)
