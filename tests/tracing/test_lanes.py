"""Layers that synchronize over an axis which the model maps itself: all lanes take part in their statistics."""

import flax.linen as nn
import jax
import numpy as np
import pytest

import flaxbn

X = np.random.default_rng(0).normal(2.0, 3.0, (24, 3, 4)).astype(np.float32)
EVERYTHING = X.astype(np.float64).reshape(-1, 4)


class Norm(nn.Module):
    options: tuple

    @nn.compact
    def __call__(self, x, domain):
        norm = flaxbn.BatchNorm(
            True, use_scale=False, use_bias=False, axis_name="lanes", name="norm", **dict(self.options)
        )
        return norm(x, domain=domain)


class Lanes(nn.Module):
    """A layer on the lanes of an axis, each lane with stored statistics of its own, or shared."""

    own: bool
    axis: int = 1
    options: tuple = ()

    @nn.compact
    def __call__(self, x, domain=None):
        lanes = nn.vmap(
            Norm,
            in_axes=(self.axis, 0 if np.ndim(domain) else None),
            out_axes=self.axis,
            variable_axes={"batch_stats": 0 if self.own else None},
            split_rngs={},
            axis_name="lanes",
        )
        return lanes(self.options, name="lanes")(x, domain)


def normalized(x):
    return (x - EVERYTHING.mean(0)) / np.sqrt(EVERYTHING.var(0) + 1e-5)


@pytest.mark.parametrize("own", [False, True])
def test_the_statistics_of_each_lane_are_those_of_all(own):
    model = Lanes(own)
    variables = model.init(jax.random.key(0), X)
    found = flaxbn.apply(model, variables, X, statistics="batch")
    # A few roundings of values of size 3.
    np.testing.assert_allclose(found, normalized(X.astype(np.float64)), atol=2e-6)
    for method in ("precise", "exact"):
        stats = flaxbn.estimate_population_stats(model, variables, X, batch_size=8, method=method)["lanes"]["norm"]
        assert stats["mean"].shape == ((3, 4) if own else (4,))
        for name, expected in (("mean", EVERYTHING.mean(0)), ("var", EVERYTHING.var(0))):
            np.testing.assert_allclose(stats[name], np.broadcast_to(expected, stats[name].shape), rtol=2e-6)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("scalar", [False, True])
def test_so_are_those_of_each_domain(own, scalar):
    model = Lanes(own, 0, (("num_domains", 2),))
    x = np.moveaxis(X, 1, 0)
    domain = np.ones(3, int) if scalar else np.tile(np.arange(24) % 2, (3, 1))
    variables = model.init(jax.random.key(0), x, domain)
    stats = flaxbn.estimate_population_stats(model, variables, [x], call=lambda m, x: m(x, domain), keep_unseen=True)
    stats = stats["lanes"]["norm"]
    for d in (1,) if scalar else (0, 1):
        part = (x if scalar else x[:, d::2]).astype(np.float64).reshape(-1, 4)
        mean = np.moveaxis(stats["mean"], -2, 0)[d]
        np.testing.assert_allclose(mean, np.broadcast_to(part.mean(0), mean.shape), rtol=2e-6)


@pytest.mark.parametrize("axis_name", ["batch", ("batch",)])
def test_a_model_of_one_example_mapped_in_call(axis_name):
    class One(nn.Module):
        @nn.compact
        def __call__(self, x):
            return flaxbn.BatchNorm(use_running_average=True, axis_name=axis_name, name="norm")(x)

    x = X[:, 0]
    variables = One().init(jax.random.key(0), x[0])
    call = lambda m, b: jax.vmap(m, axis_name="batch")(b)  # noqa: E731
    stats = flaxbn.estimate_population_stats(One(), variables, x, batch_size=6, call=call)["norm"]
    exact = x.astype(np.float64)
    np.testing.assert_allclose(stats["mean"], exact.mean(0), rtol=2e-6)
    np.testing.assert_allclose(stats["var"], exact.var(0), rtol=2e-6)


def test_an_input_that_is_the_same_in_all_lanes():
    class Same(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = flaxbn.BatchNorm(use_running_average=True, axis_name="lanes", name="norm")
            return jax.vmap(lambda scale: norm(x) * scale, axis_name="lanes")(np.ones(3, np.float32))

    x = X[:, 0]
    stats = flaxbn.estimate_population_stats(Same(), Same().init(jax.random.key(0), x), [x])["norm"]
    np.testing.assert_allclose(stats["var"], x.astype(np.float64).var(0), rtol=2e-6)


def test_an_outer_axis_is_synchronized_over_as_before():
    class Both(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = flaxbn.BatchNorm(use_running_average=True, axis_name=("data", "lanes"), name="norm")
            return jax.vmap(norm, axis_name="lanes")(x)

    variables = flaxbn.BatchNorm(use_running_average=True).init(jax.random.key(0), X[:, 0])
    variables = {collection: {"norm": held} for collection, held in variables.items()}
    parts = X.reshape(2, 12, 3, 4)
    found = jax.vmap(lambda x: flaxbn.apply(Both(), variables, x, statistics="batch"), axis_name="data")(parts)
    np.testing.assert_allclose(found, normalized(parts.astype(np.float64)), atol=2e-6)


def test_groups_of_lanes_are_an_error():
    model = Lanes(True, 1, (("axis_index_groups", ((0, 1), (2,))),))
    with pytest.raises(ValueError, match=r"norm' synchronizes within groups of the axis 'lanes', which the model maps"):
        flaxbn.apply(model, model.init(jax.random.key(0), X), X, statistics="batch")
