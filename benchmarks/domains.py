"""Forward and backward of one layer in training: a batch mixed from 8 domains against a batch of one.

`plain` is flaxbn.BatchNorm without domains; the others have `num_domains=8` and take a number for each example.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp

import flaxbn

SHAPES = ((128, 32, 32, 64), (256, 28, 28, 32), (64, 56, 56, 64), (4096, 512))
DOMAINS = 8


def training_step(layer: flaxbn.BatchNorm, x: jax.Array, cotangent: jax.Array, **options: Any) -> Callable[[], Any]:
    """One step of the layer, called with `options`, on this input and this gradient of its output."""
    variables = layer.init(jax.random.key(0), x, **options)

    @jax.jit
    def step(params, batch_stats, x, cotangent, options):
        def forward(params, x):
            variables = {"params": params, "batch_stats": batch_stats}
            return layer.apply(variables, x, mutable=["batch_stats"], **options)

        y, pullback, updated = jax.vjp(forward, params, x, has_aux=True)
        return y, pullback(cotangent), updated

    return functools.partial(step, variables["params"], variables["batch_stats"], x, cotangent, options)


def benchmark(shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """The times for one shape."""
    x, cotangent = jax.random.normal(jax.random.key(1), (2, *shape))
    layer = functools.partial(flaxbn.BatchNorm, use_running_average=False)
    mixed = functools.partial(training_step, x=x, cotangent=cotangent, domain=jnp.arange(shape[0]) % DOMAINS)
    steps = {
        f"{DOMAINS} domains": mixed(layer(num_domains=DOMAINS)),
        f"{DOMAINS} domains, affine": mixed(layer(num_domains=DOMAINS, domain_affine=True)),
        "plain": training_step(layer(), x, cotangent),
    }
    times = harness.interleave(steps, rounds)
    return {"shape": shape} | harness.compare(times, ours=f"{DOMAINS} domains")


def main() -> None:
    """Times every shape, and keeps the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    harness.keep_freed_memory()
    rows = [benchmark(shape, arguments.rounds) for shape in SHAPES]
    markdown = harness.table(rows, ["shape"])
    print(markdown)
    report = {"machine": harness.machine(), "rounds": arguments.rounds, "rows": rows}
    harness.save("domains", jax.devices()[0].device_kind, report, markdown)


if __name__ == "__main__":
    main()
