"""Moments of more data, continued from earlier ones."""

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from models import MLP
from oracle import assert_same_statistics

import flaxbn

RNG = np.random.default_rng(0)
X = (RNG.normal(size=(120, 4)) + np.arange(120)[:, None] / 30).astype(np.float32)
NET = MLP()


VARIABLES = jax.jit(NET.init)(jax.random.key(0), X[:2])


BATCHES = np.split(X, 6)
M5, M6 = (flaxbn.Moments(*np.ones((3, size), np.float32)) for size in (5, 6))


def moments(batches, **options):
    return flaxbn.population_moments(NET, VARIABLES, batches, **options)


def assert_same_moments(found, expected):
    """In the same batches, merged in another order."""
    for layer, one in expected.items():
        np.testing.assert_array_equal(found[layer].count, one.count)
        found_layer, one = found[layer]._asdict(), one._asdict()
        assert_same_statistics(found_layer, jax.device_get(one))


@pytest.mark.parametrize("first", [1, 2, 5])
def test_continued_moments_are_those_of_one_pass(first):
    both = moments(BATCHES[first:], earlier=moments(BATCHES[:first]))
    assert_same_moments(both, moments(BATCHES))


def test_moments_are_continued_again_and_again():
    found = None
    for batch in BATCHES:
        found = moments([batch], earlier=found)
    assert_same_moments(found, moments(BATCHES))


def test_moments_are_continued_from_a_checkpoint(tmp_path):
    """By Orbax, with the tree of other moments of the model as the target."""
    first = moments(BATCHES[:2])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path.absolute() / "moments", first)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path.absolute() / "moments", first)
    both = moments(BATCHES[2:], earlier=restored)
    chex.assert_trees_all_equal(both, moments(BATCHES[2:], earlier=first))
    assert_same_moments(both, moments(BATCHES))
    found = flaxbn.to_batch_stats(both, VARIABLES["batch_stats"])
    assert_same_statistics(found, jax.device_get(flaxbn.estimate_population_stats(NET, VARIABLES, BATCHES)))


def test_continued_moments_of_some_layers():
    def only(path):
        return path == "BatchNorm_1"

    both = moments(BATCHES[2:], earlier=moments(BATCHES[:2], only=only), only=only)
    assert_same_moments(both, moments(BATCHES, only=only))


def test_continued_moments_on_all_devices(devices):
    sharding = flaxbn.data_sharding()
    both = moments(BATCHES[3:], sharding=sharding, earlier=moments(BATCHES[:3]))
    expected = moments(BATCHES)
    for layer in expected:
        # Sums over the devices are taken in another order, in two layers.
        assert_same_statistics(both[layer]._asdict(), jax.device_get(expected[layer]._asdict()), 1e-5)


def test_earlier_moments_are_not_changed():
    first = moments(BATCHES[:2])
    before = jax.tree.map(np.array, first)
    moments(BATCHES[2:], earlier=first)
    chex.assert_trees_all_equal(first, before)


def test_exact_moments_cannot_be_continued():
    with pytest.raises(ValueError, match=r'`earlier` moments.*`method="precise"`.*give all data to one call'):
        moments(BATCHES[3:], method="exact", earlier=moments(BATCHES[:3]))


@pytest.mark.parametrize(
    ("earlier", "received"),
    [
        ({"BatchNorm_0": M6}, r"got {'BatchNorm_0': \(6,\)}"),
        ({"BatchNorm_0": M6, "BatchNorm_1": M5, "other": M5}, r"got .*'other': \(5,\)"),
        ({"BatchNorm_0": M6, "BatchNorm_1": M6}, r"got .*'BatchNorm_1': \(6,\)}"),
        ({"BatchNorm_0": M6, "BatchNorm_1": np.ones(5)}, r"got .*'BatchNorm_1': None}"),
        (VARIABLES["batch_stats"], r"got .*'BatchNorm_0/mean': None"),
        ({}, "got {}"),
    ],
)
def test_earlier_moments_that_do_not_fit_are_errors(earlier, received):
    message = (
        r"`earlier` must be a tree of Moments of the same layers and shapes: "
        rf"{received}.* where {{'BatchNorm_0': \(6,\), 'BatchNorm_1': \(5,\)}} are estimated"
    )
    with pytest.raises(ValueError, match=message):
        moments(BATCHES[:1], earlier=earlier)
