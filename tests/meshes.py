"""Estimates on meshes of devices, and what they should be in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from models import MLP
from oracle import merged

import flaxbn

N = 200
RNG = np.random.default_rng(0)
X = (RNG.normal(size=(N, 4)) + np.sort(RNG.integers(0, 4, N))[:, None]).astype(np.float32)
EVERYWHERE = 1e-5
"""What the same statistics are on any number of devices: sums of 200 float32 in another order, twice in depth."""


NET = MLP((8, 6), flaxbn.BatchNorm)
VARIABLES = jax.jit(NET.init)(jax.random.key(0), X[:2])


def oracle(batches, weights=None):
    """Net in float64, each batch normalized by itself and all merged by hand."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), VARIABLES["params"])
    found = {f"BatchNorm_{i}": [] for i in range(2)}
    for k, batch in enumerate(batches):
        x, w = batch.astype(np.float64), np.ones(len(batch)) if weights is None else weights[k]
        for i, layer in enumerate(found.values()):
            x = x @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"]
            mean = np.average(x, axis=0, weights=w)
            var = np.average((x - mean) ** 2, axis=0, weights=w)
            layer.append((w.sum(), mean, var))
            x = np.maximum((x - mean) / np.sqrt(var + 1e-5), 0)
    return {name: dict(zip(("mean", "var"), merged(*zip(*layer)))) for name, layer in found.items()}


def strided(batch_size, samples=N):
    count = -(-samples // batch_size)
    return [X[k:samples:count] for k in range(count)]


def on_devices(count):
    mesh = Mesh(np.array(jax.devices()[:count]), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("data"))


def on_mesh(shape, names, split, kind=AxisType.Auto):
    mesh = Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), names, axis_types=(kind,) * len(names))
    return NamedSharding(mesh, PartitionSpec(split))


def split_over_model(sharding):
    """The variables with the kernels split over the axis "model" of the mesh, all else whole."""

    def put(leaf):
        spec = PartitionSpec(None, "model") if leaf.ndim == 2 else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(sharding.mesh, spec))

    return jax.tree.map(put, VARIABLES)


def estimate(batches=X, variables=VARIABLES, model=NET, **options):
    return flaxbn.estimate_population_stats(model, variables, batches, **options)


MESHES = {
    "model axis": ((4, 2), ("data", "model"), "data", AxisType.Auto),
    "explicit": ((4, 2), ("data", "model"), "data", AxisType.Explicit),
    "two data axes": ((2, 2, 2), ("a", "b", "model"), ("a", "b"), AxisType.Auto),
}


def parts_of(batch, devices=8):
    """A batch padded to a multiple of the devices and cut, without padding: some devices may have nothing."""
    each = -(-len(batch) // devices)
    return [batch[i : i + each] for i in range(0, len(batch), each)]


def by_device(batches, sharding=None, **options):
    sharding = sharding or flaxbn.data_sharding()
    return estimate(batches, sharding=sharding, normalization_batch="device", **options)


def spent(x):
    """A tenth of a second or more of work on the device."""
    work = jnp.broadcast_to(x[:, :1], (len(x), 64))
    return jax.lax.fori_loop(0, 10_000, lambda _, a: jnp.sin(a) + 1e-3, work)[:, :1]
