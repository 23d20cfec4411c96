"""Several processes, each with its own part of the data: they fail together, and tell each other what they found."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

_NOTHING_ESTIMATED = (
    "All processes must reach the merge of their statistics: process {failed} of {count} raised an error, which its "
    "own log shows. Nothing was estimated."
)


def on_all(compute: Callable[[], T], message: str = _NOTHING_ESTIMATED) -> T:
    """What `compute` returns on this process, once it has succeeded on all.

    All must call it, the same number of times. Where `compute` raises on some, it is raised there, and all others
    raise an error that names them, instead of waiting for ever for what those will not send: `message`, with the
    numbers of those for `{failed}` and that of all processes for `{count}`.
    """
    if jax.process_count() == 1:
        return compute()
    try:
        value = compute()
    except Exception:
        _allgather(np.asarray(True))
        raise
    failed = _allgather(np.asarray(False))
    if failed.any():
        raise RuntimeError(message.format(failed=np.flatnonzero(failed).tolist(), count=jax.process_count()))
    return value


def gather(value: Any) -> list[Any]:
    """The values of all processes, trees of arrays of the same shapes and dtypes, in the order of the processes.

    They are numpy arrays. They travel as bytes, since jax would make float32 of float64 where 64 bits are off; shapes
    and dtypes must be the same on all, which are what this process reads the bytes of the others by.
    """
    value = jax.tree.map(np.asarray, jax.device_get(value))
    if jax.process_count() == 1:
        return [value]
    gathered = _allgather(jax.tree.map(lambda a: np.frombuffer(a.tobytes(), np.uint8), value))

    def received(process: int) -> Any:
        return jax.tree.map(lambda a, sent: _from_bytes(sent[process], a), value, gathered)

    return [received(process) for process in range(jax.process_count())]


def _from_bytes(sent: np.ndarray, like: np.ndarray) -> np.ndarray:
    return np.frombuffer(sent.tobytes(), like.dtype).reshape(like.shape)


def _allgather(value: Any) -> Any:
    try:
        return multihost_utils.process_allgather(value)
    except Exception as error:
        raise RuntimeError(
            f"Process {jax.process_index()} of {jax.process_count()} lost the others while statistics were merged: one "
            "of them has ended. Nothing was estimated; start all processes again."
        ) from error
