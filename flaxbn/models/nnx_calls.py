"""Seeing the calls of layers in models of flax.nnx, which has no interceptors.

While a look is on, the `__call__` of the classes that are looked at is a stand-in. The class belongs to the process, so
other threads run the stand-in, too, which for them does nothing; behind the last look the class is as it was.
"""

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from flaxbn.models.recognized import recognized_classes

Handler = Callable[[type, Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]
"""`(class, its __call__, layer, arguments, keywords) -> output`: what runs in the place of a call."""


class _Here(threading.local):
    """The look of this thread."""

    handler: Handler | None = None


@dataclass
class _StandIn:
    """The function in the place of a `__call__`, the one that it stands in for, and how many looks need it."""

    function: Callable[..., Any]
    original: Callable[..., Any]
    looks: int = 0


_here = _Here()
_lock = threading.Lock()
_stand_ins: dict[type, _StandIn] = {}


@contextlib.contextmanager
def intercept_nnx(handler: Handler) -> Iterator[None]:
    """Runs `handler` in the place of each call of an nnx layer in this thread.

    Calls inside such a call run as they are. Where flax.nnx is not loaded there are no such layers: nothing is done.
    """
    if "flax.nnx" not in sys.modules:
        yield
        return
    classes = looked_at()
    before = _here.handler
    _put(classes)
    try:
        _here.handler = handler
        yield
    finally:
        _here.handler = before
        _take_away(classes)


def looked_at() -> list[type]:
    """The classes whose calls are seen: Flax's batch normalization and dropout, our layers, and recognized classes."""
    from flax import nnx

    own = sys.modules.get("flaxbn.layers.nnx")
    recognized = [cls for cls in recognized_classes() if issubclass(cls, nnx.Module) and "__call__" in vars(cls)]
    return [*dict.fromkeys([nnx.BatchNorm, nnx.Dropout, *([] if own is None else [own.BatchNorm]), *recognized])]


def _put(classes: list[type]) -> None:
    with _lock:
        for cls in classes:
            if cls not in _stand_ins:
                original = cls.__call__
                _stand_ins[cls] = _StandIn(_stand_in(cls, original), original)
                cls.__call__ = _stand_ins[cls].function  # type: ignore[method-assign]
            _stand_ins[cls].looks += 1


def _take_away(classes: list[type]) -> None:
    with _lock:
        for cls in classes:
            _stand_ins[cls].looks -= 1
            if not _stand_ins[cls].looks:
                cls.__call__ = _stand_ins.pop(cls).original  # type: ignore[method-assign]


def _stand_in(cls: type, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        handler = _here.handler
        if handler is None:
            return function(layer, *args, **kwargs)
        _here.handler = None
        try:
            return handler(cls, function, layer, args, kwargs)
        finally:
            _here.handler = handler

    return call
