"""Layers under vmap: lanes with statistics of their own are channels, lanes that share theirs are positions."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from models import (
    BATCHES,
    OwnLanes,
    SharedLanes,
    dense_normalized,
    initialized,
    train,
)
from oracle import assert_same_statistics, by_training_mode, merged

import flaxbn


def test_lanes_with_statistics_of_their_own():
    model = OwnLanes(axis=1)
    variables = initialized(model)
    found = flaxbn.estimate_population_stats(model, variables, BATCHES)
    assert_same_statistics(found, by_training_mode(model, variables, BATCHES, train))


def test_lanes_that_share_statistics_are_reduced_together():
    model = SharedLanes()
    variables = initialized(model)
    statistics = {"lanes": [], "after": []}
    for batch in BATCHES:
        x = batch.astype(np.float64)
        for key in statistics:
            x, mean, var = dense_normalized(variables, x, (key,))
            statistics[key].append((len(batch), mean, var))
    found = flaxbn.estimate_population_stats(model, variables, BATCHES)
    for key, values in statistics.items():
        mean, var = merged(*zip(*values))
        assert_same_statistics(found[key]["norm"], {"mean": mean, "var": var})


@pytest.mark.parametrize("outer_own", [False, True])
@pytest.mark.parametrize("inner_own", [False, True])
@pytest.mark.parametrize("scalar", [False, True])
def test_nested_lanes(outer_own, inner_own, scalar):
    """Lanes of lanes, with statistics of their own or shared, a domain for each example or for each batch."""

    class DomainNorm(nn.Module):
        @nn.compact
        def __call__(self, x, d):
            return flaxbn.BatchNorm(use_running_average=True, num_domains=2, use_scale=False, use_bias=False)(
                x, domain=d
            )

    def lanes(target, own):
        axes = {"batch_stats": 0 if own else None}
        return nn.vmap(target, in_axes=(0, None), out_axes=0, variable_axes=axes, split_rngs={"params": False})

    model = lanes(lanes(DomainNorm, inner_own), outer_own)()
    x = np.random.default_rng(6).normal(size=(2, 3, 5, 4)).astype(np.float32)
    d = 1 if scalar else np.array([1, 0, 1, 1, 0])
    variables = model.init(jax.random.key(0), x, d)
    found = flaxbn.estimate_population_stats(model, variables, [x], call=lambda m, x: m(x, d), keep_unseen=True)[
        "BatchNorm_0"
    ]["var"]
    axes = tuple(i for i, own in ((0, outer_own), (1, inner_own)) if not own)
    for k in (1,) if scalar else (0, 1):
        part = x if scalar else x[:, :, d == k]
        exact = part.astype(np.float64).var((*axes, 2))
        np.testing.assert_allclose(np.moveaxis(found, -2, 0)[k], exact, rtol=2e-6)
