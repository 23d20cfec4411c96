"""Forward and backward of one layer in training: flaxbn.BatchNorm against flax.linen.BatchNorm.

Timed is what a training step computes: the output, the gradients of x, scale and bias, and the updated running
average. `Flax` is the stock layer with its defaults (variance in one pass), `Flax two-pass` the same with
`use_fast_variance=False`, which is flaxbn's default.

One executable runs several steps one after the other, each on buffers of its own, so that neither dispatch nor what the
cache still holds is measured. The floor is 8 accesses of x at the speed of a copy: forward reads x to measure it, reads
it to normalize it and writes y; backward reads x and y's gradient for two sums, and both again to write x's gradient.
`saved` is what the backward passes of the three layers are handed, in bytes of x.

Then the same with ghost batches: flaxbn.BatchNorm with `virtual_batch_size`, in 32 groups, against itself without.
"""

import argparse
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import harness
import jax
import jax.numpy as jnp

import flaxbn

SHAPES = ((128, 32, 32, 64), (256, 28, 28, 32), (64, 56, 56, 64), (4096, 512))
ON_ACCELERATORS = ((64, 56, 56, 256),)
LAYERS = {
    "flaxbn": flaxbn.BatchNorm,
    "Flax": nn.BatchNorm,
    "Flax two-pass": functools.partial(nn.BatchNorm, use_fast_variance=False),
}
IN_GROUPS = ((1024, 16, 16, 32), (256, 28, 28, 32), (1024, 512))
GROUPS = 32
ACCESSES = 8
BYTES = 2**28  # of x, y and both gradients, of all steps in one executable: more than caches hold
COPIED = 2**28


def training_step(layer: nn.Module, variables: Any, x: jax.Array, cotangent: jax.Array) -> Any:
    """The output of the layer, its gradients and what it stores."""

    def forward(params, x):
        return layer.apply({**variables, "params": params}, x, mutable=["batch_stats"])

    y, pullback, updated = jax.vjp(forward, variables["params"], x, has_aux=True)
    return y, pullback(cotangent), updated


def steps_in_a_row(layer: nn.Module, xs: list[jax.Array], cotangents: list[jax.Array]) -> Callable[[], Any]:
    """A step for each of `xs` in one executable, none of which begins before the last has ended."""
    variables = layer.init(jax.random.key(0), xs[0])

    @jax.jit
    def run(variables, xs, cotangents):
        results = []
        for x, cotangent in zip(xs, cotangents):
            if results:
                x, cotangent, results[-1] = jax.lax.optimization_barrier((x, cotangent, results[-1]))
            results.append(training_step(layer, variables, x, cotangent))
        return results

    return functools.partial(run, variables, xs, cotangents)


def saved(layer: nn.Module, x: jax.Array) -> float:
    """What the layer hands to its backward pass, in bytes of x."""
    variables = layer.init(jax.random.key(0), x)

    def output(params, x):
        return layer.apply({**variables, "params": params}, x, mutable=["batch_stats"])[0]

    _, pullback = jax.vjp(output, variables["params"], x)
    arrays = {id(leaf): leaf.nbytes for leaf in jax.tree.leaves(pullback)}
    return sum(arrays.values()) / x.nbytes


def copy_bandwidth(rounds: int) -> float:
    """Bytes read and written in a second where an array is copied, twice its values; the best of all rounds.

    Two copies are there at any time, so that the next is written to memory that was used before. On an accelerator many
    follow each other, since starting one takes as long as a good part of it.
    """
    x = jnp.ones(COPIED // 4)
    double = jax.jit(lambda x: 2 * x)
    copies = 1 if jax.default_backend() == "cpu" else 50
    copy, best = double(x), math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(copies):
            copy = double(x)
        copy.block_until_ready()
        best = min(best, (time.perf_counter() - start) / copies)
    return 2 * copy.nbytes / best


def timed(layers: dict[str, nn.Module], xs: list[jax.Array], cotangents: list[jax.Array], rounds: int) -> Any:
    """Seconds for one step of each layer, in every round."""
    runs = {name: steps_in_a_row(layer, xs, cotangents) for name, layer in layers.items()}
    times = harness.interleave(runs, rounds)
    return {name: [seconds / len(xs) for seconds in values] for name, values in times.items()}


def inputs(shape: tuple[int, ...], dtype: str) -> tuple[list[jax.Array], list[jax.Array]]:
    """As many inputs, and gradients of outputs, as one executable takes."""
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    copies = max(1, round(BYTES / (4 * size)))
    xs, cotangents = (list(jax.random.normal(jax.random.key(seed), (copies, *shape), dtype)) for seed in (1, 2))
    return xs, cotangents


def benchmark_groups(shape: tuple[int, ...], dtype: str, rounds: int) -> dict[str, Any]:
    """The times of one step in groups, and of one without."""
    sizes = {f"{GROUPS} groups": shape[0] // GROUPS, "flaxbn": None}
    layers = {
        name: flaxbn.BatchNorm(use_running_average=False, dtype=dtype, virtual_batch_size=size)
        for name, size in sizes.items()
    }
    times = timed(layers, *inputs(shape, dtype), rounds)
    return {"shape": shape, "dtype": dtype} | harness.compare(times, ours=f"{GROUPS} groups")


def benchmark(shape: tuple[int, ...], dtype: str, rounds: int, bandwidth: float) -> dict[str, Any]:
    """The times of one step for one shape and type."""
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    xs, cotangents = inputs(shape, dtype)
    layers = {name: layer(use_running_average=False, dtype=dtype) for name, layer in LAYERS.items()}
    times = timed(layers, xs, cotangents, rounds)
    row = {"shape": shape, "dtype": dtype} | harness.compare(times, ours="flaxbn")
    floor = 1e3 * ACCESSES * size / bandwidth
    return row | {
        "floor, ms": float(f"{floor:.3g}"),
        "over the floor": round(row["milliseconds"]["flaxbn"] / floor, 2),
        "saved": ", ".join(f"{saved(layer, xs[0]):.2f}" for layer in layers.values()),
    }


def main() -> None:
    """Times every shape and type, and keeps the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    arguments = parser.parse_args()
    harness.keep_freed_memory()
    bandwidth = copy_bandwidth(arguments.rounds)
    shapes = SHAPES if jax.default_backend() == "cpu" else SHAPES + ON_ACCELERATORS
    rows = [benchmark(shape, dtype, arguments.rounds, bandwidth) for dtype in arguments.dtypes for shape in shapes]
    markdown = harness.table(rows, ["shape", "dtype", "floor, ms", "over the floor", "saved"])
    groups = [benchmark_groups(shape, dtype, arguments.rounds) for dtype in arguments.dtypes for shape in IN_GROUPS]
    markdown += f"\n\n## In {GROUPS} groups\n\n" + harness.table(groups, ["shape", "dtype"])
    facts = {"copy": f"{bandwidth / 1e9:.3g} GB/s, read and written"}
    print(f"{facts['copy']}; {harness.machine()['allocator']}\n\n{markdown}")
    report = {"machine": harness.machine() | facts, "rounds": arguments.rounds, "rows": rows, "groups": groups}
    harness.save("layers", jax.devices()[0].device_kind, report, markdown)


if __name__ == "__main__":
    main()
