"""`flaxbn.estimate_population_stats(..., method="exact")` against `method="precise"` and an evaluation pass.

- `exact`: at three memory limits, none and two shares of what one forward pass has to keep. The images are a numpy
  array, of which one batch after the other goes to the device.
- `precise`: the images are an array on the device.
- `evaluation`: the same batches through the model in evaluation mode, as a scan in one jit, with their predictions as
  the result. The images are an array on the device.

`first` is the first call of a new process, tracing and compilation included; the other times are of calls that take
turns in one process. A peak is the most memory above what was in use before the call, when the images were there: of
the process, in its second call, on CPUs (Linux only); as the device counts it, in the first call, elsewhere. It is held
against 1.3 times the plan and two batches, of which each is what the plan keeps of one batch where that is most.
"""

import argparse
import functools
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import harness
import jax
import jax.numpy as jnp
import networks
import numpy as np
import tables

import flaxbn

CNN = functools.partial(harness.CNN, layers=((16, 1), (32, 2), (64, 2), (64, 1)))
RESNET20, RESNET50 = (functools.partial(network, 10) for network in (networks.ResNet20, networks.ResNet50))
MODELS = {"CNN": (CNN, [32]), "ResNet-20": (RESNET20, [32, 128]), "ResNet-50": (RESNET50, [32, 128])}
LIMITS = {"none": None, "60 %": 0.6, "25 %": 0.25}
BASELINES = ("precise", "evaluation")
MIB = 2**20
# Memory that is freed goes back to the system, where it would hide what the next call takes.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
LABELS = ["model", "layers", "B", "limit"]
TIMES = [*LABELS, "passes", "first, s", "first / precise's"]
BOUND = "1.3 planned + 2 batches"
PEAKS = {name: f"peak of {name}" for name in BASELINES}
MEMORY = [*LABELS, "limit, MiB", "planned", BOUND, "peak", "peak / planned", "within", *PEAKS.values()]


def build(model: str, samples: int) -> tuple[nn.Module, Any, np.ndarray]:
    """A model, variables that take no compilation, and images."""
    rng = np.random.default_rng(0)

    def variable(like: jax.ShapeDtypeStruct) -> np.ndarray:
        if len(like.shape) == 1:
            return np.ones(like.shape, like.dtype)
        return rng.standard_normal(like.shape, like.dtype) * np.sqrt(2 / np.prod(like.shape[:-1]), dtype=like.dtype)

    images = rng.standard_normal((samples, 32, 32, 3), np.float32)
    built = MODELS[model][0](nn.BatchNorm)
    shapes = jax.eval_shape(built.init, jax.random.key(0), images[:1])
    return built, jax.device_put(jax.tree.map(variable, shapes)), images


def candidates(
    model: str, samples: int, batch_size: int, limits: dict[str, int | None]
) -> dict[str, Callable[[], Any]]:
    """The passes that are compared, by name: `exact` by its memory limit."""
    built, variables, images = build(model, samples)
    on_device = jax.device_put(images)
    estimate = functools.partial(flaxbn.estimate_population_stats, built, variables, batch_size=batch_size)
    exact = functools.partial(estimate, images, method="exact")

    @jax.jit
    def evaluate(variables, images):
        def predict(_, rows):
            return None, jnp.argmax(built.apply(variables, jnp.take(images, rows, axis=0)), -1)

        return jax.lax.scan(predict, None, jnp.arange(samples).reshape(batch_size, -1).T)[1]

    return {
        **{limit: functools.partial(exact, memory_limit=count) for limit, count in limits.items()},
        "precise": lambda: estimate(on_device),
        "evaluation": lambda: evaluate(variables, on_device),
    }


def plan(model: str, samples: int, batch_size: int) -> dict[str, Any]:
    """The plan for each limit, in bytes."""
    planned = functools.partial(flaxbn.plan, *build(model, samples), batch_size=batch_size)
    whole = planned()
    limits = {limit: share and int(share * whole.largest_bytes) for limit, share in LIMITS.items()}
    plans = {limit: planned(memory_limit=count) for limit, count in limits.items()}
    return {
        "machine": harness.machine(),
        "layers": len(whole.calls),
        "limits": limits,
        "passes": {limit: found.passes for limit, found in plans.items()},
        "planned": {limit: found.peak_bytes for limit, found in plans.items()},
        "two_batches": 2 * whole.largest_bytes / whole.batches,
    }


