"""What is said where a model does not run on a batch: what the batch is, and the `call` that would run it."""

import contextlib
import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from flaxbn.data.described import described, main_input, parts_of
from flaxbn.models.user_functions import BEHIND, explained

_EVALUATION = {
    **dict.fromkeys(("train", "training", "is_training", "is_train"), False),
    **dict.fromkeys(("deterministic", "use_running_average", "eval", "evaluate", "inference"), True),
}
"""What arguments that tell a model its mode are called, and their values for evaluation."""


@contextlib.contextmanager
def explained_call(cls: type, call: Any, batch: Any, variables: Mapping[str, Any], *, is_nnx: bool) -> Iterator[None]:
    """In here a model is run on a batch; where it cannot be, the error tells how it could.

    Args:
        cls: the class of the model.
        call: that of the user; None for the default.
        batch: the batch, as the user gave it, traced or not.
        variables: those of the model.
        is_nnx: whether the model is one of flax.nnx.
    """
    module = "model" if is_nnx else "module"
    ran = f"; the default, `{module}(batch)`," if call is None else f", `({module}, batch) -> output`; it"

    def cure(error: Exception) -> str:
        return _cure(error, call, proposal(cls, batch, module), variables, module)

    must = f"`call` must run the model on a batch{ran}"
    with explained(must, lambda: f"The batch is\n{described(batch)}", cure):
        yield


def _cure(error: Exception, call: Any, proposed: str | None, variables: Mapping[str, Any], module: str) -> str:
    """What to do about an error, by its class."""
    kind = type(error).__name__
    write = f"Say how the model evaluates one:\n  call=lambda {module}, batch: {proposed}"
    if kind == "InvalidRngError":
        return (
            "It draws random numbers: turn that off in `call`, by `deterministic=True` or what the model calls it, "
            'or hand it keys, `rngs={"dropout": key}` for example.'
        )
    if kind == "ScopeParamShapeError":
        return "All axes but the first must be as in the batch that `model.init` was given; one example is `x[None]`."
    if kind in ("ScopeCollectionNotFound", "ScopeVariableNotFoundError"):
        return (
            f"`variables` hold {', '.join(map(repr, variables)) or 'nothing'}: they must be what `model.init` "
            'returned, `{"params": params, "batch_stats": batch_stats}`.'
        )
    misused = isinstance(error, KeyError | IndexError | AttributeError | TypeError)
    if proposed is not None and (proposed != f"{module}(batch)" if call is None else misused):
        return write
    return f"Arrays are traced inside of it, as under `jax.jit`. {BEHIND}"


def proposal(cls: type, batch: Any, module: str) -> str | None:
    """How a model of this class may be run for evaluation, as code; None where nothing tells.

    A required argument gets the part of the batch that has its name or one that begins alike, the value that turns
    training off, or `...`; of a tuple, that of its place.

    Examples:
        >>> import numpy as np
        >>> class Model:
        ...     def __call__(self, x, mask, train): ...
        >>> proposal(Model, {"image": np.zeros((2, 8, 8, 1)), "mask": np.ones(2)}, "module")
        'module(batch["image"], mask=batch["mask"], train=False)'
        >>> proposal(Model, (np.zeros((2, 8, 8, 1)), np.ones(2), np.ones(2)), "module")
        'module(batch[0], mask=batch[1], train=False)'

    Args:
        cls: the class of the model, whose `__call__` is looked at.
        batch: the batch.
        module: what the model is called in the code.
    """
    runs = next((vars(base)["__call__"] for base in cls.__mro__ if "__call__" in vars(base)), None)
    parameters = [] if runs is None else [*inspect.signature(runs).parameters.values()][1:]
    codes = [part.code for part in parts_of(batch)]
    inputs = [p for p in parameters[1:] if p.name not in _EVALUATION and _is_required(p)]
    if inputs and isinstance(batch, tuple | list) and not hasattr(batch, "_fields") and len(codes) > len(inputs):
        first: str | None = codes[0]
        values = dict(zip([p.name for p in inputs], codes[1:]))
    else:
        values = {p.name: _part(p.name, codes) or _begins_alike(p.name, codes) or "..." for p in inputs}
        named = _part(parameters[0].name, codes) if parameters else None
        first = named or main_input(batch, without=values.values())
    values |= {p.name: str(_EVALUATION[p.name]) for p in parameters[1:] if _is_mode(p)}
    others = [f"{p.name}={values[p.name]}" for p in parameters[1:] if p.name in values]
    return None if first is None or not parameters else f"{module}({', '.join([first, *others])})"


def _part(name: str, codes: Collection[str]) -> str | None:
    """The part of a batch that is called so."""
    return next((code for code in (f'batch["{name}"]', f"batch.{name}") if code in codes), None)


def _begins_alike(name: str, codes: Collection[str]) -> str | None:
    """The one part of a batch whose name begins like this one, `act` and `a` say."""
    keys = {code: code.removeprefix("batch").strip('."[]') for code in codes}
    found = [code for code, key in keys.items() if key.startswith(name) or (key and name.startswith(key))]
    return found[0] if len(found) == 1 else None


def _is_mode(given: inspect.Parameter) -> bool:
    """Whether an argument tells the model its mode, and must be given for evaluation."""
    return given.name in _EVALUATION and given.default is not _EVALUATION[given.name]


def _is_required(given: inspect.Parameter) -> bool:
    return given.default is given.empty and given.kind not in (given.VAR_POSITIONAL, given.VAR_KEYWORD)
