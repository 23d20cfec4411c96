"""Batches of a precise pass on the cores of a CPU, by threads.

What measures a layer splits the convolutions that XLA would spread over all cores, and its reductions run on one.
Batches do not depend on each other, so the cores may as well take batches. What one thread starts runs in the order in
which it was started; programs of several threads run side by side.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax

T = TypeVar("T")

_MOST = 8  # each thread holds the activations of a batch, and XLA uses the cores within one, too
_LEAST_BYTES = 2**20  # of data for each thread; below, starting it takes longer than it saves


def cores_for(arguments: Any, batches: int, nbytes: int) -> int:
    """Into how many parts so many batches, of so many bytes in all, are worth cutting.

    Where the arguments lie on an accelerator it is 1, and where they lie on several devices, too: programs that talk to
    each other over the same devices, started by several threads, would wait for each other for ever.
    """
    cores = min(_cores(), _MOST, batches // 2, nbytes // _LEAST_BYTES)
    return cores if cores > 1 and _on_one_cpu(arguments) else 1


def side_by_side(compute: Callable[[T], Any], parts: Sequence[T], cores: int, look: Callable[[], Any]) -> list[Any]:
    """`compute` of each part, by so many threads, in the order of the parts.

    Options of jax that a context manager sets hold for one thread. Where `look()` sees others in a thread than here,
    the parts are computed one after the other, here.
    """
    if cores == 1:
        return [compute(part) for part in parts]
    with ThreadPoolExecutor(cores) as pool:
        if pool.submit(look).result() == look():
            return [*pool.map(lambda part: jax.block_until_ready(compute(part)), parts)]
    return [compute(part) for part in parts]


def _on_one_cpu(arguments: Any) -> bool:
    arrays = [a for a in jax.tree.leaves(arguments) if isinstance(a, jax.Array)]
    devices = set().union(*(a.devices() for a in arrays))
    return len(devices) == 1 and devices.pop().platform == "cpu"


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