def warm(rounds: int, **case: Any) -> dict[str, list[float]]:
    """Seconds for each call of each pass, once everything is compiled."""
    return harness.interleave(candidates(**case), rounds)


def first(method: str, **case: Any) -> float:
    """Seconds for the first call, compilation included."""
    call = candidates(**case)[method]
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def peak(method: str, **case: Any) -> int:
    """The bytes that a call takes beyond those in use before it."""
    call, device = candidates(**case)[method], jax.devices()[0]
    before = device.memory_stats()
    jax.block_until_ready(call())
    if before:
        return device.memory_stats()["peak_bytes_in_use"] - before["bytes_in_use"]
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    resident = process_bytes("VmRSS")
    jax.block_until_ready(call())
    return process_bytes("VmHWM") - resident


def process_bytes(what: str) -> int:
    """What the kernel counts for this process under a name, VmRSS say."""
    return 1024 * int(re.search(rf"{what}:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1])


TASKS = {task.__name__: task for task in (plan, warm, first, peak)}


def in_child(task: Callable[..., Any], **arguments: Any) -> Any:
    """What a task returns in a process of its own."""
    settings = {"JAX_ENABLE_COMPILATION_CACHE": "false"} | (RETURN_MEMORY if task is peak else {})
    command = [sys.executable, __file__, "--child", task.__name__, json.dumps(arguments)]
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | settings)
    return json.loads(child.stdout)


def benchmark(case: dict[str, Any], rounds: int, cold_rounds: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The machine, and a row for each limit."""
    facts = in_child(plan, **case)
    case_limits = {**case, "limits": facts["limits"]}
    times = in_child(warm, rounds=rounds, **case_limits)
    colds = [{name: in_child(first, method=name, **case_limits) for name in times} for _ in range(cold_rounds)]
    firsts = {name: statistics.median(cold[name] for cold in colds) for name in times}
    peaks = {name: in_child(peak, method=name, **case_limits) / MIB for name in times}
    rows = []
    for limit, count in facts["limits"].items():
        planned = facts["planned"][limit] / MIB
        bound = 1.3 * planned + facts["two_batches"] / MIB
        row = {
            "model": case["model"],
            "layers": facts["layers"],
            "B": case["batch_size"],
            "limit": limit,
            "passes": round(facts["passes"][limit], 2),
            "first, s": round(firsts[limit], 2),
            "first / precise's": round(firsts[limit] / firsts["precise"], 2),
            "limit, MiB": round(count / MIB, 1) if count else "",
            "planned": round(planned, 1),
            BOUND: round(bound, 1),
            "peak": round(peaks[limit], 1),
            "peak / planned": round(peaks[limit] / planned, 2),
            "within": "yes" if peaks[limit] <= bound else "no",
            **{column: round(peaks[name], 1) for name, column in PEAKS.items()},
        }
        warm_times = {"exact": times[limit]} | {name: times[name] for name in BASELINES}
        rows.append(row | harness.compare(warm_times, ours="exact"))
    return facts["machine"], rows


def main() -> None:
    """Compares on every model and batch size, and keeps the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="rounds of warm calls, 2 or more")
    parser.add_argument("--cold-rounds", type=int, default=3, help="new processes for the first call of each method")
    parser.add_argument("--images", type=int, default=1280, help="a multiple of each batch size")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--batch-sizes", nargs="+", type=int, help="by default 32, and for the deeper ones also 128")
    parser.add_argument("--no-save", action="store_true", help="only print the tables")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        task, given = arguments.child
        print(json.dumps(TASKS[task](**json.loads(given))))
        return
    rows = []
    for model in arguments.models:
        for batch_size in arguments.batch_sizes or MODELS[model][1]:
            case = {"model": model, "samples": arguments.images, "batch_size": batch_size}
            machine, found = benchmark(case, arguments.rounds, arguments.cold_rounds)
            rows += found
    memory = tables.markdown(MEMORY, ([row[name] for name in MEMORY] for row in rows), len(LABELS))
    markdown = f"{harness.table(rows, TIMES)}\n\nPeak memory, MiB:\n\n{memory}"
    print(markdown)
    if not arguments.no_save:
        report = {"machine": machine, "rounds": arguments.rounds, "cold_rounds": arguments.cold_rounds, "rows": rows}
        harness.save("exact", machine["device"], report, markdown)


if __name__ == "__main__":
    main()
