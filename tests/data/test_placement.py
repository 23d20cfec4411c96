"""Batches on their way to the devices."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from meshes import X, estimate, on_devices, spent

import flaxbn
from flaxbn.data.placement import placed


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
