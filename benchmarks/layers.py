"""Forward and backward of one layer in training: flaxbn.BatchNorm against flax.linen.BatchNorm.

Timed is what a training step computes: the output, the gradients of x, scale and bias, and the updated running
average. `Flax` is the stock layer with its defaults (variance in one pass), `Flax two-pass` the same with
`use_fast_variance=False`, which is flaxbn's default.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import harness
import jax

import flaxbn

SHAPES = ((128, 32, 32, 64), (256, 28, 28, 32), (64, 56, 56, 64), (4096, 512))
LAYERS = {
    "flaxbn": flaxbn.BatchNorm,
    "Flax": nn.BatchNorm,
    "Flax two-pass": functools.partial(nn.BatchNorm, use_fast_variance=False),
}


def training_step(layer: nn.Module, x: jax.Array, cotangent: jax.Array) -> Callable[[], Any]:
    """One step of the layer on this input and this gradient of its output."""
    variables = layer.init(jax.random.key(0), x)

    @jax.jit
    def step(params, batch_stats, x, cotangent):
        def forward(params, x):
            return layer.apply({"params": params, "batch_stats": batch_stats}, x, mutable=["batch_stats"])

        y, pullback, updated = jax.vjp(forward, params, x, has_aux=True)
        return y, pullback(cotangent), updated

    return functools.partial(step, variables["params"], variables["batch_stats"], x, cotangent)


def benchmark(shape: tuple[int, ...], dtype: str, rounds: int) -> dict[str, Any]:
    """The times for one shape and type."""
    x, cotangent = jax.random.normal(jax.random.key(1), (2, *shape), dtype)
    steps = {
        name: training_step(layer(use_running_average=False, dtype=dtype), x, cotangent)
        for name, layer in LAYERS.items()
    }
    times = harness.interleave(steps, rounds)
    return {"shape": shape, "dtype": dtype} | harness.compare(times, ours="flaxbn")


def main() -> None:
    """Times every shape and type, and keeps the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    arguments = parser.parse_args()
    rows = [benchmark(shape, dtype, arguments.rounds) for dtype in arguments.dtypes for shape in SHAPES]
    markdown = harness.table(rows, ["shape", "dtype"])
    print(markdown)
    report = {"machine": harness.machine(), "rounds": arguments.rounds, "rows": rows}
    harness.save("layers", jax.devices()[0].device_kind, report, markdown)


if __name__ == "__main__":
    main()
