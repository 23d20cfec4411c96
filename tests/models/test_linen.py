"""Population statistics of every way to build a Flax model, against the model's own training mode."""

import flax
import flax.linen as nn
import jax
import numpy as np
import pytest
from models import (
    BATCHES,
    MODELS,
    Branches,
    Deep,
    InsideWhile,
    Masked,
    Recurrent,
    Repeated,
    ScanBlock,
    SharedLanes,
    Untracked,
    X,
    dense_normalized,
    initialized,
    train,
)
from oracle import assert_same_statistics, by_training_mode, merged

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


@pytest.mark.parametrize("how", ["loop", "broadcast", "carried"])
def test_calls_of_one_layer_are_merged_with_a_warning(how):
    model = Repeated(how)
    variables = initialized(Repeated("loop"))
    if how != "loop":
        variables = {k: {"layers": v} for k, v in variables.items()}
    path = ("block",) if how == "loop" else ("layers", "block")
    statistics = []
    for batch in BATCHES:
        x = batch.astype(np.float64)
        for _ in range(3):
            x, mean, var = dense_normalized(variables, x, path)
            statistics.append((len(batch), mean, var))
    name = "/".join((*path, "norm"))
    with pytest.warns(UserWarning, match=f"'{name}': called more than once"):
        found = flaxbn.estimate_population_stats(model, variables, BATCHES)
    for key in path:
        found = found[key]
    mean, var = merged(*zip(*statistics))
    assert_same_statistics(found["norm"], {"mean": mean, "var": var})


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


def test_recurrent_cells_merge_over_time():
    model = Recurrent()
    variables = initialized(model)
    statistics = []
    for batch in BATCHES:
        carry = np.zeros((len(batch), 6))
        for t in reversed(range(3)):
            carry = 0.5 * carry + batch[:, t].astype(np.float64)
            mean, var = carry.mean(0), carry.var(0)
            statistics.append((len(batch), mean, var))
            carry = (carry - mean) / np.sqrt(var + 1e-5)
    with pytest.warns(UserWarning, match="called more than once"):
        found = flaxbn.estimate_population_stats(model, variables, BATCHES)
    mean, var = merged(*zip(*statistics))
    assert_same_statistics(found["cell"]["norm"], {"mean": mean, "var": var})


def test_branches_count_only_what_they_are_given():
    model = Branches()
    variables = initialized(model)
    batches = [BATCHES[0] + 5, BATCHES[1] - 5, BATCHES[2] + 5]
    statistics = {"large": [], "small": [], "after": []}
    for batch in batches:
        x = batch.astype(np.float64)
        way = "large" if x.mean() > 1 else "small"
        x, mean, var = dense_normalized(variables, x if way == "large" else 2 * x, (way,))
        statistics[way].append((len(batch), mean, var))
        _, mean, var = dense_normalized(variables, x, ("after",))
        statistics["after"].append((len(batch), mean, var))
    found = flaxbn.estimate_population_stats(model, variables, batches)
    for key, values in statistics.items():
        mean, var = merged(*zip(*values))
        assert_same_statistics(found[key]["norm"], {"mean": mean, "var": var})


def test_a_branch_never_taken_saw_no_data():
    model = Branches()
    with pytest.raises(ValueError, match=r"must see data: 'small/norm' saw none.*only"):
        flaxbn.estimate_population_stats(model, initialized(model), [X + 5])


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


def test_a_layer_inside_while_is_an_error():
    model = InsideWhile()
    with pytest.raises(ValueError, match=r"must not lie inside `while`.*block/norm"):
        flaxbn.estimate_population_stats(model, initialized(model), BATCHES)


def test_a_layer_without_stored_statistics_is_an_error():
    model = Untracked()
    with pytest.raises(ValueError, match=r"has no stored statistics.*lifted transformation"):
        flaxbn.estimate_population_stats(model, initialized(model), BATCHES)
