"""What every function that runs a model checks about it first, and how it takes models of either of Flax's APIs."""

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import flax.linen as nn
import jax

from flaxbn.data.batches import check_not_deleted
from flaxbn.models.keys import fold_in
from flaxbn.models.user_functions import CallError, explained_anew

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
        _check_variables(variables)
        return model, variables
    _check_is_model(model)
    if "flax.nnx" in sys.modules:
        from flax import nnx

        from flaxbn.models.nnx import open_nnx

        if isinstance(model, nnx.GraphDef):
            return open_nnx(model, variables, evaluates=evaluates)
    raise TypeError(
        f"`model` must be a flax.linen.Module: got {type(model).__name__}. {_instead(model)}Pass the module itself, "
        "not its `apply` method or a compiled function, inside which the batch-norm layers cannot be seen; of a "
        "flax.nnx model pass `*nnx.split(model)`."
    )


def _instead(model: Any) -> str:
    """What to pass in the place of what has to do with a model, as a sentence; empty where that is unknown."""
    owner = getattr(model, "__self__", None)
    if isinstance(owner, nn.Module):
        return f"It is a method of {type(owner).__name__}: drop `.{model.__name__}`. "
    if isinstance(getattr(model, "module", None), nn.Module):
        return "It holds a module: pass `model.module, model.params` in the place of `model, variables`. "
    if isinstance(model, type) and issubclass(model, nn.Module):
        return f"It is the class: make a model of it, `{model.__name__}(...)`. "
    return "The model comes first, then its variables. " if isinstance(model, Mapping) else ""


def takes_model(function: Callable[P, R]) -> Callable[P, R]:
    """A function of `model, variables, ...`, as the door of this package.

    It says so where one object stands in the place of both: Python would only say which argument is missing. What is
    explained about functions of the user is raised from here, without the frames in between.
    """

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        _check_is_model(args[0] if args else kwargs.get("model"))
        try:
            return function(*args, **kwargs)
        except CallError as error:
            explanation, cause = explained_anew(error), error.__cause__
        raise explanation from cause

    return checked


def _check_is_model(model: Any) -> None:
    """What holds model and variables together, in one object, is an error."""
    if hasattr(model, "apply_fn") and hasattr(model, "params"):
        raise TypeError(_of_train_state(model, "`model` must be a flax.linen.Module", "pass the module itself, then"))
    if "flax.nnx" in sys.modules:
        from flax import nnx

        if isinstance(model, nnx.Module):
            raise TypeError(
                f"An nnx model is given by its parts: got the {type(model).__name__} itself. Pass `*nnx.split(model)` "
                "in the place of `model, variables`, and take the results over by `nnx.update(model, stats)`."
            )
        if isinstance(model, nnx.Optimizer):
            raise TypeError(
                f"`model` must be the model: got its {type(model).__name__}. Pass `*nnx.split(model)` in the place of "
                "`model, variables`; an optimizer is no part of it."
            )


def _check_variables(variables: Any) -> None:
    """Those of a Linen model are collections."""
    if isinstance(variables, nn.Module):
        raise TypeError(f"The model comes first, then its variables: got {type(variables).__name__} as `variables`.")
    if hasattr(variables, "apply_fn") and hasattr(variables, "params"):
        raise TypeError(_of_train_state(variables, "`variables` must be a dictionary of collections", "pass"))
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"`variables` must be a dictionary of collections: got {type(variables).__name__}. Pass what `model.init` "
            'returned, or `{"params": params, "batch_stats": batch_stats}`.'
        )


def _of_train_state(state: Any, must: str, do: str) -> str:
    """What is said about a train state, which of Flax's own has no field for statistics."""
    variables = '`{"params": state.params, "batch_stats": state.batch_stats}`'
    field = (
        ""
        if hasattr(state, "batch_stats")
        else f" This {type(state).__name__} has no statistics: give a subclass of it the field `batch_stats: Any`, "
        'create it with `batch_stats=variables["batch_stats"]`, and in each training step '
        '`state.replace(batch_stats=updates["batch_stats"])`.'
    )
    return f"{must}: got {type(state).__name__}. Of a train state {do} {variables}.{field}"


def is_opened_nnx(model: Any) -> bool:
    """Whether a model is an nnx model that was opened."""
    room = sys.modules.get("flaxbn.models.nnx")
    return room is not None and isinstance(model, room.NnxModel)


def model_class(model: Any) -> type:
    """The class of a model."""
    return model.cls if is_opened_nnx(model) else type(model)


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


def dropout_keys(model: Any, variables: Mapping[str, Any], rngs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The random keys of a call in which dropout may be on: those given, or an nnx model's own with these folded in.

    Raises:
        ValueError: if none of the dropout layers of an nnx model draws from a collection among `rngs`.
    """
    if not is_opened_nnx(model):
        return dict(rngs or {})
    keys = variables["rngs"]
    for name in sorted(rngs or ()):
        model.check_dropout(variables, name)
        keys = fold_in(keys, jax.random.bits(rngs[name]))  # type: ignore[index]
    return {"rngs": keys}


def check_concrete(name: str, tree: Any) -> None:
    """Arguments must be arrays, not what a transformation traces: the functions here compile by themselves.

    Args:
        name: what the user calls the argument.
        tree: the argument.

    Raises:
        TypeError: if a leaf is traced.
        ValueError: if a leaf was donated away.
    """
    leaves = jax.tree.leaves(tree)
    if any(issubclass(kind, jax.core.Tracer) for kind in set(map(type, leaves))):
        raise TypeError(
            f"`{name}` must be concrete arrays, since the estimator compiles its own pass: got traced ones. Call it "
            "outside of `jax.jit`, `jax.pmap`, `jax.shard_map` and the like: with the variables of one replica and "
            '`sharding=flaxbn.data_sharding()` it uses all devices, and with `normalization_batch="device"` each of '
            "them normalizes by its own part of a batch, as under `pmap` without `axis_name`."
        )
    check_not_deleted(name, leaves)
