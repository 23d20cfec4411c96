"""Estimation on several devices: the statistics do not depend on how many, and how people train on them."""

import functools

import jax
import numpy as np
import pytest
from flax import jax_utils
from jax.sharding import PartitionSpec
from meshes import (
    EVERYWHERE,
    MESHES,
    NET,
    VARIABLES,
    N,
    X,
    by_device,
    estimate,
    on_devices,
    on_mesh,
    oracle,
    split_over_model,
    strided,
)
from models import MLP
from oracle import assert_same_statistics

import flaxbn


@pytest.fixture(params=MESHES)
def sharding(request, devices):
    return on_mesh(*MESHES[request.param])


@pytest.mark.parametrize(
    ("method", "given_as", "count"),
    [
        *(("precise", given_as, count) for given_as in ("arrays", "stream") for count in (1, 2, 8)),
        *(("exact", "arrays", count) for count in (1, 2, 8)),
        ("exact", "stream", 8),
    ],
)
def test_statistics_do_not_depend_on_the_number_of_devices(devices, method, given_as, count):
    """Batches of 25, which neither 2 nor 8 devices divide."""
    batches, options = (X, {"batch_size": 25}) if given_as == "arrays" else (iter(strided(25)), {})
    found = estimate(batches, method=method, sharding=on_devices(count), **options)
    expected = oracle(strided(25) if method == "precise" else [X])
    assert_same_statistics(found, expected, EVERYWHERE)
    with pytest.raises(AssertionError):  # the oracle tells the methods apart
        assert_same_statistics(found, oracle([X] if method == "precise" else strided(25)), EVERYWHERE)


@pytest.mark.parametrize(("method", "given_as"), [("precise", "arrays"), ("precise", "stream"), ("exact", "stream")])
def test_each_sample_counts_once(devices, method, given_as):
    """Padding of 7 in a batch of 25, and of 5 in one of 3."""
    for size in (25, 3):
        x = X[: 4 * size]
        batches, options = (x, {"batch_size": size}) if given_as == "arrays" else (np.split(x, 4), {})
        sharding = flaxbn.data_sharding()
        moments = flaxbn.population_moments(NET, VARIABLES, batches, method=method, sharding=sharding, **options)
        for layer in moments.values():
            np.testing.assert_array_equal(layer.count, len(x))
        # The first layer's statistics are those of all samples, however they are split.
        found = flaxbn.to_batch_stats(moments, VARIABLES["batch_stats"])
        assert_same_statistics(found, {"BatchNorm_0": oracle([x])["BatchNorm_0"]}, EVERYWHERE)


@pytest.mark.parametrize("method", ["precise", "exact"])
def test_padding_has_no_weight_where_samples_have_weights(devices, method):
    """Weights that are constant where they end: padding that repeated the last one would count."""
    weights = np.random.default_rng(1).integers(1, 4, N).astype(np.float32)
    found = estimate(
        {"x": X, "w": weights},
        batch_size=25,
        call=lambda module, batch: module(batch["x"]),
        sample_weight=lambda batch: batch["w"],
        method=method,
        sharding=flaxbn.data_sharding(),
    )
    parts, count = ([X], 1) if method == "exact" else (strided(25), 8)
    assert_same_statistics(found, oracle(parts, [weights[k::count] for k in range(count)]), EVERYWHERE)


@pytest.mark.parametrize("method", ["precise", "exact"])
def test_any_mesh_gives_the_same_statistics(sharding, method):
    expected = oracle(strided(25) if method == "precise" else [X])
    found = estimate(variables=split_over_model(sharding), batch_size=25, method=method, sharding=sharding)
    assert_same_statistics(found, expected, EVERYWHERE)


