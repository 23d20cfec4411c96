"""How batches follow each other: how many share a buffer on the device, and how far the host may run ahead."""

from collections import deque
from typing import Any

import jax
import jax.numpy as jnp

_BATCHES = 256  # enough to make merging a chunk cheap beside measuring it, and few enough to merge without rounding
_BYTES = 2**26  # what the buffer of a chunk may take: 64 MiB
_BYTES_PER_CHANNEL = 12  # a count, a mean and a variance, in float32


def batches_in_chunk(channels: int) -> int:
    """How many batches have their moments merged at once, each of them having moments of so many channels."""
    return min(_BATCHES, max(1, _BYTES // (_BYTES_PER_CHANNEL * max(channels, 1))))


def room(moments: Any, batches: int) -> Any:
    """Buffers for the moments of some batches, of the shapes of a tree of arrays: zeros, which merging ignores."""
    return jax.tree.map(lambda a: jnp.zeros((batches, *a.shape), a.dtype), moments)


def put(buffer: Any, slot: Any, moments: Any) -> Any:
    """The buffers with the moments of one batch in row `slot`."""
    return jax.tree.map(lambda b, m: b.at[slot].set(m.astype(b.dtype), mode="promise_in_bounds"), buffer, moments)


class Ahead:
    """Lets the host prepare at most so many batches more than the device has done; None: as many as there are."""

    def __init__(self, batches: int | None) -> None:
        self._batches = batches
        self._tokens: deque[Any] = deque()

    def started(self, token: Any) -> None:
        """To be called for each batch, with an array that is ready when the batch is done."""
        if self._batches is None:
            return
        self._tokens.append(token)
        if len(self._tokens) > self._batches:
            jax.block_until_ready(self._tokens.popleft())
