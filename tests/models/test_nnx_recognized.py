"""Layers of flax.nnx that others wrote, recognized or marked, with the statistics of float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flaxbn

X = np.random.default_rng(0).normal(1.0, 2.0, (64, 3)).astype(np.float32)


class Copied(nnx.Module):
    """With names, a shape and a flag of its own."""

    def __init__(self, features):
        self.nnx_mean = nnx.BatchStat(jnp.zeros((1, features)))
        self.nnx_var = nnx.BatchStat(jnp.ones((1, features)))
        self.training = True

    def __call__(self, x):
        if self.training:
            self.nnx_mean[...], self.nnx_var[...] = x.mean(0, keepdims=True), x.var(0, keepdims=True)
        return (x - self.nnx_mean[...]) / jnp.sqrt(self.nnx_var[...] + 1e-5)


class Marked(nnx.Module):
    """With a line more in its evaluation."""

    def __init__(self, features):
        self.nnx_mu = nnx.BatchStat(jnp.zeros(features))
        self.nnx_sigma2 = nnx.BatchStat(jnp.ones(features))

    def __call__(self, x):
        mean, var = flaxbn.mark(x, self.nnx_mu[...], self.nnx_sigma2[...])
        return (x - mean[None]) / jnp.sqrt(var[None] + 1e-5)


class Net(nnx.Module):
    """Two of them."""

    def __init__(self, norm):
        rngs = nnx.Rngs(0)
        self.first, self.a = nnx.Linear(3, 5, rngs=rngs), norm(5)
        self.second, self.b = nnx.Linear(5, 4, rngs=rngs), norm(4)

    def __call__(self, x):
        return self.b(self.second(jnp.tanh(self.a(self.first(x)))))


@pytest.fixture(autouse=True)
def _recognized():
    flaxbn.recognize(Copied, mean="nnx_mean", var="nnx_var", evaluation={"training": False})


def wide(array):
    return np.asarray(array[...], np.float64)


def whole_set(net):
    """The mean and variance of the inputs of both layers, all of X being one batch; and the output."""
    h, found = X.astype(np.float64), []
    for layer in (net.first, net.second):
        h = h @ wide(layer.kernel) + wide(layer.bias)
        found.append((h.mean(0), h.var(0)))
        h = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5)
        output, h = h, np.tanh(h)
    return found, output


@pytest.mark.parametrize("norm", [Copied, Marked])
@pytest.mark.parametrize("method", ["precise", "exact"])
def test_statistics(norm, method):
    net = Net(norm)
    names = ("nnx_mean", "nnx_var") if norm is Copied else ("nnx_mu", "nnx_sigma2")
    size = len(X) if method == "precise" else 10
    stats = flaxbn.estimate_population_stats(*nnx.split(net), X, batch_size=size, method=method)
    expected, output = whole_set(net)
    for layer, (mean, var) in zip("ab", expected):
        found = [np.ravel(stats[layer][name][...]) for name in names]
        assert np.all(np.abs(found[0] - mean) <= 2e-6 * np.sqrt(var))  # ten roundings of float32
        assert np.all(np.abs(found[1] - var) <= 2e-6 * var)
    assert not np.any(wide(getattr(net.a, names[0])))  # the model is as it was
    nnx.update(net, stats)
    np.testing.assert_allclose(flaxbn.apply(*nnx.split(net), X), output, atol=1e-5)
    np.testing.assert_allclose(flaxbn.apply(*nnx.split(Net(norm)), X, statistics="batch"), output, atol=1e-5)


def test_a_class_that_is_no_batch_norm_runs_as_it_is():
    class Keeps(Copied):
        def __call__(self, x):
            return x + self.nnx_mean[...]

    flaxbn.recognize(Keeps, None)
    net = Net(Keeps)
    net.b = Copied(4)
    stats = flaxbn.estimate_population_stats(*nnx.split(net), X, batch_size=len(X), only=lambda path: path == "b")
    assert not np.any(wide(stats["a"]["nnx_mean"]))
    assert np.all(wide(stats["b"]["nnx_var"]) != 1)
