"""How much an equation computes, estimated from shapes: to weigh parts of one program against each other."""

import math
from typing import Any

from flaxbn.jaxprs import opened, subjaxprs


def work(eqn: Any) -> float:
    """Floating-point operations: those of a product or a convolution, or one for each element read or written."""
    inner = [sum(map(work, opened(jaxpr).eqns)) for jaxpr in subjaxprs(eqn)]
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
