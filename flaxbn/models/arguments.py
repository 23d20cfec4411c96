"""What every function that runs a model checks about it first."""

from typing import Any

import flax.linen as nn
import jax

from flaxbn.data.batches import check_not_deleted


def check_model(model: Any) -> None:
    """A model must be a module, not a function in which its layers cannot be seen.

    Raises:
        TypeError: if it is anything else, its bound `apply` method or a compiled function say.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be a flax.linen.Module: got {type(model).__name__}. Pass the module itself, not its `apply` "
            "method or a compiled function, inside which the batch-norm layers cannot be seen."
        )


def check_concrete(name: str, tree: Any) -> None:
    """Arguments must be arrays, not what a transformation traces: the functions here compile by themselves.

    Args:
        name: what the user calls the argument.
        tree: the argument.

    Raises:
        TypeError: if a leaf is traced.
        ValueError: if a leaf was donated away.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)):
        raise TypeError(
            f"`{name}` must be concrete arrays, since the estimator compiles its own pass: got traced ones. Call it "
            "outside of `jax.jit`, `jax.pmap`, `jax.shard_map` and the like: with the variables of one replica and "
            '`sharding=flaxbn.data_sharding()` it uses all devices, and with `normalization_batch="device"` each of '
            "them normalizes by its own part of a batch, as under `pmap` without `axis_name`."
        )
    check_not_deleted(name, tree)
