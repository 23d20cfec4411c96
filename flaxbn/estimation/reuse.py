"""Which compiled passes are used again: those that do the same, whoever the model is that they were made for.

A model, `call` and `sample_weight` that can be frozen are known by their snapshot. What cannot be frozen is traced, and
its pass is found by the traced program, in which numbers count by value; arrays are arguments.
"""

from collections.abc import Callable, Hashable
from typing import Any, Generic, NamedTuple, TypeVar

import jax

from flaxbn.estimation.calls import Closed, Form, LayerCalls, as_traced, find_calls
from flaxbn.estimation.compiled import Layout, PassOptions, Shapes
from flaxbn.estimation.recent import Recent
from flaxbn.estimation.recompiled import note_compiled
from flaxbn.models.places import Path
from flaxbn.models.snapshot import NotFrozenError, snapshot
from flaxbn.models.unseen import note
from flaxbn.tracing.jaxpr import Hashed

_PROGRAMS = 32  # compiled ones, each up to tens of MB for a deep model
_SNAPSHOTS = 64  # more than one may lead to a program
_CLOSED_BYTES = 2**20  # of the arrays that are held with a snapshot; what closes over more is traced again

P = TypeVar("P")


class _Known(NamedTuple):
    """What a snapshot leads to: the key of a program, the arrays that are its arguments, and what no tap stands for."""

    program: Hashed
    closed: list[Closed]
    unseen: tuple[Path, ...]


_by_snapshot: Recent[_Known] = Recent(_SNAPSHOTS)
_by_program: Recent[Any] = Recent(_PROGRAMS)


class Compiled(Generic[P]):
    """The passes of one estimate.

    Args:
        make: makes a pass from traced calls, one for each of the shapes, and a layout. It holds nothing else.
        options: what is estimated.
        form: the form in which the passes take a program.
    """

    def __init__(self, make: Callable[[list[LayerCalls], Layout], P], options: PassOptions, form: Form = as_traced):
        self._make = make
        self._options = options
        self._form = form
        self._found: Recent[tuple[P, list[Closed]]] = Recent(_SNAPSHOTS)

    def find(self, *shapes: Shapes) -> tuple[P, list[Closed]]:
        """The pass for these shapes, and for each of them the arrays that are its arguments.

        What takes part in the model without a tap is noted, for a warning.
        """
        return self._found.get(shapes) or self._found.put(shapes, self._look_up(shapes))

    def _look_up(self, shapes: tuple[Shapes, ...]) -> tuple[P, list[Closed]]:
        options = self._options
        context = self._make, options.layout, options.tracing, jax.sharding.get_abstract_mesh()
        frozen = self._snapshot((context, shapes))
        known = None if frozen is None else _by_snapshot.get(frozen)
        found = None if known is None else _by_program.get(known.program)
        if known is not None and found is not None:
            note(known.unseen)
            return found, known.closed
        traced = [find_calls(options, one, self._form) for one in shapes]
        calls, closed = [calls for calls, _ in traced], [closed for _, closed in traced]
        unseen = tuple(dict.fromkeys(path for one in calls for path in one.unseen))
        note(unseen)
        arrays = tuple([one.of_arrays() for one in shapes])
        program = Hashed((context, arrays, tuple([one.key() for one in calls])))
        found = _by_program.get(program)
        if found is None:
            note_compiled(self._make, options, arrays)
            found = _by_program.put(program, self._make(calls, options.layout))
        if frozen is not None and sum(a.nbytes for a in jax.tree.leaves(closed)) <= _CLOSED_BYTES:
            _by_snapshot.put(frozen, _Known(program, closed, unseen))
        return found, closed

    def _snapshot(self, context: Hashable) -> Hashed | None:
        """The key of all that decides what is traced; None where that cannot be frozen."""
        options = self._options
        try:
            return Hashed(
                (context, options.wanted, options.read, snapshot((options.model, options.call, options.sample_weight)))
            )
        except NotFrozenError:
            return None
