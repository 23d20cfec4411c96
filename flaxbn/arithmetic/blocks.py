"""Sums over positions for accelerators, where starting a kernel takes as long as most of these sums.

XLA sums a long axis in two kernels, the second of which adds a few hundred partial sums, and what is computed from the
sums of all channels is a third. Of few partial sums, though, the adding is fused with what follows.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

_BLOCKS = 16  # XLA adds fewer than 32 values within another kernel
_MANY_POSITIONS = 2**15  # in 16 blocks; for more the cores of a device would not be busy
_MANY_CHANNELS = 256  # of which 32 are summed at once: with fewer they would not be, either


def sums(values: Sequence[Array], axes: Sequence[int]) -> tuple[Array, ...]:
    """The sums of real arrays of one shape over these axes; as `Sharing.total`, in fewer kernels.

    A single array is a small sample of larger ones. Of several all sums are taken by one kernel.

    Args:
        values: float32 or wider.
        axes: not negative, in ascending order.
    """
    shape = values[0].shape
    positions = math.prod(shape[: len(axes)])
    fits = len(values) == 1 or (positions <= _MANY_POSITIONS and math.prod(shape[len(axes) :]) >= _MANY_CHANNELS)
    if tuple(axes) == tuple(range(len(axes))) and positions > 0 == positions % _BLOCKS and fits:
        blocks = (v.reshape(_BLOCKS, -1, *shape[len(axes) :]).sum(1) for v in values)
        # Without a barrier XLA would make one sum of both.
        return tuple(block.sum(0) for block in jax.lax.optimization_barrier(tuple(blocks)))
    if len(values) == 1:
        return (jnp.sum(values[0], axes),)

    def add(a: Sequence[Array], b: Sequence[Array]) -> tuple[Array, ...]:
        return tuple(x + y for x, y in zip(a, b))

    zeros = tuple(jnp.zeros((), v.dtype) for v in values)
    return tuple(jax.lax.reduce(tuple(values), zeros, add, tuple(axes)))
