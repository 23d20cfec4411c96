"""With 64 bits on and float64 input, statistics of every kind are those of float64, at a mean of 1e4 too."""

import flax.linen as nn
import jax
import numpy as np
import pytest

import flaxbn

X = np.random.default_rng(0).normal(1e4, 1.0, (64, 3))
WIDE = X.astype(np.longdouble)  # the mean of 64 values of 1e4 is rounded in float64, too
TOLERANCE = 1e-11  # of a deviation of 1: some roundings of 1e4, which are 1.8e-12 each


class Net(nn.Module):
    """The second layer receives what the first puts out, at a mean of 1e4 again."""

    @nn.compact
    def __call__(self, x):
        x = 3 * flaxbn.BatchNorm(use_running_average=True, name="first")(x) + 1e4
        return flaxbn.BatchNorm(use_running_average=True, name="last")(x)


def normalized(x):
    return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)


def assert_statistics(found, x):
    assert {str(a.dtype) for a in found.values()} == {"float64"}
    np.testing.assert_allclose(found["mean"], x.mean(0).astype(float), rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(found["var"], x.var(0).astype(float), rtol=TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [
        {"batches": X, "batch_size": 16},
        {"batches": [X[:40], X[40:]]},
        {"batches": X, "batch_size": 16, "sample_weight": lambda b: np.ones(len(b))},
        {"batches": X, "batch_size": 20, "sharding": flaxbn.data_sharding()},
    ],
    ids=["arrays", "stream", "weights", "devices"],
)
@pytest.mark.usefixtures("devices")
def test_estimates_and_evaluation(options):
    with jax.enable_x64(True):
        variables = Net().init(jax.random.key(0), X)
        precise = flaxbn.estimate_population_stats(Net(), variables, **options)
        exact = flaxbn.estimate_population_stats(Net(), variables, method="exact", **options)
        y = Net().apply({**variables, "batch_stats": exact}, X)
        by_batch = flaxbn.apply(Net(), variables, X, statistics="batch")
    middle = 3 * normalized(WIDE) + 10_000
    assert_statistics(precise["first"], WIDE)
    assert_statistics(exact["first"], WIDE)
    assert_statistics(exact["last"], middle)
    for found in (y, by_batch):
        np.testing.assert_allclose(found, normalized(middle).astype(float), rtol=0, atol=TOLERANCE)
