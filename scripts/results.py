"""What a run leaves in its folder: configuration, metrics by epoch, a summary; none of them half written."""

import contextlib
import json
import pathlib
import platform
import shutil
from collections.abc import Iterator
from typing import Any

import filelock
import jax

from flaxbn.inference.artifact import replace_file
from flaxbn.inference.export import installed_version

PACKAGES = ("flaxbn", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@contextlib.contextmanager
def held(out: pathlib.Path) -> Iterator[None]:
    """Keeps every other run out of a folder, until the block ends or the process does, in whatever way.

    The lock is one of the operating system on the file .lock, which stays there and means nothing by itself.

    Raises:
        FileExistsError: if the folder holds something else than a run.
        BlockingIOError: if another run is at work in it.
    """
    _check_ours(out)
    out.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise BlockingIOError(
            f"--out must be the folder of one run at a time: another process is at work in {out}. Wait until it ends, "
            "end it, or name another --out."
        ) from None
    try:
        yield
    finally:
        lock.release()


def begin(out: pathlib.Path, configuration: dict[str, Any], *, resume: bool, overwrite: bool) -> list[dict[str, Any]]:
    """Makes the folder of a run ready, and returns the metrics that are there already.

    Raises:
        FileExistsError: if it holds a run and neither `resume` nor `overwrite` is asked for, or anything else.
        ValueError: if the run to be resumed has another configuration.
    """
    record = out / "config.json"
    if record.exists() and resume:
        _check_same(json.loads(record.read_text()), configuration, out)
        return read_lines(out / "metrics.jsonl")
    if record.exists() and not overwrite:
        raise FileExistsError(
            f"--out must be a new folder: {out} holds a run. Continue it with --resume, replace it with --overwrite, "
            "or name another --out."
        )
    _check_ours(out)
    out.mkdir(parents=True, exist_ok=True)
    _clear(out)
    write_json(record, configuration)
    return []


def _check_ours(out: pathlib.Path) -> None:
    if out.is_dir() and not (out / "config.json").exists() and any(not p.name.startswith(".") for p in out.iterdir()):
        raise FileExistsError(f"--out must be a new folder or hold a run: {out} holds something else. Name another.")


def _check_same(old: dict[str, Any], new: dict[str, Any], out: pathlib.Path) -> None:
    names = [name for name in old | new if old.get(name) != new.get(name)]
    if names:
        differing = "; ".join(f"{flag(name)} was {old.get(name)}, is {new.get(name)}" for name in names)
        raise ValueError(
            f"--resume continues a run with the configuration it began with: in {out}, {differing}. Give the same "
            "options, or name another --out, or --overwrite."
        )


def _clear(out: pathlib.Path) -> None:
    """Removes a run, checkpoints first and at one stroke, so that half of them are never taken for a run."""
    stale, checkpoints = out / ".stale", out / "checkpoints"
    shutil.rmtree(stale, ignore_errors=True)
    if checkpoints.exists():
        checkpoints.rename(stale)
        shutil.rmtree(stale)
    for name in ("metrics.jsonl", "summary.json", "accuracy.png", "results.json", "table.md", "batch_sizes.png"):
        (out / name).unlink(missing_ok=True)


def until(lines: list[dict[str, Any]], epoch: int, **run: Any) -> list[dict[str, Any]]:
    """`lines` without those of `run` after `epoch`, which has no checkpoint."""
    return [line for line in lines if not run.items() <= line.items() or line["epoch"] <= epoch]


def flag(name: str) -> str:
    """The option of the command line that sets this field."""
    return "--" + name.replace("_", "-")


def versions() -> dict[str, str | int]:
    """The versions of Python and of the packages that decide the numbers, and the devices."""
    found = {name: installed_version(name) for name in PACKAGES}
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return {"python": platform.python_version(), **found, "devices": devices, "processes": jax.process_count()}


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes indented JSON."""
    replace_file(path, (json.dumps(content, indent=2) + "\n").encode())


def write_lines(path: pathlib.Path, lines: list[dict[str, Any]]) -> None:
    """Writes one JSON object a line."""
    replace_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads what `write_lines` wrote; nothing where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
