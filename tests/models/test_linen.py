"""Population statistics of every way to build a Flax model, against the model's own training mode."""

import flax
import flax.linen as nn
import jax
import numpy as np
import pytest
from models import (
    BATCHES,
    MODELS,
    Deep,
    Masked,
    ScanBlock,
    Untracked,
    X,
    initialized,
    train,
)
from oracle import assert_same_statistics, by_training_mode

import flaxbn


@pytest.mark.parametrize("name", MODELS)
def test_matches_training_mode(name):
    model = MODELS[name]
    variables = initialized(model)
    found = flaxbn.estimate_population_stats(model, variables, BATCHES)
    assert jax.tree.structure(found) == jax.tree.structure(variables["batch_stats"])
    assert_same_statistics(found, by_training_mode(model, variables, BATCHES, train))


@pytest.mark.parametrize("name", MODELS)
def test_apply_matches_training_mode(name):
    model = MODELS[name]
    variables = initialized(model)
    found = flaxbn.apply(model, variables, X, statistics="batch")
    expected, _ = model.apply(variables, X, method=train, mutable=["batch_stats"])
    # Both round at each of a few layers, from different formulas.
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=2e-5, atol=2e-5), found, expected)


@pytest.mark.parametrize("name", MODELS)
def test_apply_matches_evaluation(name):
    model = MODELS[name]
    variables = initialized(model)
    expected = model.apply(variables, X, mutable=["cache"])[0]
    found = flaxbn.apply(model, variables, X)
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=2e-6, atol=2e-6), found, expected)


def test_jitted_layers_are_seen_after_the_model_has_run_already():
    model = Deep(wrap=nn.jit)
    variables = initialized(model)
    model.apply(variables, BATCHES[0])
    model.apply(variables, BATCHES[0], mutable=flax.core.DenyList("params"))
    found = flaxbn.estimate_population_stats(model, variables, BATCHES)
    assert_same_statistics(found, by_training_mode(model, variables, BATCHES, train))
    np.testing.assert_array_equal(model.apply(variables, X), Deep().apply(variables, X))


@pytest.mark.parametrize("norm", [flaxbn.BatchNorm, nn.BatchNorm])
def test_masks_in_the_model_select_positions(norm):
    model = Masked(norm)
    mask = np.random.default_rng(1).random(X.shape[:2]) < 0.6
    variables = initialized(model, {"x": X, "mask": mask})
    found = flaxbn.estimate_population_stats(model, variables, {"x": X, "mask": mask}, batch_size=7)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"]["Dense_0"])
    positions = (X.astype(np.float64) @ p["kernel"] + p["bias"])[mask]
    assert_same_statistics(found["norm"], {"mean": positions.mean(0), "var": positions.var(0)})


def test_containers_and_metadata_are_kept():
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(6, kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "model")))(x)
            scanned = nn.scan(
                ScanBlock,
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=2,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            boxed = nn.map_variables(
                nn.BatchNorm,
                "batch_stats",
                init=self.is_initializing(),
                trans_out_fn=lambda tree: jax.tree.map(lambda a: nn.Partitioned(a, ("features",)), tree),
                trans_in_fn=nn.meta.unbox,
            )
            x = boxed(use_running_average=True, name="boxed")(x)
            return scanned(name="layers")(x, None)[0]

    model = Boxed()
    variables = flax.core.freeze(initialized(model))
    found = flaxbn.estimate_population_stats(model, variables, BATCHES)
    assert jax.tree.structure(found) == jax.tree.structure(variables["batch_stats"])
    assert isinstance(found, flax.core.FrozenDict)
    layer = next(iter(jax.tree.leaves(found["boxed"], is_leaf=lambda a: isinstance(a, nn.Partitioned))))
    assert layer.names == ("features",)
    values = X.sum(-1).astype(np.float64)
    expected = {"mean": np.full(6, values.mean()), "var": np.full(6, values.var())}
    # Every channel is the sum over the inputs, whose rounding grows with their number.
    boxed = jax.tree.map(lambda a: a, found["boxed"])
    boxed = boxed.get("BatchNorm_0", boxed)
    assert_same_statistics(boxed, expected, tolerance=1e-5)


def test_a_layer_without_stored_statistics_is_an_error():
    model = Untracked()
    with pytest.raises(ValueError, match=r"has no stored statistics.*lifted transformation"):
        flaxbn.estimate_population_stats(model, initialized(model), BATCHES)
