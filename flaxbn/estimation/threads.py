"""Batches of a precise pass on the cores of a CPU, by threads.

What measures a layer splits the convolutions that XLA would spread over all cores, and its reductions run on one.
Batches do not depend on each other, so the cores may as well take batches. What one thread starts runs in the order in
which it was started; programs of several threads run side by side.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax

T = TypeVar("T")

_MOST = 8  # each thread holds the activations of a batch, and XLA uses the cores within one, too
_LEAST_BYTES = 2**20  # of data for each thread; below, starting it takes longer than it saves


def cores_for(devices: Iterable[jax.Device], batches: int, nbytes: int) -> int:
    """Into how many parts so many batches, of so many bytes in all, are worth cutting: 1 on an accelerator."""
    if any(device.platform != "cpu" for device in devices):
        return 1
    return max(1, min(_cores(), _MOST, batches // 2, nbytes // _LEAST_BYTES))


def side_by_side(compute: Callable[[T], Any], parts: Sequence[T], cores: int, look: Callable[[], Any]) -> list[Any]:
    """`compute` of each part, by so many threads, in the order of the parts.

    Options of jax that a context manager sets hold for one thread. Where `look()` sees others in a thread than here,
    the parts are computed one after the other, here.
    """
    with ThreadPoolExecutor(cores) as pool:
        if pool.submit(look).result() == look():
            return [*pool.map(lambda part: jax.block_until_ready(compute(part)), parts)]
    return [compute(part) for part in parts]


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
