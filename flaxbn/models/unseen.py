"""What a model keeps in `batch_stats` that no tap stands for: layers of classes that nobody made known.

Their statistics cannot be chosen from outside: they are used as they are stored or, where such a layer is in training
mode, not at all. Nobody sees that in the output, so that they are named.
"""

import contextlib
import os
import sys
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import numpy as np

from flaxbn.layers.names import layer_name
from flaxbn.models.entries import Reading, float_shapes, known_leaves
from flaxbn.models.leaves import dict_names, leaf_shapes, named_leaves
from flaxbn.models.places import Path
from flaxbn.tracing.jaxpr import with_outputs
from flaxbn.tracing.kinds import tap_equations
from flaxbn.tracing.known import UNKNOWN, read_by_taps
from flaxbn.tracing.program import Program
from flaxbn.tracing.reach import Reach

WAYS_FORWARD = (
    "Where you can edit the class, let what it evaluates by go through `flaxbn.mark`; where you cannot, make it known "
    "by `flaxbn.recognize(cls, ...)`, or, if it is no batch normalization, by `flaxbn.recognize(cls, None)`."
)


class Unseen(NamedTuple):
    """Leaves of `batch_stats` that could be statistics, by their paths.

    Attributes:
        reached: those that reach an output other than through a tap.
        written: those that the call writes, and that no tap reads.
    """

    reached: tuple[Path, ...]
    written: tuple[Path, ...]


def unseen(
    program: Program, written: Mapping[Path, Any], variables: Mapping[str, Any], other_leaves: int, reading: Reading
) -> Unseen:
    """Follows the leaves of `batch_stats` through a traced model.

    Args:
        program: the traced model, whose arguments are the leaves of `variables`, then `other_leaves` more.
        written: for each leaf that may be another one after the call, the variable that it then is.
        variables: those that were traced.
        other_leaves: how many arguments follow.
        reading: what the taps of the program read.
    """
    shapes = float_shapes(variables.get("batch_stats", {}))
    paths = [dict_names(path) for path, _ in jax.tree_util.tree_flatten_with_path(variables)[0]]
    is_float = [path[:1] == ("batch_stats",) and path[1:] in shapes for path in paths]
    marks = [frozenset([path[1:]]) if is_one else frozenset() for path, is_one in zip(paths, is_float)]
    taps = zip(tap_equations(program.jaxpr), reading.entries)
    leaking = {id(eqn) for eqn, entries in taps if entries is None}
    reach = Reach(program.jaxpr, [*marks, *[frozenset()] * other_leaves], leaking)
    reached = frozenset[Path]().union(*reach.outputs) - reach.owned
    known = reach.owned | _read(reading)
    suspects = [path for path in written if path in shapes and path not in known]
    changed = _changed(program, {path: written[path] for path in suspects}, variables, shapes, other_leaves)
    return Unseen(tuple(path for path in shapes if path in reached), tuple(path for path in shapes if path in changed))


def leaves_unseen(
    program: Program,
    written: Mapping[Path, Any],
    variables: Mapping[str, Any],
    other_leaves: int,
    reading: Reading,
    wanted: Container[Path],
) -> tuple[Path, ...]:
    """All of these, but for those of layers that are not wanted, and so are to stay as they are."""
    found = unseen(program, written, variables, other_leaves, reading)
    left_out = {place for path, pair in reading.layers.places.items() if path not in wanted for place in pair}
    return tuple(path for path in dict.fromkeys((*found.reached, *found.written)) if path not in left_out)


