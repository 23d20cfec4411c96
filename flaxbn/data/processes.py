"""Several processes, each with its own part of the data: what one of them found is told to all."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def together(compute: Callable[[], Any]) -> list[Any]:
    """What each process computes, a tree of numpy arrays of the same shapes, in the order of the processes.

    All must call it, the same number of times. Where `compute` raises on some, it is raised there, and all others raise
    an error that names them. With one process it is `[compute()]`.
    """
    if jax.process_count() == 1:
        return [compute()]
    error, value = None, None
    try:
        value = jax.device_get(compute())
    except Exception as raised:  # it is told to the others, then raised
        error = raised
    failed = _gather(np.asarray(error is not None))
    if error is not None:
        raise error
    if failed.any():
        raise RuntimeError(
            f"All processes must reach the merge of their statistics: process {np.flatnonzero(failed).tolist()} of "
            f"{jax.process_count()} raised an error, which its own log shows. Nothing was estimated."
        )
    gathered = _gather(value)
    return [jax.tree.map(lambda a, i=i: a[i], gathered) for i in range(jax.process_count())]


def _gather(value: Any) -> Any:
    try:
        return multihost_utils.process_allgather(value)
    except Exception as error:
        raise RuntimeError(
            f"Process {jax.process_index()} of {jax.process_count()} lost the others while statistics were merged: one "
            "of them has ended. Nothing was estimated; start all processes again."
        ) from error
