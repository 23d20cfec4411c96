"""Functions of batches, compiled, where batches may hold names."""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import jax
from jaxtyping import Array

from flaxbn.data.samples import Static, hide, show
from flaxbn.tracing.closed import as_arguments, with_own_constants
from flaxbn.tracing.jaxpr import Hashed, structure
from flaxbn.tracing.measure import stored_statistics
from flaxbn.tracing.program import Program


def compiled(function: Callable[[Any], Sequence[Array]]) -> Callable[[Any], Sequence[Array]]:
    """`jax.jit` of a function of a batch, which may hold names.

    Names are part of what is traced, so that a batch with names of its own is traced by itself; but as long as they
    change nothing in the traced program, it is compiled once.

    Args:
        function: returns a sequence of arrays.
    """
    jitted = jax.jit(lambda batch: function(show(batch)))
    programs: dict[Hashable, Callable[..., Any]] = {}

    def run(batch: Any) -> Sequence[Array]:
        hidden = hide(batch)
        arrays, held = jax.tree.flatten(hidden)
        if not _holds_static(hidden):
            return jitted(hidden)
        closed = jax.make_jaxpr(lambda arrays: function(show(jax.tree.unflatten(held, arrays))))(arrays)
        program, constants = as_arguments(with_own_constants(Program(closed.jaxpr, closed.consts), arrays))
        jaxpr = program.jaxpr
        avals = tuple([v.aval for v in jaxpr.invars])
        key = Hashed((avals, structure(jaxpr.invars, jaxpr.eqns, jaxpr.outvars)))
        found = programs.setdefault(key, jax.jit(partial(program.run, on_tap=stored_statistics)))
        return found([*constants, *arrays])[0]

    return run


def _holds_static(batch: Any) -> bool:
    nodes = jax.tree.leaves(batch, is_leaf=lambda node: isinstance(node, Static))
    return any(isinstance(node, Static) for node in nodes)
