"""What every function that runs a model checks about it first, and how it takes models of either of Flax's APIs."""

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import flax.linen as nn
import jax

from flaxbn.data.batches import check_not_deleted

P = ParamSpec("P")
R = TypeVar("R")
Model = Any
"""A `flax.linen.Module`, or the `GraphDef` of a `flax.nnx` model, which is not imported for the type."""


def open_model(model: Model, variables: Any, *, evaluates: bool = True) -> tuple[Any, Any]:
    """A model with its variables, of whichever API, as the functions here run them.

    A Linen module and its variables are what they are. What `nnx.split` returned becomes a model that runs like one,
    and variables in collections, `batch_stats` among them; what was opened before stays as it is.

    Args:
        model: the model.
        variables: its variables, or the state of an nnx model.
        evaluates: whether an nnx model runs as after `model.eval()`, or in the mode in which it was split.

    Raises:
        TypeError: if `model` is anything else: a bound `apply` method say, a compiled function, or an nnx module.
    """
    if isinstance(model, nn.Module) or is_opened_nnx(model):
        return model, variables
    _check_no_nnx_module(model)
    if "flax.nnx" in sys.modules:
        from flax import nnx

        from flaxbn.models.nnx import open_nnx

        if isinstance(model, nnx.GraphDef):
            return open_nnx(model, variables, evaluates=evaluates)
    raise TypeError(
        f"`model` must be a flax.linen.Module: got {type(model).__name__}. Pass the module itself, not its `apply` "
        "method or a compiled function, inside which the batch-norm layers cannot be seen; of a flax.nnx model pass "
        "`*nnx.split(model)`."
    )


def takes_model(function: Callable[P, R]) -> Callable[P, R]:
    """A function of `model, variables, ...` that says so where an nnx module stands in the place of both.

    Python would only say which argument is missing.
    """

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        _check_no_nnx_module(args[0] if args else kwargs.get("model"))
        return function(*args, **kwargs)

    return checked


def _check_no_nnx_module(model: Any) -> None:
    if "flax.nnx" in sys.modules:
        from flax import nnx

        if isinstance(model, nnx.Module):
            raise TypeError(
                f"An nnx model is given by its parts: got the {type(model).__name__} itself. Pass `*nnx.split(model)` "
                "in the place of `model, variables`, and take the results over by `nnx.update(model, stats)`."
            )


def is_opened_nnx(model: Any) -> bool:
    """Whether a model is an nnx model that was opened."""
    room = sys.modules.get("flaxbn.models.nnx")
    return room is not None and isinstance(model, room.NnxModel)


def model_name(model: Any) -> str:
    """What the class of a model is called."""
    return model.class_name if is_opened_nnx(model) else type(model).__name__


def with_batch_stats(variables: Any, batch_stats: Any) -> Any:
    """Variables with other statistics; of an nnx model its state, and those in a state, too."""
    if "flax.nnx" in sys.modules:
        from flax import nnx

        if isinstance(variables, nnx.State):
            return nnx.merge_state(variables, batch_stats)
    return {**variables, "batch_stats": batch_stats}


def random_keys(model: Any, variables: Mapping[str, Any], rngs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The random keys that a model draws from: those that are given, or those that an nnx model holds.

    Raises:
        ValueError: if keys are given for an nnx model.
    """
    if not is_opened_nnx(model):
        return dict(rngs or {})
    if rngs:
        raise ValueError(
            f"`rngs` must be left out for an nnx model, which holds its random keys itself: got {sorted(rngs)}. "
            "`nnx.reseed(model, ...)` gives it others."
        )
    return {"rngs": variables["rngs"]}


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
