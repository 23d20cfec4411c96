"""Moments of an input that lies on several devices, against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxbn
from flaxbn.estimation.sharded import measure_sharded
from flaxbn.tracing.primitive import Tap

B, T, C, D = 16, 6, 3, 4
RNG = np.random.default_rng(0)
X = RNG.normal(1e4, 1, (B, T, C)).astype(np.float32)
WEIGHTS = (RNG.uniform(0.5, 2, (B, 1, 1)) * (np.arange(B) % 5 > 0)[:, None, None]).astype(np.float32)
MASK = (RNG.uniform(size=(B, T, 1)) < 0.7).astype(np.float32)
DOMAIN = RNG.integers(0, D - 1, B).astype(np.int32)  # the last domain is absent
ROUNDING = 1e-6
"""Of a sum of 100 float32, about a pivot that is known to the rounding of 1e4, and of one merge over parts."""


def tap(x=X, weights=None, domain=None, axes=(0, 1), lanes=0):
    shape = x.shape[-1:] if domain is None else (*x.shape[:lanes], D, x.shape[-1])
    statistics = jnp.zeros(shape)
    return Tap(x, statistics, statistics, weights, domain, axes, lanes, None, None, 0, "BatchNorm (norm)")


def oracle(x, weights, axes):
    """Count, mean and variance in float64, where the weight is positive."""
    x, weights = np.asarray(x, np.float64), np.broadcast_to(weights, x.shape)
    x = np.where(weights > 0, x, 0)
    count = weights.sum(axes, dtype=np.float64)
    mean = (weights * x).sum(axes) / np.maximum(count, 1e-30)
    deviation = x - np.expand_dims(mean, axes)
    return count, mean, (weights * deviation**2).sum(axes) / np.maximum(count, 1e-30)


def assert_moments(found, expected):
    count, mean, var = expected
    np.testing.assert_allclose(found.count, count, rtol=ROUNDING)
    seen = count > 0
    # Means of 1e4 are stored with 1e-3 of the standard deviation.
    np.testing.assert_allclose(np.where(seen, found.mean, 0), np.where(seen, mean, 0), rtol=1e-7)
    np.testing.assert_allclose(found.var, np.where(seen, var, 0), rtol=ROUNDING, atol=ROUNDING)


def measured(sharding, given, weights=None, samples=B, axis=0):
    """On the devices, the input split along the axis of the samples."""
    spec = jax.sharding.PartitionSpec(*(None,) * axis, "data")
    x = jax.device_put(given.x, jax.sharding.NamedSharding(sharding.mesh, spec))

    def run(x, weights, mask, domain):
        given_now = given._replace(x=x, weights=mask, domain=domain)
        return measure_sharded(given_now, weights, samples, sharding, on=None).moments

    lowered = jax.jit(run).lower(x, weights, given.weights, given.domain)
    compiled = lowered.compile()
    text = compiled.as_text()
    exchanges = sum(
        text.count(f" {kind}(") for kind in ("all-reduce", "all-gather", "all-to-all", "collective-permute")
    )
    return compiled(x, weights, given.weights, given.domain), exchanges


@pytest.fixture
def sharding(devices):
    return flaxbn.data_sharding()


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["alike", "weighted"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_weights_and_masks(sharding, weights, mask):
    x = X if mask is None else np.where(mask > 0, X, np.nan)
    found, exchanges = measured(sharding, tap(x, mask), weights)
    factors = [factor for factor in (weights, mask) if factor is not None]
    assert_moments(found, oracle(x, np.prod([np.broadcast_to(f, x.shape) for f in factors], axis=0), (0, 1)))
    assert exchanges == 1


def test_domains_of_examples(sharding):
    found, exchanges = measured(sharding, tap(domain=DOMAIN), WEIGHTS)
    rows = [oracle(X, WEIGHTS * (number == DOMAIN)[:, None, None], (0, 1)) for number in range(D)]
    assert_moments(found, [np.stack(fields) for fields in zip(*rows)])
    assert exchanges == 1


def test_one_domain_for_all(sharding):
    found, exchanges = measured(sharding, tap(domain=np.int32(2)))
    row = oracle(X, 1, (0, 1))
    expected = [np.where(np.arange(D)[:, None] == 2, field, 0) for field in row]
    assert_moments(found, expected)
    assert exchanges == 1


def test_lanes_with_domains(sharding):
    """Two lanes of vmap, each with statistics and domains of its own."""
    x, domain = np.stack([X, 2 * X]), np.stack([DOMAIN, DOMAIN[::-1]])
    found, exchanges = measured(sharding, tap(x, domain=domain, lanes=1), axis=1)
    for lane in range(2):
        rows = [oracle(x[lane], (number == domain[lane])[:, None, None] * 1.0, (0, 1)) for number in range(D)]
        assert_moments(flaxbn.Moments(*(f[lane] for f in found)), [np.stack(fields) for fields in zip(*rows)])
    assert exchanges == 1


def test_time_before_samples(sharding):
    x = np.swapaxes(X, 0, 1)
    found, exchanges = measured(sharding, tap(x), axis=1)
    assert_moments(found, oracle(X, 1, (0, 1)))
    assert exchanges == 1


def test_samples_and_time_in_one_axis(sharding):
    found, exchanges = measured(sharding, tap(X.reshape(-1, C), axes=(0,)))
    assert_moments(found, oracle(X, 1, (0, 1)))
    assert exchanges == 1


def test_the_first_of_two_axes_of_that_length(sharding):
    x = np.repeat(X, 3, axis=1)[:, :B]
    found, exchanges = measured(sharding, tap(x))
    assert_moments(found, oracle(x, 1, (0, 1)))
    assert exchanges == 1


def test_the_wrong_axis_gives_the_same(sharding):
    """Statistics for each sample, over twice as many positions."""
    x = np.repeat(X, 6, axis=1)[:, : 2 * B]
    found, _ = measured(sharding, tap(x, axes=(1,)))
    assert_moments(found, oracle(x, 1, (1,)))


def test_no_axis_of_samples(sharding):
    """Statistics for each example: nothing to cut, and still right."""
    found, _ = measured(sharding, tap(axes=(1,)))
    assert_moments(found, oracle(X, 1, (1,)))


def test_complex_values(sharding):
    x = (X + 1j * X[::-1]).astype(np.complex64)
    found, _ = measured(sharding, tap(x))
    _, mean, var = oracle(x.real, 1, (0, 1))
    _, imaginary, other = oracle(x.imag, 1, (0, 1))
    np.testing.assert_allclose(found.mean, mean + 1j * imaginary, rtol=1e-7)
    np.testing.assert_allclose(found.var, var + other, rtol=ROUNDING)


def test_parts_without_weight(sharding):
    """Of eight devices seven have nothing to measure."""
    weights = (np.arange(B) < 2)[:, None, None].astype(np.float32)
    found, _ = measured(sharding, tap(), weights)
    assert_moments(found, oracle(X, weights, (0, 1)))
