"""The arrays that a program closes over, as its arguments: what is compiled then holds none, and serves others."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core as jex

from flaxbn.tracing.jaxpr import evaluate, interpret, opened, subjaxprs
from flaxbn.tracing.kinds import is_open
from flaxbn.tracing.program import Program


def with_own_constants(program: Program, args: Sequence[Any]) -> Program:
    """The program, with functions inside opened where they hold arrays: these become its own constants.

    Such functions are compiled ones, and those with rules of differentiation, which get lost. Arrays that functions
    inside of loops and branches hold stay where they are.

    Args:
        program: the program.
        args: its arguments, or their shapes and dtypes.
    """
    if not _holds_arrays(program.jaxpr):
        return program
    closed = jax.make_jaxpr(lambda *args: _run(program.jaxpr, program.consts, args))(*args)
    return Program(closed.jaxpr, closed.consts)


def as_arguments(program: Program) -> tuple[Program, list[Any]]:
    """The program that takes its constants as its first arguments, and these."""
    jaxpr = program.jaxpr
    taking = jex.Jaxpr(
        constvars=[],
        invars=[*jaxpr.constvars, *jaxpr.invars],
        outvars=jaxpr.outvars,
        eqns=jaxpr.eqns,
        effects=jaxpr.effects,
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    return Program(taking, []), program.consts


def _run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Runs a program under a trace, which so records it with such functions opened."""

    def step(eqn: Any, values: list[Any]) -> Sequence[Any]:
        if is_open(eqn) and _is_holding(eqn):
            (inner,) = subjaxprs(eqn)
            return _run(opened(inner), getattr(inner, "consts", ()), values)
        return evaluate(eqn, values, jaxpr.debug_info)

    return interpret(jaxpr, consts, args, step)


def _holds_arrays(jaxpr: Any) -> bool:
    return any(is_open(eqn) and _is_holding(eqn) for eqn in jaxpr.eqns)


def _is_holding(eqn: Any) -> bool:
    """Whether arrays are held by the program inside an equation, or by its rules, which close over what that takes."""
    inner = subjaxprs(eqn)
    by_rules = "call_jaxpr" in eqn.params and eqn.params.get("num_consts", 0) > 0
    return by_rules or any(getattr(one, "consts", ()) or _holds_arrays(opened(one)) for one in inner)
