"""Moments of values: one measurement for the public `measure`, for the layers and for the estimator."""

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from flaxbn.arithmetic.groups import Sharing, check_weights
from flaxbn.arithmetic.moments import Moments, shifted, widen
from flaxbn.arithmetic.pivot import abs2, mean_and_var, rounded_mean


def measure(
    x: Inexact[Array, "..."],
    axes: Sequence[int],
    *,
    weights: Array | None = None,
    fast: bool = False,
    dtype: Any = None,
) -> Moments:
    """The Moments of `x` over `axes`; `merge` merges Moments that exist already.

    Args:
        x: the values, real, complex or integer.
        axes: the axes to reduce; the other axes are the channels.
        weights: bool or real, of the rank of `x`, each axis equal to that of `x` or 1. A position whose weight is
            not positive takes no part: its value may be NaN or infinite, and its gradient is 0.
        fast: use the one-pass form, with the variance clipped at 0. In float32 it loses the variance from
            `|mean| / std` of about 1e3 on.
        dtype: the dtype to compute in; by default float32, or wider if `x` is wider.

    Returns:
        Moments of the shape of `x` without `axes`.

    Raises:
        ValueError: if `axes` lie outside the rank of `x`; if `weights` has another rank than `x` or an axis that is
            neither 1 nor that of `x`.

    Examples:
        >>> import flaxbn, jax.numpy as jnp
        >>> x = jnp.array([[1.0, 10.0], [3.0, 10.0], [jnp.nan, jnp.nan]])
        >>> moments = flaxbn.measure(x, axes=[0], weights=jnp.array([[1.0], [1.0], [0.0]]))
        >>> moments.mean.tolist(), moments.var.tolist()
        ([2.0, 10.0], [1.0, 0.0])
    """
    if any(not -x.ndim <= axis < x.ndim for axis in axes):
        raise ValueError(f"`axes` must lie within the rank of the values: got {tuple(axes)} for shape {x.shape}.")
    sharing = Sharing(tuple(sorted(axis % x.ndim for axis in axes)))
    pivot, deviations = measure_deviations(x, sharing, weights=weights, fast=fast, dtype=dtype)
    return shifted(deviations, pivot)


def measure_deviations(
    x: Inexact[Array, "..."],
    sharing: Sharing,
    *,
    weights: Array | None = None,
    fast: bool = False,
    dtype: Any = None,
    axis_name: Hashable = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> tuple[Array, Moments]:
    """`measure` before rounding: a constant `pivot` and the Moments of `x - pivot`.

    The mean of `x` is `pivot + moments.mean`, a sum whose second term is lost to rounding where `|mean|` is large
    against the standard deviation; `normalize` takes both terms and loses nothing. `shifted` adds them.

    Args:
        x: the values, real, complex or integer.
        sharing: which of them share statistics.
        weights, fast, dtype: as in `measure`.
        axis_name, axis_index_groups: the values are those of all members, as in `merge_across`; two `psum`s.

    Returns:
        The pivot and the Moments, float32 or wider, of the shape that `sharing` gives statistics.
    """
    inexact = dtype is not None and jnp.issubdtype(dtype, jnp.inexact)
    x = x.astype(dtype if inexact else widen(x.dtype))
    real = x.real.dtype
    if weights is None:
        weights = jnp.ones((1,) * x.ndim, real)
    else:
        check_weights(weights, x.shape)
        taken = weights > 0
        x = jnp.where(taken, x, 0)
        weights = jnp.where(taken, weights, 0).astype(real)

    def across(values: Any) -> Any:
        if axis_name is None:
            return values
        return jax.lax.psum(values, axis_name, axis_index_groups=axis_index_groups)

    count = sharing.count(weights, x.shape)
    if fast:
        count = across(count)
        pivot = jnp.zeros(count.shape, x.dtype)
    else:
        count, first = across((count, sharing.total(weights * x)))
        pivot = rounded_mean(first, count).astype(x.dtype)
    deviation = x - sharing.spread(pivot)
    first, second = across(sharing.total((weights * deviation, weights * abs2(deviation))))
    mean, var = mean_and_var(count, first, second)
    wide = widen(x.dtype)
    return pivot.astype(wide), Moments(count, mean.astype(wide), var.astype(widen(real)))
