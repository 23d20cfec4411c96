"""On an accelerator moments of many batches are merged in stages: their values, and where they are not finite."""

import flax.linen as nn
import jax
import numpy as np
import pytest

import flaxbn

MODEL = nn.BatchNorm(use_running_average=True)
VARIABLES = {
    "params": {"scale": np.ones(2, np.float32), "bias": np.zeros(2, np.float32)},
    "batch_stats": {"mean": np.zeros(2, np.float32), "var": np.ones(2, np.float32)},
}
BATCHES = [np.random.default_rng(k).normal(k, 1, (3, 2)).astype(np.float32) for k in range(130)]


def estimate(batches):
    return flaxbn.estimate_population_stats(MODEL, VARIABLES, batches, method="exact", check_independence=False)


def test_statistics_of_more_batches_than_one_program_merges(accelerator):
    found, data = estimate(BATCHES), np.concatenate(BATCHES).astype(np.float64)
    np.testing.assert_allclose(found["mean"], data.mean(0), rtol=1e-5)  # merged in float32
    np.testing.assert_allclose(found["var"], data.var(0), rtol=1e-5)


@pytest.mark.parametrize("where", [0, 70, 129])
def test_the_batch_that_is_not_finite(accelerator, where):
    batches = [*BATCHES[:where], np.full((3, 2), np.inf, np.float32), *BATCHES[where + 1 :]]
    with pytest.raises(ValueError, match=rf"must be finite: .* are not in batch {where} \(counted from 0\)"):
        estimate(batches)


def test_an_overflow_between_chunks_of_batches(accelerator):
    """All batches are finite, and so is what the first 64 give, and the next; between them the variance overflows."""
    batches = [np.full((1, 2), 3e19 if k < 64 else -3e19, np.float32) for k in range(128)]
    with pytest.raises(ValueError, match=r"must be finite: .* are not in batch 0 .*, or overflows"):
        estimate(batches)


def test_what_cannot_be_compiled_beside_others_is_compiled_by_itself(accelerator, monkeypatch):
    compile_lowered, tried = jax.stages.Lowered.compile, []

    def fails(lowered):
        tried.append(lowered)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fails)
    model = nn.Sequential([nn.Dense(3), MODEL])
    variables = jax.device_get(model.init(jax.random.key(0), BATCHES[0]))
    data, options = np.concatenate(BATCHES), {"method": "exact", "batch_size": 30, "check_independence": False}
    found = flaxbn.estimate_population_stats(model, variables, data, **options)
    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_lowered)
    params, data = variables["params"]["layers_0"], data.astype(np.float64)
    assert tried
    np.testing.assert_allclose(found["layers_1"]["var"], (data @ params["kernel"] + params["bias"]).var(0), rtol=1e-4)
