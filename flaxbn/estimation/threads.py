"""Batches of one pass on the cores of a CPU, by threads: parts of a list, or one after the other as they come.

What measures a layer splits the convolutions that XLA would spread over all cores, and its reductions run on one.
Batches do not depend on each other, so the cores may as well take batches. What one thread starts runs in the order in
which it was started; programs of several threads run side by side. (Not those that call functions of the host: as
many at once as there are cores were seen to wait for ever, where these functions look at their arrays.)
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from typing import Any, TypeVar

import jax

P = TypeVar("P")
T = TypeVar("T")

_MOST = 8  # each thread holds the activations of a batch, and XLA uses the cores within one, too
_LEAST_BYTES = 2**20  # of data for each thread; below, starting it takes longer than it saves
_LEAST_BATCH = 2**16  # bytes of a batch that comes by itself: handing it to a thread costs as much as a smaller one


def cores_for(arguments: Any, batches: int, nbytes: int) -> int:
    """Into how many parts so many batches, of so many bytes in all, are worth cutting.

    Where the arguments lie on an accelerator it is 1, and where they lie on several devices, too: programs that talk to
    each other over the same devices, started by several threads, would wait for each other for ever.
    """
    cores = min(_cores(), _MOST, batches // 2, nbytes // _LEAST_BYTES)
    return cores if cores > 1 and _on_one_cpu(arguments) else 1


def lanes_for(arguments: Any, nbytes: int) -> int:
    """How many threads are to take batches of so many bytes as they come; 1 also where `cores_for` is."""
    return min(_cores(), _MOST) if nbytes >= _LEAST_BATCH and _on_one_cpu(arguments) else 1


class Cores:
    """So many threads, for one list of parts after the other; a context manager, with which they end.

    Attributes:
        number: into how many parts a list of batches is to be cut.
    """

    def __init__(self, number: int, look: Callable[[], Any]) -> None:
        self.number = number
        self._look = look
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> "Cores":
        self._pool = _pool(self.number, self._look) if self.number > 1 else None
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def each(self, compute: Callable[[P], T], parts: Sequence[P]) -> list[T]:
        """`compute` of each part, in the order of the parts; from a thread, once it is there."""
        if self._pool is None or len(parts) < 2:
            return [compute(part) for part in parts]
        return [*self._pool.map(lambda part: jax.block_until_ready(compute(part)), parts)]


class Lanes:
    """Threads for parts that come one by one; each does its own in their order. A context manager.

    Attributes:
        number: how many there are; with 1, parts are computed here, when they come.
    """

    def __init__(self, number: int, look: Callable[[], Any]) -> None:
        pools = [_pool(1, look) for _ in range(number)] if number > 1 else []
        self._pools = [pool for pool in pools if pool is not None]
        self.number = max(len(self._pools), 1)

    def __enter__(self) -> "Lanes":
        return self

    def __exit__(self, *exception: object) -> None:
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)

    def each(
        self, compute: Callable[[int, P], T], parts: Iterable[P], is_for_a_thread: Callable[[P], bool]
    ) -> Iterator[T]:
        """`compute` of each lane and a part, the lanes in turn; while they compute, the next parts are read here.

        Args:
            compute: takes the number of the lane, too.
            parts: they are read as lanes are free.
            is_for_a_thread: whether a part is; otherwise it is computed here, and nothing else meanwhile.

        Yields:
            The results, in the order of the parts. What `compute` raised for a part is raised before what reading a
            later one raises.
        """
        waiting: deque[Callable[[], T]] = deque()
        for lane, part in zip(cycle(range(self.number)), _raised_after(parts, waiting)):
            if self._pools and is_for_a_thread(part):
                waiting.append(self._pools[lane].submit(compute, lane, part).result)
            else:
                while waiting:
                    yield waiting.popleft()()
                yield compute(lane, part)
            if len(waiting) > self.number:
                yield waiting.popleft()()
        while waiting:
            yield waiting.popleft()()


def _raised_after(parts: Iterable[P], waiting: Iterable[Callable[[], Any]]) -> Iterator[P]:
    """The parts; where reading one raises, what was raised for those before it comes first."""
    try:
        yield from parts
    except Exception:
        for result in waiting:
            result()
        raise


def _pool(threads: int, look: Callable[[], Any]) -> ThreadPoolExecutor | None:
    """So many threads, or None where jax would do something else in them than here.

    Options of jax that a context manager sets hold for one thread: `look()` tells which there are.
    """

    def options() -> Any:
        device = getattr(jax.config, "jax_default_device")  # noqa: B009 - its type stub lacks it
        return look(), jax.sharding.get_abstract_mesh(), device

    pool = ThreadPoolExecutor(threads)
    if pool.submit(options).result() == options():
        return pool
    pool.shutdown()
    return None


def _on_one_cpu(arguments: Any) -> bool:
    arrays = [a for a in jax.tree.leaves(arguments) if isinstance(a, jax.Array)]
    devices = set().union(*(a.devices() for a in arrays))
    return len(devices) == 1 and devices.pop().platform == "cpu"


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
