"""Where batches lie."""

import functools
import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flaxbn.data.samples import count_samples


def data_sharding() -> NamedSharding:
    """Batches split along their leading axis over all devices of this process.

    For the `sharding` argument of `estimate_population_stats`, and for `jax.device_put` of a batch. A batch whose size
    is no multiple of their number must be padded for the latter; the estimate does so itself.

    Examples:
        >>> import flaxbn, jax, jax.numpy as jnp
        >>> batch = jnp.zeros((2 * jax.local_device_count(), 3))
        >>> split = jax.device_put(batch, flaxbn.data_sharding())
        >>> split.addressable_shards[0].data.shape
        (2, 3)
    """
    mesh = Mesh(np.asarray(jax.local_devices()), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(sharding: NamedSharding) -> NamedSharding:
    """The sharding of what all devices of `sharding` hold in whole."""
    return NamedSharding(sharding.mesh, PartitionSpec())


def with_auto_axes(sharding: NamedSharding) -> NamedSharding:
    """The same sharding on a mesh whose axes jax partitions by itself, as models without sharding types need it."""
    axes = (AxisType.Auto,) * len(sharding.mesh.axis_names)
    return NamedSharding(Mesh(sharding.mesh.devices, sharding.mesh.axis_names, axis_types=axes), sharding.spec)


def to_auto(tree: Any) -> Any:
    """Arrays that lie on a mesh with other axes, on that mesh with axes that jax partitions by itself."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or not isinstance(leaf.sharding, NamedSharding):
            return leaf
        if all(kind == AxisType.Auto for kind in leaf.sharding.mesh.axis_types):
            return leaf
        return jax.device_put(leaf, with_auto_axes(leaf.sharding))

    return jax.tree.map(convert, tree)


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays on the mesh of `sharding`: split as they are if they lie on its devices already, else whole on each."""

    def spec(leaf: Any) -> PartitionSpec:
        own = getattr(leaf, "sharding", None)
        if not isinstance(own, NamedSharding) or own.mesh.axis_names != sharding.mesh.axis_names:
            return PartitionSpec()
        return own.spec if np.array_equal(own.mesh.devices, sharding.mesh.devices) else PartitionSpec()

    return jax.device_put(tree, jax.tree.map(lambda leaf: NamedSharding(sharding.mesh, spec(leaf)), tree))


def array_types(leaves: Iterable[Any]) -> set[type]:
    """The types of jax's arrays among leaves, traced ones too: asked once for each, and not for hundreds of leaves."""
    return {kind for kind, leaf in {type(leaf): leaf for leaf in leaves}.items() if isinstance(leaf, jax.Array)}


def on_device(tree: Any) -> Any:
    """A tree of arrays as jax arrays: those that are none go to the default device."""
    leaves, structure = jax.tree.flatten(tree)
    there = array_types(leaves)
    missing = [i for i, leaf in enumerate(leaves) if type(leaf) not in there]
    if not missing:
        return tree
    put = dict(zip(missing, put_together([np.asarray(leaves[i]) for i in missing])))
    return jax.tree.unflatten(structure, [put.get(i, leaf) for i, leaf in enumerate(leaves)])


def put_together(arrays: Sequence[np.ndarray]) -> list[jax.Array]:
    """Numpy arrays on the default device, small ones of one dtype by one transfer.

    A hundred small arrays take ten times as long by themselves as they do end to end, cut apart on the device. On a CPU
    nothing is transferred, and a compiled function that returns what it is given is the fastest way in.
    """
    if jax.default_backend() == "cpu":
        return _as_given(list(arrays))
    numbers: dict[Any, list[int]] = {}
    for i, array in enumerate(arrays):
        together = array.dtype if array.nbytes <= _SMALL and array.dtype in _CUT else i
        numbers.setdefault(together, []).append(i)
    found: list[Any] = [None] * len(arrays)
    for own in numbers.values():
        if len(own) < _FEW:
            put = jax.device_put([arrays[i] for i in own])
        else:
            put = _cut(np.concatenate([np.ravel(arrays[i]) for i in own]), tuple(arrays[i].shape for i in own))
        for i, array in zip(own, put):
            found[i] = array
    return found


def placed_as(new: Sequence[np.ndarray], old: Sequence[Any]) -> list[jax.Array]:
    """Leaves on the devices that the old ones were put on; the others, together, on the default device."""
    bound = [i for i, leaf in enumerate(old) if getattr(leaf, "committed", False)]
    if not bound:
        return put_together(new)
    free = [i for i in range(len(old)) if i not in set(bound)]
    placed = dict(zip(bound, jax.device_put([new[i] for i in bound], [old[i].sharding for i in bound])))
    placed |= zip(free, put_together([new[i] for i in free]))
    return [placed[i] for i in range(len(old))]


_SMALL = 2**16  # bytes; what is larger is not copied once more to save a transfer
_FEW = 16  # arrays; for fewer a program that cuts them is not worth compiling
_CUT = (np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.int32), jnp.dtype(jnp.bfloat16), np.dtype(np.float16))


