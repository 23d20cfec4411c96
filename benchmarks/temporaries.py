"""The memory that a training step needs: eight blocks of a convolution, batch normalization and relu in a `lax.scan`.

It is what the compiled program says that it takes for temporaries, in inputs of a block: what blocks keep for the
backward pass is most of it. Nothing runs. With `--target FILE` it is compiled for a GPU that this machine does not
have: FILE is its target configuration in XLA's text form (of a machine that has one, from the client's topology), and
jax needs its CUDA plugin.
"""

import argparse
import os
import pathlib
from typing import Any

import flax.linen as nn
import harness
import jax
import jax.numpy as jnp
import tables
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import flaxbn

BLOCKS = 8
SHAPE = (64, 56, 56, 64)


class Block(nn.Module):
    """A convolution, batch normalization by `norm`, and relu, which the layer applies if it is `inside`."""

    norm: type[nn.Module]
    inside: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        options = {"activation": nn.relu} if self.inside else {}
        x = nn.Conv(x.shape[-1], (3, 3), use_bias=False, dtype=self.dtype)(x)
        x = self.norm(use_running_average=False, dtype=self.dtype, **options)(x)
        return x if self.inside else nn.relu(x), None


def temporaries(block: tuple[Any, ...], device: jax.Device) -> float:
    """Those of the gradient of blocks, in inputs of a block."""
    model = nn.scan(Block, length=BLOCKS, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})(
        *block
    )

    def step(params, batch_stats, x):
        def loss(params):
            (y, _), new = model.apply({"params": params, "batch_stats": batch_stats}, x, None, mutable=["batch_stats"])
            return jnp.sum(jnp.square(y.astype(jnp.float32))), new

        return jax.grad(loss, has_aux=True)(params)

    x = jax.ShapeDtypeStruct(SHAPE, block[-1])
    variables = jax.eval_shape(model.init, jax.random.key(0), x, None)
    given = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=SingleDeviceSharding(device)),
        (variables["params"], variables["batch_stats"], x),
    )
    compiled = jax.jit(step).lower(*given).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (x.size * x.dtype.itemsize)


def target(path: pathlib.Path | None) -> tuple[jax.Device, str]:
    """The device to compile for, and what it is called."""
    if path is None:
        return jax.devices()[0], jax.devices()[0].device_kind
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    topology = topologies.get_topology_desc("1", platform="cuda", target_config=path.read_text(), topology="1x1x1")
    return topology.devices[0], topology.devices[0].device_kind


def main() -> None:
    """Compiles all, and keeps the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=pathlib.Path)
    arguments = parser.parse_args()
    device, kind = target(arguments.target)
    rows = []
    for dtype in (jnp.float32, jnp.bfloat16):
        blocks = (nn.BatchNorm, False, dtype), (flaxbn.BatchNorm, False, dtype), (flaxbn.BatchNorm, True, dtype)
        flax, ours, inside = (temporaries(block, device) for block in blocks)
        found = [f"{value:.1f}" for value in (flax, ours, inside)]
        rows.append([jnp.dtype(dtype).name, *found, f"{ours / flax:.2f}", f"{inside / flax:.2f}"])
    header = ["dtype", "Flax", "flaxbn", "flaxbn, activation=nn.relu", "flaxbn / Flax", "with activation / Flax"]
    markdown = tables.markdown(header, rows, 1)
    print(markdown)
    run = "nothing ran" if arguments.target is None else "compiled on a machine without it, nothing ran"
    machine = {key: value for key, value in harness.machine().items() if key in ("jax", "flax")}
    facts = {"device": f"{kind}, {run}", "shape": SHAPE, "blocks": BLOCKS} | machine
    harness.save("temporaries", kind, {"machine": facts, "rows": rows}, markdown)


if __name__ == "__main__":
    main()
