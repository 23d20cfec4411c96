"""The tree of stored statistics as numbered entries, and the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxbn import Moments
from flaxbn.models.batch_stats import collect, replace_statistics, stored_layers, with_wide_statistics

STATS = {
    "a": {"mean": jnp.zeros(2), "var": jnp.ones(2)},
    "b": {"mean": jnp.zeros((2, 3), jnp.bfloat16), "var": jnp.ones((2, 3), jnp.bfloat16), "steps": 5},
    "no layer": {"mean": jnp.zeros(2)},
}


def test_entries_are_numbered_from_1():
    layers = stored_layers(STATS)
    assert list(layers.entries) == [("a",), ("b",)]
    np.testing.assert_array_equal(np.concatenate([np.ravel(e) for e in layers.entries.values()]), np.arange(1, 9))
    assert layers.total == 8
    assert layers.layer_of(np.array([4, 5])) == ("b",)


def test_only_statistics_are_widened():
    """A counter may be a number of Python."""
    wide = with_wide_statistics({"batch_stats": STATS})["batch_stats"]
    assert {leaf.dtype for leaf in (wide["b"]["mean"], wide["b"]["var"])} == {jnp.dtype(jnp.float32)}
    assert wide["b"]["steps"] == 5


def test_calls_that_read_the_same_entries_are_merged():
    """Against numpy, over all values of both."""
    first, second = np.random.default_rng(0).normal([[[0.0]], [[3.0]]], size=(2, 50, 2))
    layers = stored_layers(STATS)
    calls = [(np.array([1, 2]), Moments(np.full(2, 50.0), x.mean(0), x.var(0))) for x in (first, second)]
    found = collect(calls, layers)
    both = np.concatenate([first, second])
    np.testing.assert_allclose(found[("a",)].var, both.var(0), rtol=1e-13)
    np.testing.assert_array_equal(found[("a",)].count, [100, 100])
    np.testing.assert_array_equal(found[("b",)].count, np.zeros((2, 3)))


@pytest.mark.parametrize("count", [20, 1])
def test_leaves_lie_where_they_lay(devices, count):
    """Many are transferred together; each keeps its dtype and, if it was put there, its device."""
    device = jax.devices()[3]
    stats = {f"norm_{i}": {"mean": jnp.zeros(3), "var": jnp.ones(3, jnp.bfloat16)} for i in range(count)}
    stats["put"] = jax.device_put({"mean": jnp.zeros(3), "var": jnp.ones(3)}, device)
    moments = {name: Moments(np.ones(3), np.arange(3.0) + i, np.full(3, 2.0)) for i, name in enumerate(stats)}
    found = replace_statistics(stats, moments, keep_unseen=False)
    for name, layer in found.items():
        np.testing.assert_array_equal(layer["mean"], moments[name].mean)
        np.testing.assert_array_equal(layer["var"].astype(np.float32), [2, 2, 2])
        assert layer["var"].dtype == stats[name]["var"].dtype
        assert layer["mean"].committed == (name == "put")
    assert found["put"]["mean"].devices() == {device}


def test_layers_in_a_list_have_no_names_of_their_own():
    layer = {"mean": np.zeros(2), "var": np.ones(2)}
    with pytest.raises(ValueError, match=r"must have a name of its own: 'blocks' names several, in a list or tuple"):
        stored_layers({"blocks": [layer, layer]})
    assert [*stored_layers({"blocks": [layer], "counters": [np.zeros(2), np.zeros(2)]}).entries] == [("blocks",)]


@jax.tree_util.register_pytree_with_keys_class
class Strict:
    """A box that looks at what is put into it."""

    def __init__(self, value):
        assert hasattr(value, "dtype")
        self.value = value

    def tree_flatten_with_keys(self):
        return ((jax.tree_util.GetAttrKey("value"), self.value),), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)


def test_a_box_that_looks_at_what_is_put_into_it():
    assert [*stored_layers({"norm": {"mean": Strict(np.zeros(2)), "var": Strict(np.ones(2))}}).entries] == [("norm",)]
