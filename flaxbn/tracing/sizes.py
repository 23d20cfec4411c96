"""Whether a program knows how large a batch is, other than by the shapes of what it computes."""

from collections.abc import Hashable
from typing import Any

import numpy as np

from flaxbn.tracing.jaxpr import as_key, content, is_variable, opened, parameters

# Parameters that hold the shape of what an equation makes or takes. What is not listed here counts as a number.
_OF_SHAPES = frozenset({"shape", "new_sizes", "sizes", "slice_sizes", "start_indices", "limit_indices", "out_sharding"})


def beside_shapes(jaxpr: Any) -> Hashable:
    """What a program does, shapes left out: equal for two traces at two batch sizes unless one reads the size.

    A mean over the batch does, for it divides by the number of examples; a convolution does not. The numbers that tell
    are literals, and parameters of equations but those that hold shapes.
    """
    return tuple([_step(eqn) for eqn in jaxpr.eqns])


def _step(eqn: Any) -> Hashable:
    literals = tuple([None if is_variable(v) else content(v.val) for v in eqn.invars])
    params = sorted((name, value) for name, value in parameters(eqn).items() if name not in _OF_SHAPES)
    return eqn.primitive, literals, tuple([(name, _parameter(value)) for name, value in params])


def _parameter(value: Any) -> Hashable:
    jaxpr = opened(value)
    if hasattr(jaxpr, "eqns"):
        consts = tuple([content(c) for c in getattr(value, "consts", ()) if np.ndim(c) == 0])
        return consts, beside_shapes(jaxpr)
    if isinstance(value, tuple | list):
        return tuple(map(_parameter, value))
    return as_key(value)
