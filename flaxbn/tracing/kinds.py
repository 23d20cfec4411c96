"""What an equation of a traced program is: how it is run, and whether taps lie inside."""

from collections.abc import Iterator, Sequence
from typing import Any

from flaxbn.tracing.jaxpr import opened, subjaxprs
from flaxbn.tracing.primitive import tap_p

_KINDS = {
    "jit": "inline",
    "pjit": "inline",
    "closed_call": "inline",
    "core_call": "inline",
    "checkpoint": "remat",
    "remat": "remat",
    "remat2": "remat",
    "custom_jvp_call": "custom",
    "custom_vjp_call": "custom",
    "custom_vjp_call_jaxpr": "custom",
    "scan": "scan",
    "cond": "cond",
}


def kind_of(eqn: Any) -> str:
    """How to run an equation with taps inside.

    Returns:
        "inline": its program stands for it; "remat" and "custom", which matter to gradients; "scan"; or "cond".

    Raises:
        ValueError: if it is none of these, a `while` loop for example, which keeps no record of its steps.
    """
    name = eqn.primitive.name
    if name not in _KINDS:
        inside = next(e for j in subjaxprs(eqn) for e in tap_equations(opened(j)))
        raise ValueError(
            f"A batch-norm layer must not lie inside `{name}`, where its statistics cannot be chosen from outside: "
            f"got {inside.params['layer']}. Use `nn.scan` or `nnx.scan` in the place of a `while` loop, and call the "
            "model outside of `shard_map`."
        )
    return _KINDS[name]


def can_be_opened(eqn: Any) -> bool:
    """Whether an equation is one whose inside can be run by itself, as `kind_of` tells how."""
    return eqn.primitive.name in _KINDS


def is_open(eqn: Any) -> bool:
    """Whether the program inside an equation can stand for it, where no gradient is taken."""
    return _KINDS.get(eqn.primitive.name) in ("inline", "custom")


def asks_host(jaxpr: Any) -> bool:
    """Whether a program calls a function of the host, as `jax.pure_callback` and `jax.debug.print` do."""
    names = (eqn.primitive.name for eqn in jaxpr.eqns)
    if any("callback" in name or name.startswith("debug_") for name in names):
        return True
    return any(asks_host(opened(inner)) for eqn in jaxpr.eqns for inner in subjaxprs(eqn))


def scan_operands(eqn: Any, inner: Any, values: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Constants, carries and scanned inputs, told apart by rank: the parameters' names differ between jax versions.

    A scanned operand has an axis more than what a step takes of it, and an output that is stacked one more than what a
    step returns.

    Args:
        eqn: the scan.
        inner: the program of a step, without its constants.
        values: what the scan is given.
    """
    carries = sum(out.aval.ndim == v.aval.ndim for out, v in zip(eqn.outvars, inner.outvars))
    scanned = sum(v.aval.ndim > i.aval.ndim for v, i in zip(eqn.invars, inner.invars))
    begin = len(values) - scanned - carries
    values = list(values)
    return values[:begin], values[begin : begin + carries], values[begin + carries :]


def tap_equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of the primitive, in order, wherever they lie: that order is how sites are numbered."""
    for eqn in jaxpr.eqns:
        if eqn.primitive is tap_p:
            yield eqn
        for inner in subjaxprs(eqn):
            yield from tap_equations(opened(inner))


def has_tap(eqn: Any) -> bool:
    """Whether an equation is a tap or has one inside."""
    return eqn.primitive is tap_p or any(True for j in subjaxprs(eqn) for _ in tap_equations(opened(j)))
