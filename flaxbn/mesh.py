"""Where batches lie."""

from collections.abc import Iterable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_sharding() -> NamedSharding:
    """Batches split along their leading axis over all devices of this process.

    For the `sharding` argument of `estimate_population_stats`, and for `jax.device_put` of a batch.
    """
    mesh = Mesh(np.asarray(jax.local_devices()), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(sharding: NamedSharding) -> NamedSharding:
    """The sharding of what all devices of `sharding` hold in whole."""
    return NamedSharding(sharding.mesh, PartitionSpec())


def free_bytes(devices: Iterable[jax.Device]) -> int | None:
    """The free memory of the device that has least; None where a device does not tell."""
    stats = [device.memory_stats() or {} for device in devices]
    if not all("bytes_limit" in s and "bytes_in_use" in s for s in stats):
        return None
    return min(s["bytes_limit"] - s["bytes_in_use"] for s in stats)
