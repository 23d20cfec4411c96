"""Interleaved timing, and what is written about it."""

import functools
import itertools
import json
import math
import os
import pathlib
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax
import jax

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "scripts"))

import networks
import tables

RESULTS = pathlib.Path(__file__).parent / "results"
CNN = functools.partial(networks.CNN, 10, layers=((16, 1), (32, 2), (64, 2)), kernel=3)
# With glibc's defaults, buffers of 32 MiB and more are mapped afresh in every call, and what is timed is the kernel
# that clears their pages.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "8000000000",
    "MALLOC_TRIM_THRESHOLD_": "16000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "1",
}


def keep_freed_memory() -> None:
    """Starts the program again, with an allocator that keeps what is freed; before jax has made an array."""
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})


def interleave(candidates: dict[str, Callable[[], Any]], rounds: int, seconds: float = 0.05) -> dict[str, list[float]]:
    """Seconds for a call of each candidate, in every round.

    A round times each candidate once, as the mean of as many calls as take `seconds`; the order rotates from round to
    round, so that what else the machine does falls on all of them.
    """
    calls = {}
    for name, function in candidates.items():
        _time(function, 1)
        calls[name] = math.ceil(seconds / _time(function, 1))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order = itertools.cycle(candidates)
    for _ in range(rounds):
        for name in itertools.islice(order, len(candidates)):
            times[name].append(_time(candidates[name], calls[name]))
        next(order)
    return times


def compare(times: dict[str, list[float]], ours: str) -> dict[str, Any]:
    """The median of each candidate, and median and quartiles of ours over each other, round by round."""
    ratios = {name: [a / b for a, b in zip(times[ours], times[name])] for name in times if name != ours}
    return {
        "milliseconds": {name: 1e3 * statistics.median(values) for name, values in times.items()},
        "ratio": {name: dict(zip(("low", "median", "high"), quartiles(values))) for name, values in ratios.items()},
    }


def quartiles(values: Sequence[float]) -> list[float]:
    """A quarter, a half and three quarters of the values lie below these."""
    return statistics.quantiles(values, n=4, method="inclusive")


def machine() -> dict[str, Any]:
    """Devices and versions; nothing that names the host."""
    return {
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "allocator": " ".join(f"{name}={os.environ[name]}" for name in ALLOCATOR if name in os.environ) or "default",
    }


def table(rows: list[dict[str, Any]], labels: Sequence[str]) -> str:
    """The rows of `compare` in Markdown; `labels` are the columns that say what was timed."""
    times, ratios = list(rows[0]["milliseconds"]), list(rows[0]["ratio"])
    header = [*labels, *(f"{name}, ms" for name in times), *(f"ratio to {name}" for name in ratios)]
    cells = [
        [
            *(str(row[label]) for label in labels),
            *(f"{row['milliseconds'][name]:.3g}" for name in times),
            *("{median:.2f} ({low:.2f} to {high:.2f})".format(**row["ratio"][name]) for name in ratios),
        ]
        for row in rows
    ]
    return tables.markdown(header, cells, len(labels))


def save(what: str, device: str, report: dict[str, Any], markdown: str) -> None:
    """Writes `results/<what>-<device>.json` and `.md`."""
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"{what}-{re.sub(r'[^a-z0-9]+', '-', device.lower())}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    facts = "\n".join(f"- {key}: {value}" for key, value in report["machine"].items())
    stem.with_suffix(".md").write_text(f"# {what.capitalize()}\n\n{facts}\n\n{markdown}\n")


def _time(function: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        result = function()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*: (.*)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()
