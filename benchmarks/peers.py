"""Population statistics of one network by everyone who computes them: flaxbn, Flax by hand, torch and fvcore.

- `precise`, `exact`: `flaxbn.estimate_population_stats`, arrays on the device and a batch size.
- `evaluation`: the same batches through the Flax model in evaluation mode, a scan in one jit.
- `Flax scan`: the same in training mode with momentum 0, the statistics of all batches averaged in the scan.
- `Flax loop`: what Flax users write today, a jitted training-mode `apply` for each batch, averaged in numpy.
- `torch evaluation`, `update_bn` (`torch.optim.swa_utils`), `fvcore` (`update_bn_stats`): the same network in torch,
  channels last, over a list of batches on the device. They are left out where the package is missing.

On a GPU, float32 is TF32 for both, and bfloat16 is `dtype=bfloat16` in Flax and `torch.autocast` in torch.
"""

import argparse
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import harness
import jax
import jax.numpy as jnp
import networks
import numpy as np
import torch_networks

import flaxbn

WIDE = ((32, 1), (64, 2), (128, 2))
RESNET20 = functools.partial(networks.ResNet20, 10)
RESNET50 = functools.partial(networks.ResNet50, 10, width=64, stem=True)
MODELS = {
    "CNN": (functools.partial(harness.CNN, layers=WIDE), (28, 28, 1), 5120, 256),
    "ResNet-20": (RESNET20, (32, 32, 3), 1280, 128),
    "ResNet-50": (functools.partial(networks.ResNet50, 10), (32, 32, 3), 1280, 128),
    "ResNet-50 at 128": (RESNET50, (128, 128, 3), 2560, 128),
    "ResNet-50 at 224": (RESNET50, (224, 224, 3), 2560, 128),
}
BY_DEFAULT = {"cpu": ["CNN", "ResNet-20", "ResNet-50"]}


def in_flax(model: Any, images: np.ndarray, batch_size: int, dtype: str) -> dict[str, Callable[[], Any]]:
    """The passes of flaxbn and Flax, by name."""
    built = model(nn.BatchNorm, dtype=dtype)
    stock = model(functools.partial(nn.BatchNorm, momentum=0.0), dtype=dtype)
    variables = jax.jit(built.init)(jax.random.key(0), images[:1])
    on_device = jax.device_put(images)
    steps = len(images) // batch_size
    rows = np.arange(len(images)).reshape(batch_size, steps).T

    @jax.jit
    def evaluate(variables, images):
        def predict(_, rows):
            return None, jnp.argmax(built.apply(variables, jnp.take(images, rows, axis=0)), -1)

        return jax.lax.scan(predict, None, rows)[1]

    def train_mode(variables, batch):
        return stock.apply(variables, batch, train=True, mutable=["batch_stats"])[1]["batch_stats"]

    @jax.jit
    def scan(variables, images):
        def add(total, rows):
            found = train_mode(variables, jnp.take(images, rows, axis=0))
            return jax.tree.map(jnp.add, total, found), None

        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, variables["batch_stats"]), rows)
        return jax.tree.map(lambda value: value / steps, total)

    one_batch = jax.jit(lambda variables, images, rows: train_mode(variables, jnp.take(images, rows, axis=0)))

    def loop():
        found = [jax.device_get(one_batch(variables, on_device, own)) for own in rows]
        return jax.tree.map(lambda *values: np.mean(values, 0), *found)

    estimate = functools.partial(flaxbn.estimate_population_stats, built, variables, on_device, batch_size=batch_size)
    return {
        "precise": estimate,
        "exact": functools.partial(estimate, method="exact"),
        "evaluation": lambda: evaluate(variables, on_device),
        "Flax scan": lambda: scan(variables, on_device),
        "Flax loop": loop,
    }


def benchmark(name: str, dtype: str, rounds: int, samples: int | None) -> dict[str, Any]:
    """The times for one network, and the ratios of flaxbn's to all."""
    model, shape, number, batch_size = MODELS[name]
    images = np.random.default_rng(0).standard_normal((samples or number, *shape), np.float32)
    passes = in_flax(model, images, batch_size, dtype)
    if importlib.util.find_spec("torch"):
        passes |= torch_networks.candidates(name, images, batch_size, dtype)
    times = harness.interleave(passes, rounds)
    row = {"network": name, "dtype": dtype, "samples": len(images), "B": batch_size}
    found = harness.compare({k: v for k, v in times.items() if k != "exact"}, ours="precise")
    exact = harness.compare({k: times[k] for k in ("exact", "precise", "evaluation")}, ours="exact")
    found["milliseconds"] = {k: found["milliseconds"].get(k, exact["milliseconds"].get(k)) for k in times}
    print(row, {k: round(v, 1) for k, v in found["milliseconds"].items()}, flush=True)
    return row | found | {"exact": exact["ratio"]}


def table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds, then how precise and exact compare."""
    labels = ["network", "dtype", "samples", "B"]
    exact = [{"milliseconds": {}, "ratio": row["exact"]} | {k: row[k] for k in labels} for row in rows]
    names = [name for name in rows[0]["milliseconds"] if all(name in row["milliseconds"] for row in rows)]
    kept = [
        row
        | {
            "milliseconds": {k: row["milliseconds"][k] for k in names},
            "ratio": {k: row["ratio"][k] for k in names if k in row["ratio"]},
        }
        for row in rows
    ]
    return f"Precise:\n\n{harness.table(kept, labels)}\n\nExact:\n\n{harness.table(exact, labels)}"


def main() -> None:
    """Times every network, and keeps the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument(
        "--samples", type=int, help="a multiple of the batch size, in place of each network's own number"
    )
    parser.add_argument("--no-save", action="store_true", help="only print the tables")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    models = arguments.models or BY_DEFAULT.get(device.platform, ["ResNet-50 at 128", "ResNet-50 at 224"])
    rows = [benchmark(m, d, arguments.rounds, arguments.samples) for m in models for d in arguments.dtypes]
    markdown = table(rows)
    print(markdown)
    if not arguments.no_save:
        machine = harness.machine() | torch_networks.versions()
        report = {"machine": machine, "rounds": arguments.rounds, "rows": rows}
        harness.save("peers", device.device_kind, report, markdown)


if __name__ == "__main__":
    main()
