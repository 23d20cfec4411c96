"""Batches on their way to the devices."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from meshes import X, estimate, on_devices, spent

import flaxbn
from flaxbn.data import placement
from flaxbn.data.placement import get_together, placed


@pytest.mark.parametrize("size", [48, 50])
@pytest.mark.parametrize("sharded", [False, True])
def test_batches_made_on_devices_are_not_read_back(devices, sharded, size):
    """A batch that the device still works on, an augmentation for example, is not waited for, padded or not."""
    made = jax.jit(lambda x: x + 0 * spent(x))
    sharding = flaxbn.data_sharding() if sharded else None
    for _ in range(2):  # the first compiles
        batch = made(X[:size])
        with jax.transfer_guard_device_to_host("disallow"):
            found, present = placed(batch, sharding)
        waited = batch.is_ready()
        np.testing.assert_array_equal(np.asarray(found)[:size], batch)
    assert not waited
    assert (present is not None) == (sharded and size == 50)


def test_a_sharding_of_other_processes_is_an_error(monkeypatch):
    monkeypatch.setattr(NamedSharding, "is_fully_addressable", property(lambda self: False))
    with pytest.raises(ValueError, match=r"must lie on devices of this process.*`flaxbn.data_sharding\(\)`"):
        estimate(batch_size=25, sharding=on_devices(1))


def test_what_is_fetched_together_comes_back_as_it_was(monkeypatch):
    """Arrays of every shape and of several dtypes; one that is on the host stays as it is."""
    host = {
        "a": np.float32([[1, 2, 3]]),
        "b": [np.float32(4), np.complex64([5 + 6j])],
        "c": np.zeros((0, 2), np.float32),
    }
    host["d"] = np.arange(3, dtype=np.int32)
    tree = (jax.tree.map(jax.numpy.asarray, host), np.float64([7]))
    monkeypatch.setattr(placement, "on_accelerator", lambda arrays: True)
    fetched, get = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda arrays: fetched.extend(jax.tree.leaves(arrays)) or get(arrays))
    found = get_together(tree)
    assert len(fetched) == 3  # one for each dtype
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for one, own in zip(jax.tree.leaves(found), jax.tree.leaves((host, tree[1])), strict=True):
        assert isinstance(one, np.ndarray)
        assert (one.dtype, one.shape) == (own.dtype, own.shape)
        np.testing.assert_array_equal(one, own)
    assert get_together((1.0, np.float64([7]))) == (1.0, np.float64([7]))
