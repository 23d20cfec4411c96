"""Which stored statistics a layer reads: those that reach it as they are, and no numbers that look like them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import OneLayer
from oracle import assert_same_statistics, one_oracle

import flaxbn

X = np.random.default_rng(0).normal(1.0, 2.0, (40, 3, 2)).astype(np.float32)
ONE = OneLayer(flaxbn.BatchNorm)
ONE_VARIABLES = ONE.init(jax.random.key(0), X[:2])


def test_another_model_inside_call_is_not_estimated():
    teacher_variables = {**ONE_VARIABLES, "batch_stats": {"norm": {"mean": jnp.array([1.0, 2.0]), "var": jnp.ones(2)}}}

    def call(module, x):
        return module(x), ONE.apply(teacher_variables, x + 9)

    found = flaxbn.estimate_population_stats(ONE, ONE_VARIABLES, X, batch_size=40, call=call)
    assert_same_statistics(found, one_oracle(X))


def test_statistics_computed_on_the_way_are_not_seen():
    class Shifted(nn.Module):
        @nn.compact
        def __call__(self, x):
            def doubled(tree):
                return jax.tree.map(lambda a: 2 * a, tree)

            norm = nn.map_variables(nn.BatchNorm, "batch_stats", trans_in_fn=doubled)
            return norm(use_running_average=True, name="norm")(x)

    with pytest.raises(ValueError, match=r"'norm' saw none.*computed from what is stored"):
        flaxbn.estimate_population_stats(Shifted(), ONE_VARIABLES, X, batch_size=32)
