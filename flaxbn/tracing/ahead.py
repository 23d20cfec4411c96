"""What a program computes of its first arguments alone: once before a loop, in place of once in each of its steps.

A network in half precision casts its weights wherever it uses them, and XLA leaves that inside of loops.
"""

from collections.abc import Callable, Iterable
from typing import Any

from jax.extend import core as jex
from jaxtyping import Array

from flaxbn.tracing.jaxpr import as_function, is_variable
from flaxbn.tracing.kinds import has_tap
from flaxbn.tracing.program import Program

_MANY_BYTES = 2**12  # what makes less is fused with what reads it, and costs nothing where it is


def computed_ahead(program: Program, fixed: int) -> tuple[Callable[..., list[Array]], Program]:
    """Takes what depends on the first arguments alone out of a program.

    Only what does not take more memory than it is made from: it is held for as long as the loop runs.

    Args:
        program: the program, which closes over nothing.
        fixed: how many arguments stay the same.

    Returns:
        A function of these arguments; and the program that takes what that returns, and then all of its arguments.
    """
    jaxpr = program.jaxpr
    given = jaxpr.invars[:fixed]
    known = set(given)
    ahead, later = [], []
    for eqn in jaxpr.eqns:
        read = {v for v in eqn.invars if is_variable(v)}
        is_fixed = read and known.issuperset(read) and not eqn.effects and not has_tap(eqn)
        if is_fixed and _MANY_BYTES <= _bytes(eqn.outvars) <= _bytes(read):  # what is made of nothing may be no array
            ahead.append(eqn)
            known.update(eqn.outvars)
        else:
            later.append(eqn)
    needed = {v for eqn in later for v in eqn.invars if is_variable(v)}.union(filter(is_variable, jaxpr.outvars))
    kept = [v for eqn in ahead for v in eqn.outvars if v in needed]
    rest = jex.Jaxpr(
        constvars=jaxpr.constvars,
        invars=[*kept, *jaxpr.invars],
        outvars=jaxpr.outvars,
        eqns=later,
        effects=jaxpr.effects,
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    return as_function(ahead, list(given), kept, jaxpr.debug_info), Program(rest, program.consts)


def _bytes(variables: Iterable[Any]) -> int:
    return sum(v.aval.size * v.aval.dtype.itemsize for v in variables)
