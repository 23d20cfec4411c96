"""`normalize` and `ema` against the formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import EPSILON, batch_norm, moments, wide

from flaxbn import ema, normalize

N, C = 32, 3
RATIOS = [0.0, 10.0, 1e3, 1e4]  # |mean| / std
ARGUMENTS = ("x", "mean", "var", "scale", "bias")


def arguments(ratio=0.0, seed=0):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(N, C)) * [1.0, 0.5, 3.0] + ratio * np.array([1.0, -0.5, 3.0])).astype(np.float32)
    _, mean, var = moments(x)
    scale, bias = rng.uniform(0.5, 2.0, (1, C)), rng.normal(size=(1, C))
    return tuple(np.asarray(a, np.float32) for a in (x, mean[None] + 0.1, var[None], scale, bias))


@jax.jit
def normalized(x, mean, var, scale, bias):
    return normalize(x, mean, var, scale=scale, bias=bias, epsilon=EPSILON)


@jax.jit
def gradients(cotangent, *arguments):
    return jax.vjp(normalized, *arguments)[1](cotangent)


def formula(x, mean, var, scale, bias):
    return batch_norm(x, scale, bias, statistics=(mean, var))


def formula_gradients(cotangent, x, mean, var, scale, bias):
    cotangent, x, mean, var, scale, bias = wide(cotangent, x, mean, var, scale, bias)
    inverse = (var + EPSILON) ** -0.5
    of_x = cotangent * scale * inverse
    return (
        of_x,
        -of_x.sum(0, keepdims=True),
        (-0.5 * of_x * (x - mean) * inverse**2).sum(0, keepdims=True),
        (cotangent * (x - mean) * inverse).sum(0, keepdims=True),
        cotangent.sum(0, keepdims=True),
    )


@pytest.mark.parametrize("ratio", RATIOS)
def test_output_is_that_of_float64_at_every_offset(ratio):
    # x - mean is exact to half a unit in the last place of a number of the size of the spread; a few roundings follow.
    np.testing.assert_allclose(normalized(*arguments(ratio)), formula(*arguments(ratio)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ratio", RATIOS)
def test_all_gradients_are_those_of_float64_at_every_offset(ratio):
    cotangent = np.random.default_rng(1).normal(size=(N, C)).astype(np.float32)
    found = gradients(cotangent, *arguments(ratio))
    for name, one, other in zip(ARGUMENTS, found, formula_gradients(cotangent, *arguments(ratio))):
        # Sums of N terms that partly cancel: relative to the largest.
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-6 * np.abs(other).max(), err_msg=name)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_scale_and_bias_may_be_left_out(scaled, biased):
    x, mean, var, scale, bias = arguments(10.0)
    found = normalize(x, mean, var, scale=scale if scaled else None, bias=bias if biased else None, epsilon=EPSILON)
    expected = formula(x, mean, var, scale if scaled else 1.0, bias if biased else 0.0)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("biased", [False, True])
def test_the_residual_completes_the_mean(biased):
    x, _, var, scale, bias = arguments(1e4)
    mean = moments(x)[1][None]
    rounded = mean.astype(np.float32)
    residual = (mean - rounded).astype(np.float32)
    bias = bias if biased else None
    found = normalize(x, rounded, var, scale=scale, bias=bias, epsilon=EPSILON, residual=residual)
    expected = formula(x, mean, var, scale, 0.0 if bias is None else bias)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    without = normalize(x, rounded, var, scale=scale, bias=bias, epsilon=EPSILON)
    assert np.abs(without - expected).max() > 1e-5


def test_gradients_reach_the_residual():
    x, mean, var, scale, bias = arguments(10.0)
    found = jax.grad(
        lambda r: jnp.sum(normalize(x, mean, var, scale=scale, bias=bias, epsilon=EPSILON, residual=r)), argnums=0
    )(np.zeros_like(mean))
    np.testing.assert_allclose(found, -N * scale / np.sqrt(var + EPSILON), rtol=1e-6)


@pytest.mark.parametrize("epsilon", [1e-5, 0.1, 2.0])
def test_epsilon_is_added_to_the_variance(epsilon):
    found = normalize(np.float32([[3.0]]), np.float32([[1.0]]), np.float32([[0.25]]), epsilon=epsilon)
    np.testing.assert_allclose(found, 2 / np.sqrt(0.25 + epsilon), rtol=1e-6)


def test_statistics_broadcast_along_axes_of_length_1():
    rng = np.random.default_rng(2)
    x, mean, var = rng.normal(size=(4, 3, 5)), rng.normal(size=(4, 1, 5)), rng.uniform(0.5, 2, (1, 3, 1))
    found = normalize(*(np.float32(a) for a in (x, mean, var)), epsilon=EPSILON)
    np.testing.assert_allclose(found, (x - mean) / np.sqrt(var + EPSILON), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_computed_and_returned_in_float32(dtype):
    x, mean, var, scale, bias = arguments(10.0)
    x = jnp.asarray(x, dtype)
    found = normalized(x, mean, var, scale, bias)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, formula(np.float64(x), mean, var, scale, bias), rtol=1e-6, atol=1e-6)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x, mean, var, scale, bias = wide(*arguments(1e4))
        found = normalize(x, mean, var, scale=scale, bias=bias, epsilon=EPSILON)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, formula(x, mean, var, scale, bias), rtol=1e-11, atol=1e-11)


def test_complex_values():
    x, mean, var, scale, bias = arguments(1.0)
    x, mean = (x + 1j * x[::-1]).astype(np.complex64), (mean - 2j).astype(np.complex64)
    np.testing.assert_allclose(
        normalized(x, mean, var, scale, bias), formula(x, mean, var, scale, bias), rtol=1e-6, atol=1e-6
    )


def test_a_constant_channel_has_finite_gradients():
    x, _, var, scale, bias = arguments()
    x = np.full_like(x, 3.0)
    for gradient in gradients(np.ones_like(x), x, x[:1], 0 * var, scale, bias):
        assert np.all(np.isfinite(gradient))


def test_forward_mode():
    primals, tangents = arguments(10.0), arguments(1.0, seed=5)
    _, found = jax.jvp(normalized, primals, tangents)
    step = 1e-5
    primals, tangents = wide(*primals), wide(*tangents)
    ahead, behind = (formula(*(p + s * t for p, t in zip(primals, tangents))) for s in (step, -step))
    # Central differences in float64 are good to step**2; the tangents of the terms are of size 10.
    np.testing.assert_allclose(found, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-5)


def test_second_derivatives():
    def loss(theta):
        x, mean, var, scale, bias = (t.reshape(1, 1) for t in theta)
        return (normalize(x, mean, var, scale=scale, bias=bias, epsilon=EPSILON) ** 3)[0, 0]

    def loss64(theta):
        x, mean, var, scale, bias = theta
        return ((x - mean) / np.sqrt(var + EPSILON) * scale + bias) ** 3

    theta, step = np.array([1.5, 0.5, 0.8, 1.2, -0.3]), 1e-4
    found = jax.jit(jax.hessian(lambda t: loss([t[i] for i in range(5)])))(theta.astype(np.float32))
    for i, j in np.ndindex(5, 5):
        a, b = step * np.eye(5)[i], step * np.eye(5)[j]
        expected = loss64(theta + a + b) - loss64(theta + a - b) - loss64(theta - a + b) + loss64(theta - a - b)
        np.testing.assert_allclose(found[i, j], expected / (4 * step**2), rtol=1e-5, atol=1e-5)  # 1e-16 / step**2


def test_vmap_over_the_statistics():
    x, mean, var, scale, bias = arguments()
    means = np.stack([mean, mean + 5])
    found = jax.vmap(normalized, in_axes=(None, 0, None, None, None))(x, means, var, scale, bias)
    for one, mean in zip(found, means):
        np.testing.assert_allclose(one, formula(x, mean, var, scale, bias), rtol=1e-6, atol=2e-6)


def test_momentum_is_the_weight_of_the_old_value():
    old, new = np.float32([1.0, -2.0]), np.float32([5.0, 6.0])
    np.testing.assert_allclose(ema(old, new, 0.75), [2.0, 0.0], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(ema(old, new, 1.0), old)
    np.testing.assert_array_equal(ema(old, new, 0.0), new)


def test_a_float32_running_average_settles():
    step = jax.jit(lambda old: ema(old, jnp.float32(2.0), 0.99))
    old = jnp.float32(1.0)
    for _ in range(2000):
        old = step(old)
    np.testing.assert_allclose(old, 2.0, rtol=1e-5)  # stalls where 1 % of the rest is half a unit in the last place


def test_the_weights_of_past_updates():
    """After t updates the initial value weighs momentum^t, and the batch j updates ago (1 - momentum) momentum^j."""
    momentum, values = 0.9, np.random.default_rng(0).normal(size=31)
    old = values[0]
    for new in values[1:]:
        old = ema(old, new, momentum)
    past = (1 - momentum) * momentum ** np.arange(30)
    np.testing.assert_allclose(old, momentum**30 * values[0] + past @ values[:0:-1], rtol=1e-12)
