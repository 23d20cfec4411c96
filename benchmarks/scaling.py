"""The communication of a pass over data, counted in the compiled program, and its time on the cores there are.

Each number of devices is simulated in a process of its own, and the program compiled for it, not run. Collectives in
the body of the loop over batches run once for each batch, the others once for the whole pass. Bytes are those that a
collective hands to each device.

The time is that of a pass on this machine's devices, one and all of them.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import harness
import jax
import numpy as np
import population
import tables

import flaxbn
from flaxbn.data.placement import by_step
from flaxbn.estimation.compiled import shapes_of
from flaxbn.estimation.precise import Pass
from flaxbn.estimation.request import request
from flaxbn.estimation.reuse import Compiled

COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")
ARRAY = re.compile(r"(f64|f32|s64|s32|u32|bf16|f16|pred|u8|s8)\[([\d,]*)\]")
SIZES = {"f64": 8, "s64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "u8": 1, "s8": 1}


def collectives(text: str) -> Iterator[tuple[bool, int]]:
    """Of each collective in an optimized program: whether it lies in a loop, and its bytes."""
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    computation = ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computation = head[1]
        elif found := COLLECTIVE.search(line):
            arrays = ARRAY.findall(found[1])
            sizes = (SIZES[dtype] * math.prod(map(int, filter(None, shape.split(",")))) for dtype, shape in arrays)
            yield computation in bodies, sum(sizes)


def compiled(name: str, batches: int, per_device: int, normalization_batch: str) -> str:
    """The optimized program of a precise pass."""
    model_type, shape = population.MODELS[name]
    model = model_type(flaxbn.BatchNorm)
    sharding = flaxbn.data_sharding()
    size = per_device * len(jax.devices())
    example = np.zeros((2, *shape), np.float32)
    abstract = jax.eval_shape(model.init, jax.random.key(0), example)
    variables = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), abstract)
    options = {"call": None, "sample_weight": None, "only": None, "rngs": None}
    asked = request(model, variables, sharding=sharding, normalization_batch=normalization_batch, **options)
    together = per_device if normalization_batch == "device" else size
    batch = jax.ShapeDtypeStruct((together, *shape), np.float32)
    shapes = shapes_of(asked.variables, batch, asked.rngs, present=None)
    source, (closed,) = Compiled(Pass, asked.options).find(shapes)
    images = jax.ShapeDtypeStruct((batches, size, *shape), np.float32, sharding=by_step(asked.options.sharding))
    return source.scan.lower(closed, asked.variables, asked.rngs, images, None, batches, None, 0).compile().as_text()


def count(name: str, normalization_batch: str) -> dict[str, Any]:
    """The collectives of a pass over 4 batches; that over 16 must have the same in its program."""
    programs = [list(collectives(compiled(name, batches, 2, normalization_batch))) for batches in (4, 16)]
    assert sorted(programs[0]) == sorted(programs[1]), "the program depends on the number of batches"
    inside = [size for in_loop, size in programs[0] if in_loop]
    outside = [size for in_loop, size in programs[0] if not in_loop]
    return {
        "model": name,
        "devices": len(jax.devices()),
        "normalization batch": normalization_batch,
        "for each batch": len(inside),
        "bytes for each batch": sum(inside),
        "for the pass": len(outside),
        "bytes for the pass": sum(outside),
    }


def timed(name: str, samples: int, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of a pass over some images, by normalization batch."""
    model_type, shape = population.MODELS[name]
    model = model_type(flaxbn.BatchNorm)
    images = np.random.default_rng(0).standard_normal((samples, *shape), np.float32)
    variables = model.init(jax.random.key(0), images[:2])

    def estimate(normalization_batch: str) -> Any:
        return flaxbn.estimate_population_stats(
            model,
            variables,
            images,
            batch_size=population.BATCH_SIZE,
            sharding=flaxbn.data_sharding(),
            normalization_batch=normalization_batch,
        )

    kinds = ("global", "device")
    times = harness.interleave({kind: lambda kind=kind: estimate(kind) for kind in kinds}, rounds)
    medians = {f"{kind}, ms": round(1e3 * harness.quartiles(times[kind])[1]) for kind in kinds}
    return [{"model": name, "devices": len(jax.devices()), "samples": samples, **medians}]


def run_in_child(devices: int, *arguments: str) -> dict[str, Any]:
    """The report of this script with one number of devices."""
    environment = {**os.environ, "NPROC": str(16 * os.cpu_count())}
    command = [sys.executable, __file__, "--devices", str(devices), "--child", *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def main() -> None:
    """Counts and times every model on every number of devices, and keeps the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--models", nargs="+", choices=population.MODELS, default=[*population.MODELS])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--child", choices=("count", "time"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        jax.config.update("jax_num_cpu_devices", arguments.devices[0])
        if arguments.child == "count":
            rows = [count(name, kind) for name in arguments.models for kind in ("global", "device")]
        else:
            rows = [row for name in arguments.models for row in timed(name, arguments.samples, arguments.rounds)]
        print(json.dumps({"machine": harness.machine(), "rows": rows}))
        return
    models = ["--models", *arguments.models]
    counted = [run_in_child(devices, "count", *models) for devices in arguments.devices]
    options = [*models, "--rounds", str(arguments.rounds), "--samples", str(arguments.samples)]
    measured = [run_in_child(devices, "time", *options) for devices in sorted({1, os.cpu_count()})]
    counts, times = ([row for report in reports for row in report["rows"]] for reports in (counted, measured))
    markdown = "\n\n".join(
        tables.markdown([*rows[0]], (row.values() for row in rows), len(rows[0])) for rows in (counts, times)
    )
    print(markdown)
    report = {"machine": measured[0]["machine"], "collectives": counts, "times": times}
    harness.save("scaling", "cpu", report, markdown)


if __name__ == "__main__":
    main()
