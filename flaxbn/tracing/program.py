"""A traced evaluation, interpreted: what its taps let through is decided from outside.

Equations with taps inside are opened, as far as their kind allows; the equations between them run as one function.
What a reader records at each tap comes back in the order of the program, whatever encloses the tap.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from flaxbn.tracing.jaxpr import as_function, interpret, is_variable, opened, subjaxprs
from flaxbn.tracing.kinds import has_tap, kind_of, scan_operands, tap_equations
from flaxbn.tracing.primitive import OnTap, as_tap, tap_p


class Program:
    """A traced evaluation, in pieces: runs of plain equations, and single equations with taps inside.

    Attributes:
        jaxpr: its equations.
        consts: the values of `jaxpr.constvars`, arrays that the model closes over.
        pieces: the equations, with those between two taps put together.
    """

    def __init__(self, jaxpr: Any, consts: Sequence[Any]) -> None:
        self.jaxpr = jaxpr
        self.consts = list(consts)
        self.pieces = list(_pieces(jaxpr))
        self._inner: dict[int, Program] = {}

    def tap_inputs(self) -> list[Any]:
        """The shape and dtype of the input of each tap, in the order of the program."""
        return [e.invars[0].aval for e in tap_equations(self.jaxpr)]

    def layer_names(self) -> list[str]:
        """The layer of each tap, in the order of the program."""
        return [e.params["layer"] for e in tap_equations(self.jaxpr)]

    def channel_ranks(self) -> list[int]:
        """How many trailing axes of the statistics of each tap are channels, in the order of the program."""
        return [e.params["channel_rank"] for e in tap_equations(self.jaxpr)]

    def run(self, args: Sequence[Any], on_tap: OnTap, site: int = 0) -> tuple[list[Any], list[Any]]:
        """Interprets the program: its outputs, and the record of each tap in the order of the program.

        Args:
            args: the values of its arguments, traced ones too.
            on_tap: what decides by which statistics each tap normalizes.
            site: the number of the first tap; a tap inside a scan has one number for all steps.

        Returns:
            The outputs, and the records. Inside a scan records are stacked along a leading axis, one for each step; in
            a branch of a `cond` that is not taken they are zeros.
        """
        records: list[Any] = []

        def step(piece: Any, values: list[Any]) -> Sequence[Any]:
            if isinstance(piece, _Plain):
                return piece.function(*values)
            outputs, found = self._run_tapped(piece, values, on_tap, site + len(records))
            records.extend(found)
            return outputs

        return interpret(self.jaxpr, self.consts, args, step, self.pieces), records

    def _run_tapped(self, eqn: Any, values: list[Any], on_tap: OnTap, site: int) -> tuple[list[Any], list[Any]]:
        """The outputs of a tap, or of an equation with taps inside, and their records."""
        if eqn.primitive is tap_p:
            mean, var, record = on_tap(as_tap(eqn.params, values, site))
            return [_of_type(a, v.aval) for a, v in zip((mean, var), eqn.outvars)], [record]
        programs = self.inner(eqn)
        kind = kind_of(eqn)
        if kind == "cond":
            return _run_cond(programs, values, on_tap, site)
        if kind == "scan":
            return _run_scan(eqn, programs[0], values, on_tap, site)
        if kind == "remat":
            return _run_remat(eqn, programs[0], values, on_tap, site)
        outputs, records = programs[0].run(values, on_tap, site)
        if kind == "custom":
            outputs = [_without_gradient(a, eqn.primitive.name) for a in outputs]
        return outputs, records

    def inner(self, eqn: Any) -> list["Program"]:
        """The programs inside an equation: one, or the branches of a `cond`; each is taken into pieces once."""
        jaxprs = subjaxprs(eqn)
        for jaxpr in jaxprs:
            if id(jaxpr) not in self._inner:
                self._inner[id(jaxpr)] = Program(opened(jaxpr), getattr(jaxpr, "consts", ()))
        return [self._inner[id(jaxpr)] for jaxpr in jaxprs]


def _of_type(a: Any, aval: Any) -> Array:
    """`a` in the dtype of `aval`, varying over the mapped axes that it varies over.

    A reader may return float64 or what all devices share; the equations that follow were traced for one type.
    """
    missing = tuple(sorted(_varying(aval) - _varying(jax.typeof(a))))
    a = a.astype(aval.dtype)
    return jax.lax.pcast(a, missing, to="varying") if missing else a


def _varying(aval: Any) -> frozenset[Any]:
    """The mapped axes of `jax.shard_map` over which a type varies."""
    return frozenset(aval.mat.varying)


class _Plain(NamedTuple):
    """A run of equations without taps, as one function; to `interpret` it is a piece like an equation."""

    function: Callable[..., Any]
    invars: list[Any]
    outvars: list[Any]


def _pieces(jaxpr: Any) -> Iterator[Any]:
    """The plain runs of equations and the equations with taps, in order.

    A run hands on only what is read after it. One function for each run keeps the interpreter's own work to a few steps
    a layer, and lets XLA fuse across its equations.
    """
    last_use = {v: i for i, e in enumerate(jaxpr.eqns) for v in e.invars if is_variable(v)}
    last_use |= {v: len(jaxpr.eqns) for v in jaxpr.outvars if is_variable(v)}
    tapped = [i for i, e in enumerate(jaxpr.eqns) if has_tap(e)]
    begin = 0
    for end in (*tapped, len(jaxpr.eqns)):
        eqns = jaxpr.eqns[begin:end]
        if eqns:
            made = dict.fromkeys(v for e in eqns for v in e.outvars)
            read = dict.fromkeys(v for e in eqns for v in e.invars if is_variable(v) and v not in made)
            kept = [v for v in made if last_use.get(v, -1) >= end]
            yield _Plain(as_function(eqns, list(read), kept, jaxpr.debug_info), list(read), kept)
        if end < len(jaxpr.eqns):
            yield jaxpr.eqns[end]
        begin = end + 1


def _run_cond(programs: list[Program], values: list[Any], on_tap: OnTap, site: int) -> tuple[list[Any], list[Any]]:
    """A `cond` whose branches return the records of all of them, those of the others being zeros.

    Branches must return the same types whichever is taken; a count of 0 is what Moments of no values have.
    """
    index, *operands = values
    sites = [site + sum(len(p.layer_names()) for p in programs[:i]) for i in range(len(programs))]

    def run(i: int, *operands: Any) -> tuple[list[Any], list[Any]]:
        return programs[i].run(operands, on_tap, sites[i])

    shapes = [jax.eval_shape(lambda *a, i=i: run(i, *a)[1], *operands) for i in range(len(programs))]

    def branch(i: int, *operands: Any) -> tuple[list[Any], list[Any]]:
        outputs, found = run(i, *operands)
        records = [jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), others) for others in shapes]
        records[i] = found
        return outputs, [*chain.from_iterable(records)]

    return jax.lax.switch(index, [partial(branch, i) for i in range(len(programs))], *operands)


def _run_scan(eqn: Any, program: Program, values: list[Any], on_tap: OnTap, site: int) -> tuple[list[Any], list[Any]]:
    """A scan that stays one, and stacks the records of its steps like its other outputs."""
    consts, carry, xs = scan_operands(eqn, program.jaxpr, values)

    def body(carry: list[Any], xs: list[Any]) -> Any:
        outputs, records = program.run([*consts, *carry, *xs], on_tap, site)
        return outputs[: len(carry)], (outputs[len(carry) :], records)

    length, reverse = eqn.params["length"], eqn.params["reverse"]
    carry, (ys, records) = jax.lax.scan(body, carry, xs, length=length, reverse=reverse, unroll=eqn.params["unroll"])
    return [*carry, *ys], records


def run_steps(
    eqn: Any,
    program: Program,
    values: list[Any],
    element: Callable[[Any, int], Any],
    run: Callable[[list[Any]], list[Any]],
) -> tuple[list[Any], list[list[Any]]]:
    """Runs a scan step by step, for readers that must look at each.

    Args:
        eqn: the scan.
        program: the program inside.
        values: the operands of the equation.
        element: from a scanned operand and the number of a step, what the step takes of it.
        run: runs the program inside; it may append to its outputs.

    Returns:
        The carries after the last step, and for each step, in the order of the scanned operands, its other outputs.
    """
    consts, carry, xs = scan_operands(eqn, program.jaxpr, values)
    steps = range(eqn.params["length"])
    others: dict[int, list[Any]] = {}
    for i in reversed(steps) if eqn.params["reverse"] else steps:
        outputs = run([*consts, *carry, *(element(x, i) for x in xs)])
        carry, others[i] = outputs[: len(carry)], outputs[len(carry) :]
    return carry, [others[i] for i in steps]


def _run_remat(eqn: Any, program: Program, values: list[Any], on_tap: OnTap, site: int) -> tuple[list[Any], list[Any]]:
    """A checkpoint that stays one, so that a gradient taken of the interpreted program saves memory as before."""

    def run(*values: Any) -> tuple[list[Any], list[Any]]:
        return program.run(values, on_tap, site)

    return jax.checkpoint(run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])(*values)


def _without_gradient(x: Array, rule: str) -> Array:
    """`x`, whose differentiation is an error: a rule of the model's own around a batch-norm layer would be lost."""

    @jax.custom_jvp
    def identity(x: Array) -> Array:
        return x

    @identity.defjvp
    def differentiate(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            f"A batch-norm layer lies inside a function with a differentiation rule of its own (`{rule}`), which is "
            "lost where statistics are chosen from outside: its gradient is not available."
        )

    return identity(x)
