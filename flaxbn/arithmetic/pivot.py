"""Mean and variance from sums about a pivot.

Every variance of the library is computed in this file, by one formula. About any pivot `p`,

    mean = p + E[x - p]
    var  = E[|x - p|^2] - |E[x - p]|^2

With `p` the rounded mean this is the corrected two-pass algorithm (Chan, Golub & LeVeque 1983); with a value near the
mean, such as the mean of a sample, nearly as good, in one pass; with `p = 0` it is the form `E[x^2] - E[x]^2`, which
cancels; and with Moments in the place of single values, `E[var]` added, it is the law of total variance, by which
Moments merge.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def rounded_mean(first: Array, count: Array) -> Array:
    """A pivot near `first / count`: a constant, rounded to fewer digits than its dtype has.

    A division that XLA contracts with the subtractions that follow would be rounded in some of them and not in others,
    and the deviations would be from different pivots. This rounding cannot be contracted.
    """
    if is_on_host(first):
        return first / _divisor(count)
    pivot = jax.lax.stop_gradient(first / _divisor(count))
    kept = jnp.finfo(pivot.dtype)
    if jnp.iscomplexobj(pivot):
        parts = (jax.lax.reduce_precision(part, kept.nexp, kept.nmant - 1) for part in (pivot.real, pivot.imag))
        return jax.lax.complex(*parts)
    return jax.lax.reduce_precision(pivot, kept.nexp, kept.nmant - 1)


def mean_and_var(count: Array, first: Array, second: Array) -> tuple[Any, Any]:
    """`E[x - p]` and the variance of `x`.

    Args:
        count: the sum of the weights.
        first: the weighted sum of `x - p`.
        second: that of `|x - p|^2`, the variance of each `x` added where it has one.

    Returns:
        Both 0 where `count` is 0.
    """
    divisor = _divisor(count)
    mean = first / divisor
    var = second / divisor - abs2(mean)
    if is_on_host(var):
        return mean, np.maximum(var, 0)
    # Rounding errors below 0 become 0 without a kink: the derivative at 0 stays that of `var`.
    return mean, var - jax.lax.stop_gradient(jnp.minimum(var, 0))


_LOST = 4.0  # five parts of the mean square are summed where one is left: rounding shows five times larger, up to 2e-6


def about_zero_or_mean(
    x: Array, spread: Callable[[Array], Array], sums: Callable[..., tuple[Array, ...]]
) -> tuple[Array, tuple[Array, ...]]:
    """A pivot, and the sums of weights, deviations and squares about it: 0 where no channel loses by that.

    Sums of `x` itself are taken without making an array of deviations. Where they overflow, or some `mean^2` is more
    than four times the variance, `x` is read again, about the mean. Under `jax.vmap` it always would be.

    Args:
        x: the values, real.
        spread: shapes a pivot to broadcast against them.
        sums: gives the sum of the weights, and that of each of its arguments.
    """
    found = sums(x, abs2(x))
    count, first, second = found
    pivot = rounded_mean(first, count).astype(x.dtype)
    mean, var = mean_and_var(count, first, second)
    is_enough = jnp.all(jnp.isfinite(second) & (abs2(mean) <= _LOST * var))

    def about_mean() -> tuple[Array, tuple[Array, ...]]:
        center = jnp.where(jnp.isfinite(pivot), pivot, 0)
        # Deviations that both sums take would be an array, for which there is room even where this is not run.
        apart = jax.lax.optimization_barrier(center)
        return center, sums(x - spread(center), abs2(x - spread(apart)))

    return jax.lax.cond(is_enough, lambda: (jnp.zeros_like(pivot), found), about_mean)


def abs2(x: Any) -> Any:
    """`|x|^2`, real."""
    square = np.square if is_on_host(x) else jnp.square
    return square(x.real) + square(x.imag) if np.iscomplexobj(x) else square(x)


def is_on_host(value: Any) -> bool:
    """Whether a value is a numpy array or a plain number: what is computed of it stays in numpy, in its precision."""
    return isinstance(value, np.ndarray | np.generic | int | float | complex)


def _divisor(count: Array) -> Array:
    return (np if is_on_host(count) else jnp).where(count > 0, count, 1)