@jax.jit
def _as_given(arrays: list[Any]) -> list[Any]:
    return arrays


@functools.partial(jax.jit, static_argnums=1)
def _cut(flat: jax.Array, shapes: tuple[tuple[int, ...], ...]) -> list[jax.Array]:
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1].tolist()
    return [part.reshape(shape) for part, shape in zip(jnp.split(flat, ends), shapes)]


def get_together(tree: Any) -> Any:
    """A tree of arrays in host memory, those of one dtype by one transfer: what `put_together` is, the other way.

    They are laid end to end on the device. On a CPU nothing is transferred, and they are read where they are.
    """
    leaves, structure = jax.tree.flatten(tree)
    numbers: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, jax.Array):
            numbers.setdefault(leaf.dtype, []).append(i)
    if not numbers or not on_accelerator([leaves[i] for own in numbers.values() for i in own]):
        return jax.device_get(tree)
    flat = jax.device_get(_end_to_end([[leaves[i] for i in own] for own in numbers.values()]))
    for own, together in zip(numbers.values(), flat):
        ends = np.cumsum([leaves[i].size for i in own])[:-1]
        for i, part in zip(own, np.split(together, ends)):
            leaves[i] = part.reshape(leaves[i].shape)
    return jax.tree.unflatten(structure, leaves)


@jax.jit
def _end_to_end(groups: list[list[jax.Array]]) -> list[jax.Array]:
    return [jnp.concatenate([jnp.ravel(a) for a in group]) for group in groups]


def own_mesh(sharding: NamedSharding | None, *, by_device: bool) -> Any:
    """A context for what is compiled here, whatever mesh the caller has made the current one."""
    current = jax.sharding.get_abstract_mesh()
    is_auto = all(kind == AxisType.Auto for kind in current.axis_types)
    if current.empty or (is_auto and sharding is None):
        return nullcontext()
    if by_device or sharding is None:
        return jax.set_mesh(Mesh(np.empty((), dtype=object), ()))
    return jax.set_mesh(Mesh(sharding.mesh.devices, sharding.mesh.axis_names, axis_types=sharding.mesh.axis_types))


def on_accelerator(tree: Any) -> bool:
    """Whether arrays lie on devices that are no CPUs; all of them lie on devices of one kind."""
    first = jax.tree.leaves(tree)[0]
    return next(iter(first.devices())).platform != "cpu"


def free_bytes(devices: Iterable[jax.Device]) -> int | None:
    """The free memory of the device that has least; None where a device does not tell."""
    stats = [device.memory_stats() or {} for device in devices]
    if not all("bytes_limit" in s and "bytes_in_use" in s for s in stats):
        return None
    return min(s["bytes_limit"] - s["bytes_in_use"] for s in stats)


def shards(sharding: NamedSharding | None) -> int:
    """Over how many parts `sharding` spreads the leading axis."""
    return 1 if sharding is None else math.prod(sharding.mesh.shape[name] for name in split_axes(sharding))


def split_axes(sharding: NamedSharding) -> tuple[str, ...]:
    """The mesh axes over which `sharding` spreads the leading axis."""
    first = sharding.spec[0] if len(sharding.spec) else None
    return first if isinstance(first, tuple) else () if first is None else (first,)


def padding(size: int, parts: int) -> np.ndarray | None:
    """The weights of a batch of `size` samples padded to a multiple of `parts`; None where it is one already."""
    if size % parts == 0:
        return None
    return np.arange(-(-size // parts) * parts) < size


def placed(batch: Any, sharding: NamedSharding | None, multiple: int | None = None) -> tuple[Any, np.ndarray | None]:
    """A batch on the device or devices, padded to what divides, and which of its samples are present.

    That is a multiple of so many samples, by default of the parts over which `sharding` spreads them.
    """
    multiple = multiple or shards(sharding)
    if sharding is None and multiple == 1:
        return jax.tree.map(jnp.asarray, batch), None
    size = count_samples(batch)
    present = padding(size, multiple)
    if present is not None:
        rows = np.minimum(np.arange(len(present)), size - 1)
        batch = jax.tree.map(lambda a: (a if isinstance(a, jax.Array) else np.asarray(a))[rows], batch)
    return jax.device_put(batch, sharding) if sharding is not None else jax.tree.map(jnp.asarray, batch), present


def by_step(sharding: NamedSharding) -> NamedSharding:
    """How batches lie along a leading axis, each of them as `sharding`."""
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
