"""Estimates in which groups of consecutive samples normalize by themselves, as ghost batches do in training."""

import jax
import numpy as np
import pytest
from meshes import EVERYWHERE, NET, VARIABLES, X, estimate, oracle, strided
from oracle import assert_same_statistics

import flaxbn

SIZE = 10


def in_groups(batches, size=SIZE):
    return [batch[i : i + size] for batch in batches for i in range(0, len(batch), size)]


def assert_normalized_in_groups(found, batches, **others):
    assert_same_statistics(found, oracle(in_groups(batches), **others), EVERYWHERE)
    if not others:
        with pytest.raises(AssertionError):  # the oracle tells groups from batches
            assert_same_statistics(found, oracle(batches), EVERYWHERE)


@pytest.mark.parametrize(("batch_size", "split"), [(50, False), (67, True)])
@pytest.mark.usefixtures("devices")
def test_arrays(batch_size, split):
    """Batches of 67 and 66 leave groups of 7 and of 6."""
    sharding = flaxbn.data_sharding() if split else None
    found = estimate(batch_size=batch_size, normalization_batch=SIZE, sharding=sharding)
    assert_normalized_in_groups(found, strided(batch_size))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.usefixtures("devices")
def test_a_stream(split):
    batches = [X[:60], X[60:112], X[112:172]]
    sharding = flaxbn.data_sharding() if split else None
    found = estimate(iter(batches), normalization_batch=np.int32(SIZE), sharding=sharding)
    assert_normalized_in_groups(found, batches)


def test_many_batches_on_several_cores():
    """More data than one thread takes, the last group of each batch smaller than the others."""
    x = np.tile(X, (350, 1))
    found = estimate(x, batch_size=len(x) // 8, normalization_batch=300)
    batches = [x[k::8] for k in range(8)]
    assert_same_statistics(found, oracle(in_groups(batches, 300)), EVERYWHERE)


def test_weights():
    weights = np.random.default_rng(1).integers(1, 4, len(X)).astype(np.float32)
    options = {"call": lambda m, b: m(b["x"]), "sample_weight": lambda b: b["w"]}
    found = estimate([{"x": X, "w": weights}], normalization_batch=SIZE, **options)
    assert_normalized_in_groups(found, [X], weights=in_groups([weights]))


def test_groups_are_as_batches_of_their_own():
    found = flaxbn.population_moments(NET, VARIABLES, [X], normalization_batch=SIZE)
    expected = flaxbn.population_moments(NET, VARIABLES, np.split(X, len(X) // SIZE))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=EVERYWHERE, atol=EVERYWHERE), found, expected)


def test_each_group_has_random_keys_of_its_own():
    def call(module, x):
        return module(0 * x + jax.random.normal(module.make_rng("noise")))

    found = estimate([X[:20]], call=call, rngs={"noise": jax.random.key(3)}, normalization_batch=SIZE)
    assert np.all(found["BatchNorm_0"]["var"] > 1e-3)


def test_inference_that_resembles_training_with_ghost_batches():
    """In training each group of 10 is normalized by itself: what deeper layers then see has these statistics."""

    def norm(**options):
        return flaxbn.BatchNorm(**options, virtual_batch_size=SIZE)

    net = NET.clone(norm=norm)
    _, new = jax.jit(lambda x: net.apply(VARIABLES, x, train=True, mutable=["batch_stats"]))(X)
    found = estimate([X], normalization_batch=SIZE)
    assert_same_statistics(new["batch_stats"], jax.device_get(found), EVERYWHERE)  # momentum 0


@pytest.mark.parametrize("size", [0, -3, True, 2.5, None])
def test_a_size_that_is_none_is_an_error(size):
    with pytest.raises(ValueError, match=rf"`normalization_batch` must be .*: got {size!r}\. An integer stands"):
        estimate(batch_size=50, normalization_batch=size)


def test_errors():
    with pytest.raises(ValueError, match=r'whole set.*leave `normalization_batch` at "global", got 10'):
        estimate(batch_size=50, normalization_batch=SIZE, method="exact")
    with pytest.raises(ValueError, match=r"more than one value"):
        estimate([X[:31]], normalization_batch=SIZE)  # one is left
    with pytest.raises(ValueError, match=r"'BatchNorm_0' are not in batch 1 "):
        estimate([X[:30], np.full_like(X[:30], np.nan)], normalization_batch=SIZE)
