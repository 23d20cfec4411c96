"""Where estimates on a CPU sum the values themselves."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxbn
from flaxbn.arithmetic import measure
from flaxbn.arithmetic.pivot import about_zero_or_mean
from flaxbn.estimation.compiled import Layout

MAPPED = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}, "in_axes": 0}
X = np.random.default_rng(0).normal(size=(2, 64, 8, 8, 32)).astype(np.float32)  # of two lanes


class OfDomain(nn.Module):
    @nn.compact
    def __call__(self, x, domain):
        return flaxbn.BatchNorm(use_running_average=True, num_domains=2)(x, domain=domain)


class Mapped(nn.Module):
    """Each lane has a domain of its own, which only a mapped program can choose."""

    @nn.compact
    def __call__(self, x):
        return nn.vmap(OfDomain, **MAPPED)()(x, jnp.arange(2))


@pytest.mark.parametrize(("model", "chosen"), [(nn.BatchNorm(use_running_average=True), True), (Mapped(), False)])
def test_what_the_model_maps_is_measured_as_ever(cpu, monkeypatch, model, chosen):
    """Under `jax.vmap` both ways would be taken."""
    seen = []
    monkeypatch.setattr(measure, "about_zero_or_mean", lambda *given: seen.append(given) or about_zero_or_mean(*given))
    variables = model.init(jax.random.key(0), X[:, :2])
    flaxbn.population_moments(model, variables, [X], keep_unseen=True)
    assert bool(seen) == chosen


def test_what_is_split_or_grouped_is_measured_as_ever():
    """Groups are mapped, and devices would wait for each other at the choice."""
    alone = {"sharding": None, "by_device": False, "group": None, "on_accelerator": False}
    assert Layout(**alone).platform == "cpu"
    assert Layout(**alone | {"group": 4}).platform is None
    assert Layout(**alone | {"sharding": object()}).platform is None
    assert Layout(**alone | {"on_accelerator": True}).platform == "accelerator"
