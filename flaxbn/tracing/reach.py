"""Which arguments of a program its outputs depend on, other than through taps.

A set of marks lies on each argument, and goes with every value that is computed from it. A tap lets none through: what
comes out of it is chosen from outside. Loops are followed until nothing is added.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from flaxbn.tracing.jaxpr import interpret, opened, subjaxprs
from flaxbn.tracing.kinds import can_be_opened, scan_operands
from flaxbn.tracing.primitive import owned_p, tap_p

Marks = frozenset[Any]
_NONE: Marks = frozenset()


class Reach:
    """The marks that reach the outputs of a program, and the equations that say whose they are.

    Args:
        jaxpr: the program.
        marks: those of its arguments; constants have none.
        leaking: taps, by the `id` of their equations, that let marks through all the same.

    Attributes:
        outputs: the marks of each output.
        owned: those that reach `owned_p`.
    """

    def __init__(self, jaxpr: Any, marks: Sequence[Marks], leaking: Collection[int]) -> None:
        self._leaking = leaking
        self.owned: set[Any] = set()
        self.outputs = self._run(jaxpr, marks)

    def _run(self, jaxpr: Any, marks: Sequence[Marks]) -> list[Marks]:
        jaxpr = opened(jaxpr)
        constants = len(jaxpr.constvars) + len(jaxpr.invars) - len(marks)  # some versions have them among `invars`
        found = interpret(jaxpr, [_NONE] * constants, marks, self._step)
        return [marks if isinstance(marks, frozenset) else _NONE for marks in found]

    def _step(self, eqn: Any, values: list[Any]) -> Sequence[Marks]:
        marks = [value if isinstance(value, frozenset) else _NONE for value in values]  # literals have none
        everything = _NONE.union(*marks)
        if eqn.primitive is tap_p:
            return [everything if id(eqn) in self._leaking else _NONE] * len(eqn.outvars)
        if eqn.primitive is owned_p:
            self.owned |= everything
        if not everything or not subjaxprs(eqn):
            return [everything] * len(eqn.outvars)
        return self._inside(eqn, marks)

    def _inside(self, eqn: Any, marks: list[Marks]) -> Sequence[Marks]:
        """What comes out of an equation with programs inside."""
        inner, name = subjaxprs(eqn), eqn.primitive.name
        if name == "cond":
            index, *operands = marks
            branches = [self._run(branch, operands) for branch in inner]
            return [index.union(*found) for found in zip(*branches)]
        if name == "while":
            return self._while(eqn, marks)
        if name == "scan":
            return self._scan(eqn, inner[0], marks)
        if can_be_opened(eqn) or name == "shard_map":
            return self._run(inner[0], marks)
        return [_NONE.union(*marks)] * len(eqn.outvars)

    def _scan(self, eqn: Any, inner: Any, marks: list[Marks]) -> Sequence[Marks]:
        """A loop, whose carries come first among its outputs."""
        consts, carry, xs = scan_operands(eqn, opened(inner), marks)
        carries = len(carry)
        outputs: list[Marks] = []

        def step(carry: list[Marks]) -> list[Marks]:
            outputs[:] = self._run(inner, [*consts, *carry, *xs])
            return outputs[:carries]

        carry = _settled(step, carry)
        return [*carry, *outputs[carries:]]

    def _while(self, eqn: Any, marks: list[Marks]) -> Sequence[Marks]:
        """A loop whose length depends on what its condition reads, and so all that comes out."""
        ahead, behind = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        asked, consts, carry = marks[:ahead], marks[ahead : ahead + behind], marks[ahead + behind :]
        carry = _settled(lambda carry: self._run(eqn.params["body_jaxpr"], [*consts, *carry]), carry)
        (decides,) = self._run(eqn.params["cond_jaxpr"], [*asked, *carry])
        return [decides | found for found in carry]


def _settled(step: Callable[[list[Marks]], list[Marks]], carry: list[Marks]) -> list[Marks]:
    """What a loop carries once another step adds nothing."""
    while True:
        found = [before | after for before, after in zip(carry, step(carry))]
        if found == carry:
            return carry
        carry = found