@pytest.mark.parametrize(("method", "given_as"), [("precise", "arrays"), ("exact", "stream")])
@pytest.mark.parametrize("mesh", ["model axis", "explicit"])
def test_data_may_lie_on_the_mesh_already(devices, mesh, method, given_as):
    sharding = on_mesh(*MESHES[mesh])
    x = jax.device_put(X, sharding)
    batches, options = (x, {"batch_size": 25}) if given_as == "arrays" else ([x], {})
    found = estimate(batches, split_over_model(sharding), method=method, sharding=sharding, **options)
    assert_same_statistics(found, oracle(strided(25) if given_as == "arrays" else [X]), EVERYWHERE)


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ("model axis", {}),
        ("model axis", {"normalization_batch": "device"}),
        ("explicit", {}),
        ("explicit", {"normalization_batch": "device"}),
        ("explicit", {"method": "exact"}),
    ],
    ids=str,
)
def test_within_set_mesh(devices, mesh, options):
    """A mesh that the caller has made the current one."""
    sharding = on_mesh(*MESHES[mesh])
    with jax.set_mesh(sharding.mesh):
        found = estimate([X], split_over_model(sharding), sharding=sharding, **options)
    expected = oracle(np.split(X, 4) if "normalization_batch" in options else [X])
    assert_same_statistics(found, expected, EVERYWHERE)


def test_random_numbers_do_not_depend_on_the_number_of_devices(devices):
    def call(module, x):
        return module(x + jax.random.normal(module.make_rng("noise"), x.shape))

    def found(count):
        rngs = {"noise": jax.random.key(7)}
        return estimate(X[:192], batch_size=48, call=call, rngs=rngs, sharding=on_devices(count))

    assert_same_statistics(found(8), jax.device_get(found(1)), EVERYWHERE)


@pytest.mark.parametrize("method", ["precise", "exact"])
@pytest.mark.parametrize("count", [1, 8])
def test_a_batch_of_one_value_is_an_error_on_any_number_of_devices(devices, count, method):
    with pytest.raises(ValueError, match=r"more than one value"):
        estimate([X[:1]], sharding=on_devices(count), method=method)


# How people train.


def test_trained_under_pmap(devices):
    """Each replica keeps the statistics of its own part; merged they are those of all."""

    @jax.pmap
    def step(variables, x):
        return NET.apply(variables, x, train=True, mutable=["batch_stats"])[1]

    replicated = jax_utils.replicate(VARIABLES)
    parts = X.reshape(8, 25, 4)
    merged_stats = flaxbn.merge_replicas(step(replicated, parts)["batch_stats"])
    assert_same_statistics(merged_stats, oracle(parts), EVERYWHERE)
    # The estimate of one replica's variables, normalized as it was trained, has nothing to add.
    single = {**jax_utils.unreplicate(replicated), "batch_stats": merged_stats}
    assert_same_statistics(by_device([X], variables=single), oracle(parts), EVERYWHERE)
    assert_same_statistics(estimate(variables=single, batch_size=25), oracle(strided(25)), EVERYWHERE)
    averaged = jax.tree.map(lambda a: a.mean(0), step(replicated, parts)["batch_stats"])
    with pytest.raises(AssertionError):
        assert_same_statistics(averaged, oracle(parts), 0.01)


def test_trained_under_shard_map_with_an_axis_name(devices):
    batches = flaxbn.data_sharding()
    model = MLP((8, 6), functools.partial(flaxbn.BatchNorm, axis_name="data"))

    def synchronized(variables, x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])[1]

    step = jax.jit(
        jax.shard_map(
            synchronized,
            mesh=batches.mesh,
            in_specs=(PartitionSpec(), PartitionSpec("data")),
            out_specs=PartitionSpec(),
        )
    )
    trained = {**VARIABLES, **step(VARIABLES, jax.device_put(X, batches))}
    assert_same_statistics(trained["batch_stats"], oracle([X]), EVERYWHERE)
    found = estimate([X], trained, sharding=batches)
    assert_same_statistics(found, oracle([X]), EVERYWHERE)


@pytest.mark.parametrize("mesh", ["one axis", "model axis"])
def test_trained_under_sharded_jit(devices, mesh):
    sharding = flaxbn.data_sharding() if mesh == "one axis" else on_mesh(*MESHES[mesh])
    variables = VARIABLES if mesh == "one axis" else split_over_model(sharding)

    @jax.jit
    def step(variables, x):
        return NET.apply(variables, x, train=True, mutable=["batch_stats"])[1]

    trained = {**variables, **step(variables, jax.device_put(X, sharding))}
    assert_same_statistics(trained["batch_stats"], oracle([X]), EVERYWHERE)
    found = estimate([X], trained, sharding=sharding)
    assert_same_statistics(found, oracle([X]), EVERYWHERE)
