"""A program with every call of every layer on top level: what encloses layers is opened, loops are unrolled.

Exact statistics take all data through one call of one layer before the next, so that each call must stand by itself.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flaxbn.tracing.jaxpr import evaluate, interpret
from flaxbn.tracing.kinds import has_tap, kind_of
from flaxbn.tracing.primitive import tap_p
from flaxbn.tracing.program import Program, run_steps

# Each call begins a segment that is compiled by itself, in about 0.1 s: with more, compiling would take minutes.
_MOST_CALLS = 512
# Elements of the results of an equation that is computed while tracing. What decides a `cond` is a few numbers; tables
# and masks that are made of constants are larger, and would become constants of the program.
_MOST_KNOWN = 4096


def unroll(program: Program, args: Sequence[Any]) -> Program:
    """The program, flat, and without outputs.

    Args:
        program: the program.
        args: its arguments, or their shapes and dtypes.

    Raises:
        ValueError: if a `cond` around a layer is not decided by constants, the number of a loop's step for example; if
            there are more than 512 calls; if a layer lies inside an equation that cannot be opened.
    """
    calls: list[str] = []

    def run(*args: Any) -> None:
        _run(program, args, calls)

    closed = jax.make_jaxpr(run)(*args)
    return Program(closed.jaxpr, closed.consts)


def _run(program: Program, args: Sequence[Any], calls: list[str]) -> list[Any]:
    """Runs the program under a trace, which so records it without what encloses taps; `calls` collects the layers."""
    debug_info = program.jaxpr.debug_info

    def step(eqn: Any, values: list[Any]) -> Sequence[Any]:
        if eqn.primitive is tap_p:
            _count(eqn.params["layer"], calls)
            return tap_p.bind(*values, **eqn.params)
        if has_tap(eqn):
            return _run_inside(program, eqn, values, calls)
        if _is_known(eqn, values):
            with jax.ensure_compile_time_eval():
                return evaluate(eqn, values, debug_info)
        return evaluate(eqn, values, debug_info)

    return interpret(program.jaxpr, program.consts, args, step)


def _run_inside(program: Program, eqn: Any, values: list[Any], calls: list[str]) -> list[Any]:
    """An equation with taps inside, opened: the branch that is taken, each step of a loop, or all that it encloses."""
    kind = kind_of(eqn)
    inner = program.inner(eqn)
    if kind == "scan":
        return _run_scan(eqn, inner[0], values, calls)
    if kind == "cond":
        index, *values = values
        if isinstance(index, jax.core.Tracer):
            layer = next(name for p in inner for name in p.layer_names())
            raise ValueError(
                f"{layer} must not lie inside a `cond` that data or variables decide, since exact statistics take all "
                "batches through one layer after the other. Decide in Python, leave the layer out of `call`, or use "
                'method="precise".'
            )
        return _run(inner[int(index)], values, calls)
    return _run(inner[0], values, calls)


def _run_scan(eqn: Any, inner: Program, values: list[Any], calls: list[str]) -> list[Any]:
    """A loop, unrolled; its outputs are stacked as it would stack them."""
    carry, ys = run_steps(eqn, inner, values, _element, lambda values: _run(inner, values, calls))
    return [*carry, *map(jnp.stack, zip(*ys))]


def _element(x: Any, i: int) -> Any:
    """What step `i` takes of a scanned operand: a constant, if that is one, which may decide a `cond`."""
    if isinstance(x, jax.core.Tracer):
        return jax.lax.index_in_dim(x, i, keepdims=False)
    with jax.ensure_compile_time_eval():
        return x[i]


def _count(layer: str, calls: list[str]) -> None:
    """Adds a call of a layer; too many are an error that says of which layer."""
    calls.append(layer)
    if len(calls) > _MOST_CALLS:
        raise ValueError(
            f"Exact statistics must run each call of a layer by itself, and at most {_MOST_CALLS} calls: {layer} is "
            f'called {calls.count(layer)} times so far. Use method="precise", which keeps loops.'
        )


def _is_known(eqn: Any, values: Sequence[Any]) -> bool:
    """Whether an equation is a small computation on constants, one that a `cond` could be decided by.

    Computed while tracing, its results stay constants for the equations after it.
    """
    small = sum(v.aval.size for v in eqn.outvars) <= _MOST_KNOWN
    return small and not eqn.effects and not any(isinstance(v, jax.core.Tracer) for v in values)
