"""What a compiled pass over data depends on."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
from jaxtyping import Array

from flaxbn.arithmetic.measure import Platform
from flaxbn.data.placement import shards
from flaxbn.models.arguments import Model
from flaxbn.models.linen import Call
from flaxbn.models.places import Pair, Path


class Layout(NamedTuple):
    """How batches lie on devices, and whether parts of them normalize by themselves.

    Attributes:
        sharding: how the samples of a batch are split.
        by_device: whether each device normalizes its own part by itself.
        group: how many consecutive samples normalize by themselves, where it is not all.
        on_accelerator: whether they lie on devices that are no CPUs, where few kernels count more than few additions.
    """

    sharding: NamedSharding | None
    by_device: bool
    group: int | None
    on_accelerator: bool

    @property
    def has_parts(self) -> bool:
        """Whether parts of a batch normalize by themselves."""
        return self.by_device or self.group is not None

    @property
    def platform(self) -> Platform | None:
        """By which sums a layer is measured: those for one device by itself, which is no part of a mapped program."""
        if self.sharding is not None:
            return None
        if self.on_accelerator:
            return "accelerator"
        return "cpu" if self.group is None else None

    @property
    def multiple(self) -> int:
        """Of which the number of samples in a batch is a multiple, where need be by padding."""
        return math.lcm(shards(self.sharding), self.group or 1)

    def part(self, samples: int) -> int:
        """How many of so many samples normalize together."""
        return self.group or samples // (shards(self.sharding) if self.by_device else 1)


class PassOptions(NamedTuple):
    """What a compiled pass depends on, besides shapes.

    `read` are the statistics that the model reads under other names than those that are known.
    """

    model: Model
    call: Call | None
    sample_weight: Callable[[Any], Array] | None
    wanted: frozenset[Path]
    read: tuple[Pair, ...]
    sharding: NamedSharding | None
    by_device: bool
    group: int | None
    on_accelerator: bool
    tracing: tuple[Any, ...]

    @property
    def layout(self) -> Layout:
        """What of it a pass needs that is made from a traced model."""
        return Layout(self.sharding, self.by_device, self.group, self.on_accelerator)


class Shapes(NamedTuple):
    """The structure and the leaves' shapes of (variables, batch, rngs), as a key.

    What a batch holds beside arrays is in its structure. `present` is the number of samples that are no padding, where
    there is padding.
    """

    structure: Any
    leaves: tuple[tuple[tuple[int, ...], Any], ...]
    present: int | None

    def abstract(self, *, grow: int = 0) -> Any:
        """The arguments as abstract arrays, the batch longer by `grow` samples."""
        leaves = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in self.leaves]
        variables, batch, rngs = jax.tree.unflatten(self.structure, leaves)
        if grow:
            batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct((a.shape[0] + grow, *a.shape[1:]), a.dtype), batch)
        return variables, batch, rngs

    def of_arrays(self) -> "Shapes":
        """The same without what the batch holds beside arrays: a program that was traced with it has it inside."""
        variables, batch, rngs = self.abstract()
        return shapes_of(variables, jax.tree.leaves(batch), rngs, present=self.present)


def shapes_of(variables: Any, batch: Any, rngs: Any, *, present: int | None) -> Shapes:
    """The key of these arguments, which may be abstract."""
    leaves, structure = jax.tree.flatten((variables, batch, rngs))
    return Shapes(structure, tuple((a.shape, a.dtype) for a in leaves), present)
