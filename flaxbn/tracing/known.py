"""A program read without its data: what some arguments alone determine.

With the numbers of stored entries for known arguments, and images and parameters unknown, what reaches a tap's `mean`
tells which entries its layer reads: through slices, loops and vmap, and without knowing the layer.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import jax
import numpy as np

from flaxbn.tracing.jaxpr import evaluate, interpret
from flaxbn.tracing.kinds import can_be_opened, has_tap, kind_of
from flaxbn.tracing.primitive import tap_p
from flaxbn.tracing.program import Program, run_steps

_TYPE_CHANGES = ("pvary", "pcast")  # within jax.shard_map: identities


class _Unknown:
    """A value that the known arguments do not determine."""


UNKNOWN = _Unknown()


def read_by_taps(program: Program, args: Sequence[Any], operand: int = 1) -> tuple[list[Any], list[Any]]:
    """What reaches the `mean` of each tap, or another operand, where only some arguments are known.

    Computes what the known arguments determine and nothing else, one output of an equation by itself: Flax hands all
    collections through the `jit` or `remat` of a method, a layer's statistics too where the layer is not inside. All
    branches of a `cond` are read.

    Args:
        program: the program; those of its constants that are traced are unknown.
        args: its arguments, arrays or `UNKNOWN`.
        operand: which one of a tap; 1 is the mean, 2 the variance.

    Returns:
        The outputs and the operands, or `UNKNOWN`, stacked as the records of `Program.run` are.
    """
    read: list[Any] = []

    def step(eqn: Any, values: list[Any]) -> Sequence[Any]:
        unknown = sum(v is UNKNOWN for v in values)
        if eqn.primitive is tap_p:
            read.append(values[operand])
        elif has_tap(eqn) or (can_be_opened(eqn) and 0 < unknown < len(values)):
            outputs, found = _read_inside(program, eqn, values, operand)
            read.extend(found)
            return outputs
        elif eqn.primitive.name in _TYPE_CHANGES:
            return values
        elif not eqn.effects and not unknown:
            return evaluate(eqn, values, program.jaxpr.debug_info)
        return [UNKNOWN] * len(eqn.outvars)

    consts = [UNKNOWN if isinstance(c, jax.core.Tracer) else c for c in program.consts]
    return interpret(program.jaxpr, consts, args, step), read


def _read_inside(program: Program, eqn: Any, values: list[Any], operand: int) -> tuple[list[Any], list[Any]]:
    """The outputs of an equation with taps inside, and the operands of these."""
    programs = program.inner(eqn)
    kind = kind_of(eqn)
    if kind == "cond":
        return _read_cond(programs, values, operand)
    if kind == "scan":
        return _read_scan(eqn, programs[0], values, operand)
    return read_by_taps(programs[0], values, operand)


def _read_cond(programs: list[Program], values: list[Any], operand: int) -> tuple[list[Any], list[Any]]:
    """All branches, one after the other, as records of a `cond` are; what decides between them need not be known."""
    _, *operands = values
    outputs, read = zip(*(read_by_taps(p, operands, operand) for p in programs))
    return [_agreed(values) for values in zip(*outputs)], [*chain.from_iterable(read)]


def _agreed(values: Sequence[Any]) -> Any:
    """What all branches return, which is known whatever decides between them."""
    if any(v is UNKNOWN for v in values):
        return UNKNOWN
    return values[0] if all(np.array_equal(values[0], v) for v in values[1:]) else UNKNOWN


def _read_scan(eqn: Any, program: Program, values: list[Any], operand: int) -> tuple[list[Any], list[Any]]:
    """Each step for itself, since each may read entries of its own, of which some may be unknown."""

    def run(values: list[Any]) -> list[Any]:
        outputs, read = read_by_taps(program, values, operand)
        return [*outputs, *read]

    carry, others = run_steps(eqn, program, values, lambda x, i: x if x is UNKNOWN else x[i], run)
    stacked = [_stacked(column) for column in zip(*others)]
    scanned = len(eqn.outvars) - len(carry)
    return [*carry, *stacked[:scanned]], stacked[scanned:]


def _stacked(steps: Sequence[Any]) -> Any:
    return UNKNOWN if any(a is UNKNOWN for a in steps) else np.stack(steps)
