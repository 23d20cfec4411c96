"""Moments of values: one measurement for the public `measure`, for the layers and for the estimator."""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Inexact

from flaxbn.arithmetic.groups import Sharing, check_weights
from flaxbn.arithmetic.moments import Moments, shifted, widen
from flaxbn.arithmetic.pivot import abs2, mean_and_var, rounded_mean

SUMS = "flaxbn_sums"
"""The name, for policies of `jax.checkpoint`, of what a measurement has summed, one value for each channel."""

# Fewer values than these are in the cache when they are read again. Of 256 positions a sample has 16, whose mean is off
# by a quarter of a standard deviation if they are independent.
_MANY_VALUES = 2**16
_MANY_POSITIONS = 256
_HALVINGS = 4  # 1/16: reading a sample costs next to nothing beside reading all


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
        fast: use `E[x^2] - E[x]^2`, clipped at 0. In float32 it loses the variance from `|mean| / std` of about 1e3
            on.
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

    The pivot is the mean of a `sample`, so that `x` is read once. With weights or domains, of which a sample may hold
    nothing, it is the mean of all, which takes a pass of its own.

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
    real = jnp.finfo(x.dtype).dtype
    if weights is not None:
        check_weights(weights, x.shape)
        taken = weights > 0
        x = jnp.where(taken, x, 0)
        weights = jnp.where(taken, weights, 0).astype(real)

    def sums(*values: Array) -> tuple[Array, ...]:
        """The sum of the weights, and that of each of the values, over all members."""
        counted = jnp.ones((1,) * x.ndim, real) if weights is None else weights
        weighted = [v if weights is None else weights * v for v in values]
        found = sharing.count(counted, values[0].shape), *sharing.total(weighted)
        if axis_name is not None:
            found = jax.lax.psum(found, axis_name, axis_index_groups=axis_index_groups)
        return tuple(map(_kept, found))

    pivot, deviation = jnp.zeros((), x.dtype), x
    if not fast:
        whole = weights is not None or sharing.domain is not None
        count, first = sums(jax.lax.stop_gradient(x if whole else sample(x, sharing.axes)))
        pivot = _kept(rounded_mean(first, count).astype(x.dtype))
        deviation = x - sharing.spread(pivot)
    count, first, second = sums(deviation, abs2(deviation))
    count = count + jnp.zeros_like(second)  # split over devices as the channels are, where axes are Explicit
    mean, var = mean_and_var(count, first, second)
    wide = widen(x.dtype)
    return jnp.broadcast_to(pivot, count.shape).astype(wide), Moments(count, mean.astype(wide), var.astype(widen(real)))


def sample(x: Array, axes: Sequence[int]) -> Array:
    """One position in 16 along `axes`, on a lattice; all of `x` where there are few, or where devices split them.

    The mean of a share f of the positions is off that of all by at most `sqrt((1 - f) / f)` standard deviations,
    whatever the data, so a variance about it loses at most the factor `1 / f` of its digits' precision.

    Of the leading axis whole examples are taken, which are read fastest, but only as far as the lattice fits into equal
    pieces for all devices: if the axis is split over them, which jax does not tell before it compiles (Auto axes), each
    then samples what it has. Where it does tell (Explicit axes), an axis that is split is taken whole, since a lattice
    that does not fit would be an error.

    Args:
        x: the values.
        axes: the axes that statistics are sums over, not negative.
    """
    spec = jax.typeof(x).sharding.spec
    free = [axis for axis in axes if axis >= len(spec) or spec[axis] is None]
    if not free or x.size < _MANY_VALUES or math.prod(x.shape[axis] for axis in axes) < _MANY_POSITIONS:
        return x
    strides = [1] * x.ndim
    for _ in range(_HALVINGS):
        fits = 0 in free and x.shape[0] % (2 * strides[0] * jax.device_count()) == 0
        inner = [axis for axis in free if axis and strides[axis] < x.shape[axis]]
        widest = max(inner or free, key=lambda axis: x.shape[axis] / strides[axis])
        strides[0 if fits else widest] *= 2
    return x[tuple(slice(None, None, stride) for stride in strides)]


def _kept(v: Array) -> Array:
    """A value under the name `SUMS`; in two parts where it is complex, since `jax.checkpoint` rounds what it saves."""
    if jnp.iscomplexobj(v):
        return jax.lax.complex(checkpoint_name(v.real, SUMS), checkpoint_name(v.imag, SUMS))
    return checkpoint_name(v, SUMS)
