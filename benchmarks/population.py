"""`flaxbn.estimate_population_stats` against an evaluation pass, and against the loop it replaces.

- `estimator`: one pass over the images, arrays and a batch size.
- `stream`: one pass over a list of the same batches, in host memory.
- `evaluation`: the least that such a pass could cost, the same batches through the model in evaluation mode, as a
  scan in one jit, with their predictions as the result.
- `loop`: what Flax users write today, a training-mode `apply` with momentum 0 for each batch and the average of the
  returned statistics in numpy.

Every number of devices runs in a process of its own, since jax fixes it at start.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import harness
import jax
import jax.numpy as jnp
import networks
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import flaxbn

MODELS = {"CNN": (harness.CNN, (28, 28, 1)), "ResNet-20": (functools.partial(networks.ResNet20, 10), (32, 32, 3))}
BATCH_SIZE = 128


def candidates(model: type[nn.Module], images: np.ndarray) -> dict[str, Callable[[], Any]]:
    """The passes over the images that are timed, by name."""
    several = len(jax.devices()) > 1
    sharding = flaxbn.data_sharding() if several else None
    everywhere = NamedSharding(sharding.mesh, PartitionSpec()) if several else None
    ours, stock = model(flaxbn.BatchNorm), model(functools.partial(nn.BatchNorm, momentum=0.0))
    on_device, variables = jax.device_put((images, ours.init(jax.random.key(0), images[:1])), everywhere)
    steps = len(images) // BATCH_SIZE

    @jax.jit
    def evaluate(variables, images):
        def predict(_, rows):
            batch = jnp.take(images, rows, axis=0)
            if several:
                batch = jax.lax.with_sharding_constraint(batch, sharding)
            return None, jnp.argmax(ours.apply(variables, batch), -1)

        return jax.lax.scan(predict, None, jnp.arange(len(images)).reshape(-1, steps).T)[1]

    @jax.jit
    def train_mode(variables, batch):
        return stock.apply(variables, batch, train=True, mutable=["batch_stats"])[1]["batch_stats"]

    def loop():
        total = None
        for k in range(steps):
            batch_stats = jax.device_get(train_mode(variables, jax.device_put(images[k::steps], sharding)))
            total = batch_stats if total is None else jax.tree.map(np.add, total, batch_stats)
        return jax.tree.map(lambda value: value / steps, total)

    def estimate():
        return flaxbn.estimate_population_stats(ours, variables, on_device, batch_size=BATCH_SIZE, sharding=sharding)

    batches = [np.ascontiguousarray(images[k::steps]) for k in range(steps)]

    def stream():
        return flaxbn.estimate_population_stats(ours, variables, batches, sharding=sharding)

    return {
        "estimator": estimate,
        "stream": stream,
        "evaluation": lambda: evaluate(variables, on_device),
        "loop": loop,
    }


def benchmark(name: str, samples: int, rounds: int) -> dict[str, Any]:
    """The times for one model, on the devices of this process."""
    model, shape = MODELS[name]
    images = np.random.default_rng(0).standard_normal((samples, *shape), np.float32)
    times = harness.interleave(candidates(model, images), rounds)
    row = {"model": name, "devices": len(jax.devices()), "samples": samples}
    return row | harness.compare(times, ours="estimator")


def run_in_child(arguments: list[str]) -> dict[str, Any]:
    """The report of this script with one number of devices."""
    command = [sys.executable, __file__, "--child", *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    """Times every model on one device and on all, and keeps the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--batches", type=int, default=16, help=f"batches of {BATCH_SIZE} images")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--cpu-devices", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        jax.config.update("jax_num_cpu_devices", arguments.cpu_devices)
        rows = [benchmark(name, arguments.batches * BATCH_SIZE, arguments.rounds) for name in arguments.models]
        report = {"machine": harness.machine(), "kind": jax.devices()[0].device_kind, "rows": rows}
        print(json.dumps(report))
        return
    one = run_in_child(sys.argv[1:])
    reports = [one]
    if one["kind"] == "cpu" and os.cpu_count() > 1:
        reports.append(run_in_child([*sys.argv[1:], "--cpu-devices", str(os.cpu_count())]))
    rows = [row for report in reports for row in report["rows"]]
    markdown = harness.table(rows, ["model", "devices", "samples"])
    print(markdown)
    report = {"machine": one["machine"], "rounds": arguments.rounds, "rows": rows}
    harness.save("population", one["kind"], report, markdown)


if __name__ == "__main__":
    main()
