"""Whether one and the same call is compiled again and again: that is slow, and mostly nobody means it."""

import functools
import warnings
from collections.abc import Hashable
from typing import Any

from flaxbn.estimation.compiled import PassOptions
from flaxbn.estimation.recent import Recent
from flaxbn.models.arguments import model_class
from flaxbn.models.snapshot import NotFrozenError, snapshot
from flaxbn.models.unseen import frames_within
from flaxbn.tracing.jaxpr import Hashed, Same

_OFTEN = 5  # times; batches of a training and a smaller last one, for both methods, are two each
_CALLS = 64  # that are remembered

compiled_shapes: Recent[list[Hashable]] = Recent(_CALLS)
"""For each call the shapes of the batches that it was compiled for."""


def note_compiled(make: Hashable, options: PassOptions, shapes: Hashable) -> None:
    """Notes that something was compiled; warns, once, where that is the fifth time for a call.

    A call is the same where the model is, by value, and the code of `call`, whatever that closes over.

    Args:
        make: what is compiled.
        options: of the estimate.
        shapes: those of the arguments.
    """
    key = Hashed((make, _model(options.model), _code(options.call), _code(options.sample_weight), options.layout))
    seen = compiled_shapes.get(key) or compiled_shapes.put(key, [])
    if len(seen) == _OFTEN:
        return
    seen.append(shapes)
    if len(seen) < _OFTEN:
        return
    if len(set(seen)) == _OFTEN:
        why = (
            "batches have come in as many shapes, and each takes a program of its own. Cut or pad them to a few; "
            "arrays with a `batch_size` are cut into two shapes at most"
        )
    else:
        why = (
            "what it computes is another thing each time. A number or a string that `call` or `sample_weight` closes "
            "over is part of the program: give it as an array of jax, or the same in each call"
        )
    warnings.warn(
        f"For one call of {model_class(options.model).__name__} five programs have been compiled by now, which takes "
        f"long: {why}. (This is said once.)",
        stacklevel=frames_within() + 1,
    )


def _model(model: Any) -> Hashable:
    try:
        return snapshot(model)
    except NotFrozenError:
        return Same(type(model))


def _code(function: Any) -> Hashable:
    """The code of a function, or the type of what is called like one."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__code__", None) or Same(type(function))
