"""A program with every call of every layer on top level: what encloses layers is opened, loops are unrolled."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flaxbn.tracing.jaxpr import evaluate, read
from flaxbn.tracing.primitive import tap_p
from flaxbn.tracing.program import Program, has_tap, kind_of, scan_operands

_MOST_CALLS = 512
_MOST_KNOWN = 4096


def unroll(program: Program, args: Sequence[Any]) -> Program:
    """The program, flat; `args` are its arguments, or their shapes and dtypes.

    Its outputs are left out. A `cond` around a layer must be decided by constants, the number of a loop's step for
    example, and there may be at most 512 calls.
    """
    calls: list[str] = []

    def run(*args: Any) -> None:
        _run(program, args, calls)

    closed = jax.make_jaxpr(run)(*args)
    return Program(closed.jaxpr, closed.consts)


def _run(program: Program, args: Sequence[Any], calls: list[str]) -> list[Any]:
    jaxpr = program.jaxpr
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*program.consts, *args)))
    for eqn in jaxpr.eqns:
        values = [read(env, v) for v in eqn.invars]
        if eqn.primitive is tap_p:
            _count(eqn.params["layer"], calls)
            outputs = tap_p.bind(*values, **eqn.params)
        elif has_tap(eqn):
            outputs = _run_inside(program, eqn, values, calls)
        elif _is_known(eqn, values):
            with jax.ensure_compile_time_eval():
                outputs = evaluate(eqn, values, jaxpr.debug_info)
        else:
            outputs = evaluate(eqn, values, jaxpr.debug_info)
        env.update(zip(eqn.outvars, outputs))
    return [read(env, v) for v in jaxpr.outvars]


def _run_inside(program: Program, eqn: Any, values: list[Any], calls: list[str]) -> list[Any]:
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
    consts, carry, xs = scan_operands(eqn, inner, values)
    steps = range(eqn.params["length"])
    ys: dict[int, list[Any]] = {}
    for i in reversed(steps) if eqn.params["reverse"] else steps:
        outputs = _run(inner, [*consts, *carry, *(_element(x, i) for x in xs)], calls)
        carry, ys[i] = outputs[: len(carry)], outputs[len(carry) :]
    return [*carry, *(jnp.stack(column) for column in zip(*(ys[i] for i in steps)))]


def _element(x: Any, i: int) -> Any:
    if isinstance(x, jax.core.Tracer):
        return jax.lax.index_in_dim(x, i, keepdims=False)
    with jax.ensure_compile_time_eval():
        return x[i]


def _count(layer: str, calls: list[str]) -> None:
    calls.append(layer)
    if len(calls) > _MOST_CALLS:
        raise ValueError(
            f"Exact statistics must run each call of a layer by itself, and at most {_MOST_CALLS} calls: {layer} is "
            f'called {calls.count(layer)} times so far. Use method="precise", which keeps loops.'
        )


def _is_known(eqn: Any, values: Sequence[Any]) -> bool:
    """Whether an equation is a small computation on constants, one that a `cond` could be decided by."""
    small = sum(v.aval.size for v in eqn.outvars) <= _MOST_KNOWN
    return small and not eqn.effects and not any(isinstance(v, jax.core.Tracer) for v in values)
