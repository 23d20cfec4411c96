"""Traced programs of jax, taken apart and put together through its public names."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.extend import core as jex


def as_function(eqns: Sequence[Any], invars: list[Any], outvars: list[Any], debug_info: Any) -> Callable[..., Any]:
    """A run of equations as a function of `invars` that returns `outvars`."""
    jaxpr = jex.Jaxpr(
        constvars=[],
        invars=invars,
        outvars=outvars,
        eqns=list(eqns),
        effects=set().union(*(e.effects for e in eqns)),
        debug_info=debug_info.with_unknown_names(),
    )
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, []))


def evaluate(eqn: Any, values: Sequence[Any], debug_info: Any) -> list[Any]:
    """The outputs of one equation, whose primitive takes parameters that differ between versions of jax."""
    given = {v: a for v, a in zip(eqn.invars, values) if is_variable(v)}
    return as_function([eqn], list(given), list(eqn.outvars), debug_info)(*given.values())


def subjaxprs(eqn: Any) -> list[Any]:
    """The jaxprs among the parameters of an equation."""
    values = (v for p in eqn.params.values() for v in (p if isinstance(p, tuple | list) else (p,)))
    return [v for v in values if hasattr(opened(v), "eqns")]


def opened(jaxpr: Any) -> Any:
    """A jaxpr without its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def is_variable(v: Any) -> bool:
    """Whether an operand is a variable, and no literal."""
    return not isinstance(v, jex.Literal)


def read(env: Mapping[Any, Any], v: Any) -> Any:
    """The value of an operand."""
    return env[v] if is_variable(v) else v.val