def initial_holders(batch_stats: Any, leaves: Iterable[Path]) -> list[Path]:
    """What holds a mean of 0 and a variance of 1 among these leaves, as `init` makes them, whatever they are called.

    Where leading axes are those of domains, or of layers in a loop, it is enough that one row is such.
    """
    stored = named_leaves(batch_stats)
    rows = {path: np.atleast_2d(np.asarray(stored[path])) for path in leaves if np.ndim(stored[path])}
    zeros = {(path[:-1], a.shape): np.zeros(a.shape[:-1], bool) for path, a in rows.items()}
    ones = {key: none.copy() for key, none in zeros.items()}
    for path, a in rows.items():
        zeros[path[:-1], a.shape] |= np.all(a == 0, -1)
        ones[path[:-1], a.shape] |= np.all(a == 1, -1)
    return list(dict.fromkeys(key[0] for key in zeros if np.any(zeros[key] & ones[key])))


def _read(reading: Reading) -> set[Path]:
    """The leaves that taps read."""
    seen = [np.ravel(entries) for entries in reading.entries if entries is not None]
    numbers = np.unique(np.concatenate(seen)) if seen else np.zeros(0, int)
    layers = reading.layers
    return {
        place
        for path, entries in layers.entries.items()
        if np.isin(entries, numbers).any()
        for place in layers.places[path]
    }


def _changed(
    program: Program,
    written: Mapping[Path, Any],
    variables: Mapping[str, Any],
    shapes: Mapping[Path, tuple[int, ...]],
    other_leaves: int,
) -> set[Path]:
    """Which of these leaves come out otherwise than they went in: transformations hand unchanged ones through."""
    if not written:
        return set()
    numbers = {path: np.arange(1, 1 + int(np.prod(shape))).reshape(shape) for path, shape in shapes.items()}
    after = Program(with_outputs(program.jaxpr, list(written.values())), program.consts)
    given = known_leaves(variables, numbers, other_leaves)
    with jax.ensure_compile_time_eval():
        found, _ = read_by_taps(after, given)
    before = dict(zip((dict_names(p)[1:] for p, _ in jax.tree_util.tree_flatten_with_path(variables)[0]), given))
    same = (value is not UNKNOWN and np.array_equal(value, before[path]) for path, value in zip(written, found))
    return {path for path, is_same in zip(written, same) if not is_same}


def what_is_held(variables: Mapping[str, Any]) -> str:
    """What `batch_stats` holds, in words, and how layers are made known."""
    held = named_holders(leaf_shapes(variables.get("batch_stats", {})))
    return f"`batch_stats` holds {held}. {WAYS_FORWARD}" if held else "`batch_stats` holds nothing."


def named_holders(leaves: Iterable[Path]) -> str:
    """Leaves in words: what holds them, and how they are called there."""
    held: dict[Path, list[str]] = {}
    for path in leaves:
        held.setdefault(path[:-1], []).append(repr("".join(path[-1:])))
    return ", ".join(f"'{layer_name(path)}' ({', '.join(names)})" for path, names in held.items())


_noted: ContextVar[dict[Path, None] | None] = ContextVar("noted", default=None)


@contextlib.contextmanager
def one_warning() -> Iterator[None]:
    """What is noted meanwhile becomes one warning at its end, that of the outermost; an error takes its place."""
    if _noted.get() is not None:
        yield
        return
    noted: dict[Path, None] = {}
    token = _noted.set(noted)
    try:
        yield
    finally:
        _noted.reset(token)
    if noted:
        warnings.warn(
            "Statistics must be read by batch-norm layers that flaxbn knows, to be chosen, estimated or checked. Those "
            f"in {named_holders(noted)} take part without: they are used as they are stored, or computed from the "
            f"batch and updated. {WAYS_FORWARD}",
            stacklevel=frames_within() + 1,
        )


def frames_within() -> int:
    """How many frames, from the caller's on, belong to this package, or to the context managers that it uses."""
    package = os.path.dirname(os.path.dirname(__file__))
    frame, count = sys._getframe(1), 0
    while frame.f_back is not None and frame.f_code.co_filename.startswith((package, contextlib.__file__)):
        frame, count = frame.f_back, count + 1
    return count


def note(found: Iterable[Path]) -> None:
    """Leaves that no tap stands for, for the warning of what is under way."""
    noted = _noted.get()
    if noted is not None:
        noted |= dict.fromkeys(found)
