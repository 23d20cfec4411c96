"""Functions of the user that are run on a batch, and what is said where one cannot be."""

import contextlib
import dis
import re
import sys
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

from flaxbn.data.described import described

_FRAMEWORKS = {"jax", "jaxlib", "flax", "numpy", "optax", "chex", *sys.stdlib_module_names}
_LONGEST = 300
"""So many characters of another message are quoted: it stands whole behind ours."""
BEHIND = "What was raised stands whole above this message."


class CallError(TypeError, ValueError):
    """A function of the user, `call` say, cannot run on the batch that it was given: what was received, and what helps.

    It takes the place of what jax, Flax, numpy and Python raise inside of such a function and of the model, which is
    its `__cause__`. What the user's own code raises, by `raise` or `assert`, keeps its class, so that it can be caught,
    and gets a note about the batch.

    Examples:
        >>> import flax.linen as nn, flaxbn, jax, numpy as np
        >>> model, x = nn.Dense(2), np.ones((4, 3), np.float32)
        >>> variables = model.init(jax.random.key(0), x)
        >>> try:
        ...     flaxbn.apply(model, variables, {"image": x, "label": np.arange(4)})
        ... except flaxbn.CallError as error:
        ...     print(str(error).splitlines()[-1])
          call=lambda module, batch: module(batch["image"])
    """

    __module__ = "flaxbn"


def explained_anew(error: CallError) -> CallError:
    """The same error without the frames that it came through, and without what jax notes about those."""
    anew = CallError(str(error))
    for note in getattr(error, "__notes__", ()):
        if "JAX has removed its internal frames" not in note:
            anew.add_note(note)
    return anew


@contextlib.contextmanager
def explained(must: str, given: Callable[[], str], cure: Callable[[Exception], str]) -> Iterator[None]:
    """What frameworks raise inside becomes a `CallError`; the user's own errors pass, with what was given as a note.

    Errors of this package pass as they are, since they say themselves what helps.

    Args:
        must: what must hold, and what did not, as the beginning of a sentence that goes on with "raised".
        given: describes what the function was given.
        cure: what to do about an error.
    """
    try:
        yield
    except Exception as error:
        package = _raised_by(error.__traceback__)
        if package == "flaxbn":
            raise
        if package is not None and package not in _FRAMEWORKS:
            error.add_note(given())
            raise
        raise CallError(f"{must} raised\n  {_quoted(error)}\n{given()}\n{cure(error)}") from error


def run_explained(name: str, wanted: str, function: Callable[..., Any], **given: Any) -> Any:
    """`function(*given)`, a function of the user other than `call`, whose errors are explained.

    Args:
        name: what the argument is called.
        wanted: what the function takes and gives.
        function: the function.
        **given: what it is given, by names for the message.
    """

    def received() -> str:
        return "\n".join(["It was given", *(described(value, key) for key, value in given.items())])

    with explained(f"`{name}` must be {wanted}; it", received, lambda _: BEHIND):
        return function(*given.values())


def _raised_by(trace: TracebackType | None) -> str | None:
    """The package whose code raised, by `raise` or `assert`; None where Python did, for a missing argument say.

    The innermost frame tells: what its last instruction was, and whose module it belongs to.
    """
    if trace is None:
        return None
    while trace.tb_next is not None:
        trace = trace.tb_next
    frame: FrameType = trace.tb_frame
    raises = frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] if raises else None


def _quoted(error: Exception) -> str:
    """The class and the first line of an error, without the link that Flax adds."""
    text = re.sub(r" \(https?://\S+\)$", "", (str(error).splitlines() or [""])[0])
    return f"{type(error).__name__}: {text if len(text) <= _LONGEST else text[:_LONGEST] + ' ...'}"
