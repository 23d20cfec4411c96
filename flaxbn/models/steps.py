"""The number of updates that layers with a schedule store beside their statistics, set from outside."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jaxtyping import Array

from flaxbn.models.batch_stats import stored_layers
from flaxbn.models.leaves import dict_names, named_leaves
from flaxbn.models.places import Path


def set_steps(batch_stats: Any, steps: float | Array) -> Any:
    """`batch_stats` whose layers have had so many updates, as far as schedules can tell.

    Where `steps` is missing, as in the checkpoint of a layer with a fixed momentum, it reads as 0: ramps of
    `BatchRenorm` begin anew, and with `flaxbn.cumulative` or `flaxbn.Debiased` the first batch replaces what was
    stored. Set to `n`, what was stored counts as the average of n batches.

    Args:
        batch_stats: the tree of a Linen model, or `nnx.state(model, nnx.BatchStat)`; read only.
        steps: the number of updates, for all layers and domains.

    Returns:
        A tree of the same containers, in which each `steps` that is there holds the number, in float32. A tree of Linen
        without any gets one for each of its layers, a scalar: of layers that are stacked by `nn.scan` or `nn.vmap`,
        take the tree that `init` made of the model with the schedule, which has them, with the old statistics in it.

    Raises:
        ValueError: if `steps` is not a number of at least 0; or if no layer stores any, and none can be added: to the
            state of an nnx model, whose structure is that of the model, or where there is no layer.

    Examples:
        >>> import flaxbn, numpy as np
        >>> checkpoint = {"norm": {"mean": np.zeros(4, "float32"), "var": np.ones(4, "float32")}}
        >>> float(flaxbn.set_steps(checkpoint, 1000)["norm"]["steps"])
        1000.0
    """
    if np.ndim(steps) or not (isinstance(steps, jax.core.Tracer) or 0 <= float(steps) < np.inf):
        raise ValueError(f"`steps` must be one number of at least 0: got {steps}.")
    layers = set(stored_layers(batch_stats).places)

    def updated(path: Any, leaf: Any) -> Any:
        names = dict_names(path)
        is_steps = names[-1:] == ("steps",) and names[:-1] in layers
        return jnp.full(np.shape(leaf), steps, jnp.float32) if is_steps else leaf

    if any(names[-1:] == ("steps",) and names[:-1] in layers for names in named_leaves(batch_stats)):
        return jax.tree_util.tree_map_with_path(updated, batch_stats)
    if not layers or not isinstance(batch_stats, dict | FrozenDict):
        raise ValueError(
            f"`batch_stats` must hold layers that store `steps`, or be those of a Linen model: got a "
            f"{type(batch_stats).__name__} with {len(layers)} layers and no `steps`. Of an nnx model, take "
            "`nnx.state(model, nnx.BatchStat)` of the model with the schedule."
        )
    return _with_steps(batch_stats, (), layers, jnp.float32(steps))


def _with_steps(tree: Any, path: Path, layers: set[Path], steps: Any) -> Any:
    """The tree with `steps` in what holds a layer's statistics."""
    if not isinstance(tree, Mapping):
        return tree
    found = {name: _with_steps(value, (*path, str(name)), layers, steps) for name, value in tree.items()}
    found |= {"steps": steps} if path in layers else {}
    return FrozenDict(found) if isinstance(tree, FrozenDict) else found
