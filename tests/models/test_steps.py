"""The number of updates, set from outside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze

import flaxbn
import flaxbn.nnx as ours

STATS = {"mean": np.zeros(3, np.float32), "var": np.ones(3, np.float32)}
STOCK = {"norm": STATS, "block": {"first": STATS, "other": {"u": np.ones(2)}}}


def test_a_stock_tree_gets_steps_for_each_layer():
    found = flaxbn.set_steps(STOCK, 1000)
    assert found["norm"]["steps"] == found["block"]["first"]["steps"] == 1000
    assert found["norm"]["steps"].dtype == jnp.float32
    assert set(found["block"]["other"]) == {"u"}
    assert "steps" not in STOCK["norm"]


def test_what_is_there_is_set_and_nothing_is_added():
    tree = {"stock": STATS, "ours": {**STATS, "steps": np.int32(7)}, "other": {"steps": np.ones(2)}}
    found = flaxbn.set_steps(tree, 5.0)
    assert (found["ours"]["steps"], found["ours"]["steps"].dtype) == (5, jnp.float32)
    assert "steps" not in found["stock"]
    np.testing.assert_array_equal(found["other"]["steps"], np.ones(2))


def test_each_domain_and_each_step_of_a_scan_is_set():
    tree = {"norm": {"mean": np.zeros((4, 2, 3)), "var": np.ones((4, 2, 3)), "steps": np.zeros((4, 2), np.float32)}}
    np.testing.assert_array_equal(flaxbn.set_steps(tree, 6)["norm"]["steps"], np.full((4, 2), 6))


def test_containers_and_the_root_stay_as_they_are():
    assert isinstance(flaxbn.set_steps(freeze(STOCK), 1), FrozenDict)
    assert isinstance(flaxbn.set_steps(freeze(STOCK), 1)["block"], FrozenDict | dict)
    assert flaxbn.set_steps(STATS, 2)["steps"] == 2
    assert jax.jit(flaxbn.set_steps)(STATS, 2)["steps"] == 2


def test_the_state_of_an_nnx_model():
    layer = ours.BatchRenorm(3, rngs=nnx.Rngs(0))
    found = flaxbn.set_steps(nnx.state(layer, nnx.BatchStat), 30_000)
    assert isinstance(found, nnx.State)
    nnx.update(layer, found)
    assert layer.steps[...] == 30_000


@pytest.mark.parametrize("steps", [-1, np.nan, np.inf, np.zeros(2)])
def test_what_is_no_number_of_updates_is_an_error(steps):
    with pytest.raises(ValueError, match="`steps` must be one number of at least 0: got"):
        flaxbn.set_steps(STOCK, steps)


def test_a_tree_that_can_hold_none_is_an_error():
    with pytest.raises(ValueError, match=r"must hold layers that store `steps`.*a dict with 0 layers"):
        flaxbn.set_steps({"dense": {"u": np.ones(2)}}, 1)
    state = nnx.state(ours.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.BatchStat)
    with pytest.raises(ValueError, match=r"a State with 1 layers and no `steps`.*`nnx.state\(model, nnx.BatchStat\)`"):
        flaxbn.set_steps(state, 1)
