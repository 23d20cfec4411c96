"""Where batches lie."""

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
