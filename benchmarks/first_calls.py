"""How long the first estimate of a process takes, with an empty and with a filled persistent compilation cache of jax.

Each is timed in a process of its own: a first call with an empty cache directory, a second process that finds the
first one's programs there, and in each process its second call, in which nothing is compiled. The images are few, so
that what is left is compiling.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import exact
import harness
import jax
import tables

import flaxbn

METHODS = ("precise", "exact")
CACHE = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
SAMPLES, BATCH_SIZE = 128, 32


def child(model: str, method: str) -> list[float]:
    """The seconds of a first and of a second call."""
    built, variables, images = exact.build(model, SAMPLES)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        found = flaxbn.estimate_population_stats(built, variables, images, batch_size=BATCH_SIZE, method=method)
        jax.block_until_ready(found)
        seconds.append(time.perf_counter() - start)
    return seconds


def in_process(model: str, method: str, cache: str) -> list[float]:
    """What `child` gives, in a new process with this cache directory."""
    command = [sys.executable, __file__, "--child", model, method]
    environment = {**os.environ, **CACHE, "JAX_COMPILATION_CACHE_DIR": cache}
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)


def row(model: str, method: str) -> dict[str, Any]:
    """One line of the table."""
    with tempfile.TemporaryDirectory() as cache:
        (first, warm), (cached, _) = (in_process(model, method, cache) for _ in range(2))
    layers = len(jax.tree.leaves(exact.build(model, 1)[1]["batch_stats"])) // 2
    return {"model": model, "layers": layers, "method": method, "first": first, "cached": cached, "warm": warm}


def main() -> None:
    """Times every model and method, and keeps the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(*arguments.child)))
        return
    rows = [row(model, method) for model in exact.MODELS for method in METHODS]
    header = ["model", "layers", "method", "first process, s", "second process, s", "next call, s"]
    cells = [
        [r["model"], str(r["layers"]), r["method"], *(f"{r[name]:.2f}" for name in ("first", "cached", "warm"))]
        for r in rows
    ]
    markdown = tables.markdown(header, cells, 3)
    print(markdown)
    harness.save("first-calls", jax.devices()[0].platform, {"machine": harness.machine(), "rows": rows}, markdown)


if __name__ == "__main__":
    main()
