"""Several processes, each with its own part of the data: what one of them found is told to all."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

NOTHING_ESTIMATED = (
    "All processes must reach the merge of their statistics: process {failed} of {count} raised an error, which its "
    "own log shows. Nothing was estimated."
)


def on_all(compute: Callable[[], T], message: str = NOTHING_ESTIMATED) -> T:
    """What `compute` returns in this process. All must call it, the same number of times.

    Where `compute` raises on some, it is raised there, and all others raise `message`, in which `{failed}` stands for
    the numbers of those and `{count}` for how many processes there are.
    """
    if jax.process_count() == 1:
        return compute()
    error = None
    try:
        value = jax.device_get(compute())
    except Exception as raised:  # it is told to the others, then raised
        error = raised
    failed = np.flatnonzero(gather(np.asarray(error is not None)))
    if error is not None:
        raise error
    if failed.size:
        raise RuntimeError(message.format(failed=failed.tolist(), count=jax.process_count()))
    return value


def gather(value: Any) -> list[Any]:
    """The values of all processes, trees of numpy arrays of the same shapes, in the order of the processes."""
    if jax.process_count() == 1:
        return [value]
    try:
        gathered = multihost_utils.process_allgather(value)
    except Exception as error:
        raise RuntimeError(
            f"Process {jax.process_index()} of {jax.process_count()} lost the others while statistics were merged: one "
            "of them has ended. Nothing was estimated; start all processes again."
        ) from error
    return [jax.tree.map(lambda a, i=i: a[i], gathered) for i in range(jax.process_count())]


def together(compute: Callable[[], Any]) -> list[Any]:
    """What each process computes, a tree of numpy arrays of the same shapes, in the order of the processes."""
    return gather(on_all(compute))
