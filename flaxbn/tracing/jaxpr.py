"""Traced programs of jax, taken apart and put together through its public names.

A jaxpr is a list of equations: each reads values of variables, and literals, and defines new variables. Nothing here
knows of taps; what differs between versions of jax is asked of jax itself, or avoided.
"""

import hashlib
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

_CUSTOM_RULES = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
_POLICIES = tuple((name, "policy") for name in ("checkpoint", "remat", "remat2"))
_DIGEST_BYTES = 32  # no two arrays have the same digest of 256 bits


class Same:
    """An object as a key by its identity; it is held, so that no other one takes its place in memory."""

    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held

    def __hash__(self) -> int:
        return id(self.held)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.held is other.held


def as_function(eqns: Sequence[Any], invars: list[Any], outvars: list[Any], debug_info: Any) -> Callable[..., Any]:
    """A run of equations as a function of `invars` that returns `outvars`.

    Args:
        eqns: the equations, in their order.
        invars: the variables that they read and do not define.
        outvars: those of their variables whose values are wanted.
        debug_info: that of the jaxpr from which they are.
    """
    jaxpr = jex.Jaxpr(
        constvars=[],
        invars=invars,
        outvars=outvars,
        eqns=list(eqns),
        effects=set().union(*(e.effects for e in eqns)),
        debug_info=debug_info.with_unknown_names(),
    )
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, []))


def interpret(
    jaxpr: Any,
    consts: Sequence[Any],
    args: Sequence[Any],
    step: Callable[[Any, list[Any]], Sequence[Any]],
    pieces: Sequence[Any] | None = None,
) -> list[Any]:
    """Runs a jaxpr on values of any kind, in its order: arrays, or marks that stand for them.

    Args:
        jaxpr: the program, without its constants.
        consts: a value for each of `jaxpr.constvars`.
        args: one for each of `jaxpr.invars`.
        step: from a piece and the values that it reads, those of its `outvars`.
        pieces: what to take a step for, with `invars` and `outvars`; by default the equations.

    Returns:
        The values of `jaxpr.outvars`.
    """
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args)))
    for piece in jaxpr.eqns if pieces is None else pieces:
        env.update(zip(piece.outvars, step(piece, [_read(env, v) for v in piece.invars])))
    return [_read(env, v) for v in jaxpr.outvars]


def with_outputs(jaxpr: Any, outvars: Sequence[Any]) -> Any:
    """The same program with other variables of it as its outputs."""
    return jex.Jaxpr(
        constvars=jaxpr.constvars,
        invars=jaxpr.invars,
        outvars=list(outvars),
        eqns=jaxpr.eqns,
        effects=jaxpr.effects,
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )


def evaluate(eqn: Any, values: Sequence[Any], debug_info: Any) -> list[Any]:
    """The outputs of one equation on `values`, one for each of its `invars`.

    Binding the primitive would need its parameters, which differ between versions of jax: it is run as a jaxpr.
    """
    given = {v: a for v, a in zip(eqn.invars, values) if is_variable(v)}
    return as_function([eqn], list(given), list(eqn.outvars), debug_info)(*given.values())


def subjaxprs(eqn: Any) -> list[Any]:
    """The jaxprs among the parameters of an equation, whatever these are called."""
    values = (v for p in eqn.params.values() for v in (p if isinstance(p, tuple | list) else (p,)))
    return [v for v in values if hasattr(opened(v), "eqns")]


def opened(jaxpr: Any) -> Any:
    """A jaxpr without its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def is_variable(v: Any) -> bool:
    """Whether an operand is a variable, and no literal."""
    return not isinstance(v, jex.Literal)


def structure(invars: Sequence[Any], eqns: Sequence[Any], outvars: Sequence[Any]) -> Hashable:
    """What two runs of equations have in common that compute the same function, whatever their variables are called.

    Variables are numbered in the order in which they are defined; literals count by value, parameters by `as_key`. Its
    hash is that of a deep tuple: to be taken once, by `Hashed`.
    """
    numbers: dict[Any, int] = {}

    def operand(v: Any) -> Hashable:
        if is_variable(v):
            return numbers[v]
        return content(v.val), v.aval

    def define(variables: Sequence[Any]) -> Hashable:
        numbers.update({v: len(numbers) + i for i, v in enumerate(variables)})
        return tuple(v.aval for v in variables)

    taken = define(invars)
    steps = []
    for eqn in eqns:
        read = tuple(map(operand, eqn.invars))
        steps.append((eqn.primitive, as_key(parameters(eqn)), read, define(eqn.outvars)))
    return taken, tuple(steps), tuple(map(operand, outvars))


def as_key(value: Any) -> Hashable:
    """A parameter of an equation by value where it can be, and by identity where it cannot.

    Numbers count by what they print as, with their type: 0.0 and -0.0 are equal, and make different programs. Arrays
    that a program inside an equation holds count by what they hold.
    """
    jaxpr = opened(value)
    if hasattr(jaxpr, "eqns"):
        consts = tuple([(content(c), jax.typeof(c)) for c in getattr(value, "consts", ())])
        return consts, structure((*jaxpr.constvars, *jaxpr.invars), jaxpr.eqns, jaxpr.outvars)
    if isinstance(value, tuple | list):
        return type(value), tuple(map(as_key, value))
    if isinstance(value, dict):
        return tuple((name, as_key(item)) for name, item in sorted(value.items()))
    try:
        hash(value)
    except TypeError:
        return Same(value)
    is_number = isinstance(value, float | complex | np.generic)  # 0.0 == -0.0
    return type(value), repr(value) if is_number else value


class Hashed:
    """A large key that is hashed once, and compared with itself at once."""

    __slots__ = ("_hash", "_key")

    def __init__(self, key: Hashable) -> None:
        self._key = key
        self._hash = hash(key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hashed) and (self is other or (self._hash == other._hash and self._key == other._key))


def content(array: Any) -> bytes:
    """What an array holds: where that is long a digest of it."""
    if jnp.issubdtype(jax.typeof(array).dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    held = np.asarray(array).tobytes()
    return held if len(held) <= _DIGEST_BYTES else hashlib.blake2b(held, digest_size=_DIGEST_BYTES).digest()


def _read(env: Mapping[Any, Any], v: Any) -> Any:
    return env[v] if is_variable(v) else v.val


def parameters(eqn: Any) -> dict[str, Any]:
    """The parameters that decide the value of an equation; what its differentiation keeps or follows does not."""
    if eqn.primitive.name in _CUSTOM_RULES:
        return {name: p for name, p in eqn.params.items() if hasattr(opened(p), "eqns")}
    return {name: p for name, p in eqn.params.items() if (eqn.primitive.name, name) not in _POLICIES}


def operations(eqn: Any) -> float:
    """Floating-point operations: those of a product or a convolution, or one for each element read or written.

    2 for each multiply-add. An estimate, to tell heavy equations from light ones; of the branches of a `cond` it takes
    the heaviest, and a scan counts its steps.
    """
    inner = [sum(map(operations, opened(jaxpr).eqns)) for jaxpr in subjaxprs(eqn)]
    if inner:
        return float(max(inner) * eqn.params.get("length", 1))
    made = sum(v.aval.size for v in eqn.outvars)
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return float(2 * made * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted))
    if eqn.primitive.name == "conv_general_dilated":
        kernel = eqn.invars[1].aval
        return 2 * made * kernel.size / kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return float(max(made, sum(v.aval.size for v in eqn.invars)))
