"""Normalization by given statistics, and the running average of statistics.

Where the statistics come from, a batch or a running average, is not seen here: both are constants of one formula.
"""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Inexact

from flaxbn.arithmetic.moments import widen


def normalize(
    x: Inexact[Array, "..."],
    mean: Inexact[Array, "..."],
    var: Float[Array, "..."],
    *,
    scale: Array | None = None,
    bias: Array | None = None,
    epsilon: float,
    residual: Array | None = None,
    spread: Callable[[Array], Array] = lambda statistics: statistics,
) -> Inexact[Array, "..."]:
    """Normalizes `x` by `mean` and `var`: `(x - mean) / sqrt(var + epsilon) * scale + bias`.

    Evaluated as one multiply-add, `(x - p) * a + b` with `a = scale / sqrt(var + epsilon)` and `b = bias - (mean - p)
    * a`, where the pivot `p` is the mean taken as a constant. The subtraction comes first, so the output and all
    gradients stay accurate however large `|mean|` is against the standard deviation, where the plain fold `x * a +
    (bias - mean * a)` cancels.

    Args:
        x: the values.
        mean, var: the statistics, of the rank of `x`, each axis equal to that of `x` or 1.
        scale, bias: the affine parameters, shaped likewise; None stands for 1 and 0.
        epsilon: what is added to the variance, in the unit of `var`.
        residual: what rounding left out of `mean`, shaped likewise: the exact mean is `mean + residual`. It then is the
            only path of gradients to the mean.
        spread: shapes what is computed from the statistics to broadcast against `x`, where they do not by themselves.

    Returns:
        An array of the shape of `x`, float32 or wider: the caller casts.

    Examples:
        >>> import flaxbn, jax.numpy as jnp
        >>> x = jnp.array([1e4 - 1, 1e4 + 1])
        >>> mean, var = jnp.array([1e4]), jnp.array([1.0])
        >>> flaxbn.normalize(x, mean, var, scale=jnp.array([3.0]), epsilon=0.0).tolist()
        [-3.0, 3.0]
    """
    factor = jax.lax.rsqrt(var + epsilon)
    factor = factor if scale is None else factor * scale
    pivot = jax.lax.stop_gradient(mean)
    rest = mean - pivot if residual is None else residual
    offset = -rest * factor if bias is None else bias - rest * factor
    return (x.astype(widen(x.dtype)) - spread(pivot)) * spread(factor) + spread(offset)


def ema(old: Array, new: Array, momentum: float) -> Array:
    """The running average after one update: `momentum * old + (1 - momentum) * new`.

    `momentum` is the weight of the old value, as in Flax (PyTorch's `momentum` is one minus it). After `n` updates the
    initial value still weighs `momentum ** n`: at 0.99 a third after 110 updates, 5 % after 300.

    Args:
        old: the average so far.
        new: the statistics of this batch, of the shape of `old`.
        momentum: in [0, 1].

    Examples:
        >>> import flaxbn, jax.numpy as jnp
        >>> flaxbn.ema(jnp.array([0.0, 1.0]), jnp.array([8.0, 1.0]), momentum=0.75).tolist()
        [2.0, 1.0]
    """
    return momentum * old + (1 - momentum) * new
