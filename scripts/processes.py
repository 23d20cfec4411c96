"""Several processes that train together, on one machine or on many: how they meet, and what each of them holds."""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import options
import results
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from flaxbn.data.processes import gather, on_all

HEARTBEAT_TIMEOUT, SHUTDOWN_TIMEOUT = 30, 60
"""Seconds until jax ends a process that misses another; and that processes wait for each other at the end."""


def start(main: Callable[[Any, Console], int], config: options.Distributed) -> None:
    """Runs `main` on all devices of all processes; only the first one speaks. The exit status is what it returns."""
    use_cores_as_devices()
    meet(config.coordinator, config.num_processes, config.process_id)
    check_alike(config)
    sys.exit(main(config, Console(quiet=not is_first())))


def use_cores_as_devices() -> None:
    """Makes every CPU core a device, unless the environment says how many devices there are."""
    cores = os.cpu_count() or 1
    # XLA's CPU thread pool has $NPROC threads, by default one for each core. A thread that waits in an all-reduce does
    # nothing else, and a gradient is many independent all-reduces: soon all threads wait, for ever.
    os.environ["NPROC"] = str(16 * cores)
    if jax.config.jax_num_cpu_devices < 0 and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", cores)


def meet(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Connects the processes, before jax looks for devices; alone, where there is no coordinator."""
    if coordinator is None:
        return
    address = None if coordinator == options.AUTO else coordinator
    jax.distributed.initialize(
        address,
        num_processes,
        process_id,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
    )


def check_alike(config: options.Distributed) -> None:
    """Processes that differ in what decides the outcome would train together all the same."""
    places = ("data_dir", "model")  # may differ from machine to machine
    alike = {name: value for name, value in config.record().items() if name not in places}
    different = differing(json.dumps([alike, jax.local_device_count()]).encode())
    if different:
        raise ValueError(
            "All processes must be given the same options, and the same number of devices: process "
            f"{different} of {jax.process_count()} differs from process 0. Only --process-id and folders of data may."
        )


def differing(content: bytes) -> list[int]:
    """The processes whose content is not that of the first one. All must call it."""
    digests = gather(np.frombuffer(hashlib.sha256(content).digest(), np.uint8))
    return [process for process, digest in enumerate(digests) if not np.array_equal(digest, digests[0])]


@contextlib.contextmanager
def alone(out: pathlib.Path) -> Iterator[None]:
    """Keeps other runs out of a folder, on behalf of all processes of this one; see `results.held`."""
    with contextlib.ExitStack() as stack:
        on_first(lambda: stack.enter_context(results.held(out)))
        yield


def begin(config: options.Distributed, **content: Any) -> list[dict[str, Any]]:
    """Makes the folder of a run ready; on the first process the metrics that are there already, none on the others."""
    lines = on_first(lambda: config.begin(**content))
    record = config.out / "config.json"
    unseen = differing(record.read_bytes() if record.exists() else b"")
    if unseen:
        raise ValueError(
            f"--out must be a folder that all processes see: process {unseen} of {jax.process_count()} does not find "
            f"in {config.out} what process 0 wrote there. Name a folder on a file system that they share."
        )
    return lines or []


def is_first() -> bool:
    """Whether this is the process that writes and reports."""
    return jax.process_index() == 0


def on_each(task: Callable[[], Any]) -> Any:
    """What `task`, which must not communicate, returns here. Where it fails it is raised, and the others end, too."""
    return on_all(task, "Process {failed} of {count} failed: its own output says why.")


def on_first(task: Callable[[], Any]) -> Any:
    """What `task` returns on the first process, None on the others, which wait for it and fail with it."""
    return on_each(task if is_first() else lambda: None)


@functools.cache
def by_example() -> NamedSharding:
    """Batches split along their leading axis over the devices of all processes."""
    return NamedSharding(Mesh(np.asarray(jax.devices()), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data"))


@functools.cache
def everywhere() -> NamedSharding:
    """What every device of all processes has in whole."""
    return NamedSharding(by_example().mesh, PartitionSpec())


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays that every process knows in whole; each of its devices is given the part that `sharding` says."""

    def put(leaf: Any) -> jax.Array:
        return jax.make_array_from_callback(np.shape(leaf), sharding, np.asarray(leaf).__getitem__)

    return jax.tree.map(put, tree)


def own_rows(size: int, samples: int | None = None) -> np.ndarray:
    """The part of this process of `samples` rows, which are evenly spaced over `size` rows; by default of them all."""
    rows = np.arange(size if samples is None else samples)
    return (rows * size // len(rows))[jax.process_index() :: jax.process_count()]
