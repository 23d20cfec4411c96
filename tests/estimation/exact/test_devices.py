"""What an accelerator compiles ahead serves arrays on its own device, and no others."""

import flax.linen as nn
import jax
import numpy as np
import pytest

import flaxbn

X = np.random.default_rng(0).normal(1.0, 2.0, (24, 4)).astype(np.float32)
MODEL = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True), nn.Dense(2)])
VARIABLES = jax.device_get(jax.jit(MODEL.init)(jax.random.key(0), X[:2]))


def variance(variables, batches):
    found = flaxbn.estimate_population_stats(MODEL, variables, batches, batch_size=12, method="exact")
    return found["layers_1"]["var"]


@pytest.mark.parametrize("name", ["variables", "batches"])
def test_another_device_after_the_first(accelerator, name):
    """Variables that lie there, or batches alone."""
    params = VARIABLES["params"]["layers_0"]
    expected = (X.astype(np.float64) @ params["kernel"] + params["bias"]).var(0)
    found = [variance(VARIABLES, X)]
    given = {"variables": VARIABLES, "batches": X}
    found.append(variance(**given | {name: jax.device_put(given[name], jax.devices()[1])}))
    for one in found:
        np.testing.assert_allclose(one, expected, rtol=1e-5)  # products and sums of float32
