"""Moments of values: one measurement for the public `measure`, for the layers and for the estimator."""

import math
from collections.abc import Hashable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Inexact

from flaxbn.arithmetic import blocks
from flaxbn.arithmetic.groups import Sharing, check_weights
from flaxbn.arithmetic.moments import Moments, shifted, widen
from flaxbn.arithmetic.pivot import about_zero_or_mean, abs2, mean_and_var, rounded_mean

SUMS = "flaxbn_sums"
"""The name, for policies of `jax.checkpoint`, of what a measurement has summed, one value for each channel."""

# Fewer values than these are in the cache when they are read again. Of 256 positions a sample has 16, whose mean is off
# by a quarter of a standard deviation if they are independent.
_MANY_VALUES = 2**16
_MANY_POSITIONS = 256
_FEW_POSITIONS = 32  # in one of many lanes: two in a sample, off by less than three standard deviations in 30 000
_HALVINGS = 4  # 1/16: reading a sample costs next to nothing beside reading all

Platform = Literal["cpu", "accelerator"]
"""Where something is measured that is not differentiated, and by which sums it is the fastest."""


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
    return measure_deviations(x, sharing, weights=weights, fast=fast, dtype=dtype).moments


class Measured(NamedTuple):
    """What is measured, before it is rounded: the mean of `x` is `pivot + deviations.mean`.

    That is a sum whose second term is lost to rounding where `|mean|` is large against the standard deviation;
    `normalize` takes both terms and loses nothing.

    Attributes:
        pivot: a constant to differentiation.
        deviations: the Moments of `x - pivot`.
        largest: the largest weight of one position, 1 without weights. All have one shape.
        overflow: whether sums are infinite. Then the variance is, and the mean means nothing; gradients are 0.
    """

    pivot: Array
    deviations: Moments
    largest: Array
    overflow: Array

    @property
    def moments(self) -> Moments:
        """The Moments of `x`, rounded; NaN as a mean where sums overflow."""
        return shifted(self.deviations, jnp.where(self.overflow, jnp.nan, self.pivot))

    @property
    def several(self) -> Array:
        """Whether more than one value counts: one alone weighs as much as all, to the last digit."""
        return self.largest < self.deviations.count


def measure_deviations(
    x: Inexact[Array, "..."],
    sharing: Sharing,
    *,
    weights: Array | None = None,
    fast: bool = False,
    dtype: Any = None,
    axis_name: Hashable = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    lanes: int = 1,
    on: Platform | None = None,
) -> Measured:
    """`measure` before rounding, of any positions that share statistics, those of other members included.

    The pivot is the mean of a `sample`, so that `x` is read once, or on a CPU 0, see `about_zero_or_mean`. With weights
    or domains, of which a sample may hold nothing, it is the mean of all, which takes a pass of its own. Where sums
    overflow the variance is infinite.

    Args:
        x: the values, real, complex or integer.
        sharing: which of them share statistics.
        weights, fast, dtype: as in `measure`.
        axis_name, axis_index_groups: the values are those of all members, as in `merge_across`; two `psum`s, and with
            weights that are no bools a `pmax`.
        lanes: how many arrays are measured at once, where `jax.vmap` maps this over others like `x`.
        on: measure as is best there, by other sums: on an accelerator in fewer kernels; on a CPU about 0, where that
            keeps the variance good to 2e-6. Of complex values, with weights or domains it is the same. It is not for
            differentiation.

    Returns:
        float32 or wider, of the shape that `sharing` gives statistics.
    """
    inexact = dtype is not None and jnp.issubdtype(dtype, jnp.inexact)
    x = x.astype(dtype if inexact else widen(x.dtype))
    real = jnp.finfo(x.dtype).dtype
    counted = _in_units(weights, x.shape, real, sharing, axis_name, axis_index_groups)
    x = x if weights is None else jnp.where(weights > 0, x, 0)
    is_plain = weights is None and sharing.domain is None and not jnp.iscomplexobj(x)

    def sums(*values: Array) -> tuple[Array, ...]:
        """The sum of the weights, and that of each of the values, over all members."""
        weighted = [v if weights is None else counted.weights * v for v in values]
        total = blocks.sums(weighted, sharing.axes) if is_plain and on == "accelerator" else sharing.total(weighted)
        found = sharing.count(counted.weights, values[0].shape), *total
        if axis_name is not None:
            found = jax.lax.psum(found, axis_name, axis_index_groups=axis_index_groups)
        return tuple(map(_kept, found))

    if on == "cpu" and is_plain and not fast and axis_name is None and x.size >= _MANY_VALUES:
        pivot, (count, first, second) = about_zero_or_mean(x, sharing.spread, sums)
    else:
        pivot, deviation = jnp.zeros((), x.dtype), x
        if not fast:
            whole = weights is not None or sharing.domain is not None
            count, first = sums(jax.lax.stop_gradient(x if whole else sample(x, sharing.axes, lanes)))
            pivot = rounded_mean(first, count).astype(x.dtype)
            pivot = _kept(jnp.where(jnp.isfinite(pivot), pivot, 0))
            deviation = x - sharing.spread(pivot)
            if weights is not None:
                deviation = jnp.where(weights > 0, deviation, 0)  # the square of what is hidden may be infinite
        count, first, second = sums(deviation, abs2(deviation))
    count = count + jnp.zeros_like(second)  # split over devices as the channels are, where axes are Explicit
    overflow = second == jnp.inf  # squares are the first to overflow; of NaN they are NaN
    mean, var = mean_and_var(count, jnp.where(overflow, 0, first), second)
    wide, count = widen(x.dtype), count * counted.unit
    moments = Moments(count, mean.astype(wide), var.astype(widen(real)))
    pivot, largest = (jnp.broadcast_to(a, count.shape) for a in (pivot, counted.largest))
    return Measured(pivot.astype(wide), moments, largest.astype(count.dtype), overflow)


class _Weights(NamedTuple):
    """Weights in a unit of their own, in which no sum of them overflows, nor one of values that they are multiplied by.

    Attributes:
        weights: of the rank of the values, in units.
        unit: powers of two, shaped to broadcast against statistics.
        largest: the largest weight, likewise.
    """

    weights: Array
    unit: Array
    largest: Array


def _in_units(
    weights: Array | None,
    shape: tuple[int, ...],
    real: Any,
    sharing: Sharing,
    axis_name: Hashable,
    axis_index_groups: Sequence[Sequence[int]] | None,
) -> _Weights:
    """Weights, those that are not positive 0, divided by their largest and by the number of values, as powers of two.

    Bools need no largest. Half precision would lose what is divided by many. Where the largest is infinite, the count
    is NaN.
    """
    if weights is None:
        return _Weights(jnp.ones((1,) * len(shape), real), jnp.ones((), real), jnp.ones((), real))
    check_weights(weights, shape)
    positions = math.prod(shape[axis] for axis in sharing.axes)
    many = 2.0 ** math.ceil(math.log2(max(positions, 1))) if real.itemsize > 2 else 1.0
    if weights.dtype == bool:
        return _Weights(jnp.where(weights, jnp.asarray(1 / many, real), 0), jnp.asarray(many, real), jnp.ones((), real))
    weights = jnp.where(weights > 0, weights, 0).astype(real)
    largest = sharing.largest(jax.lax.stop_gradient(weights), shape)
    if axis_name is not None:
        largest = jax.lax.pmax(largest, axis_name, axis_index_groups=axis_index_groups)
    largest = checkpoint_name(largest, SUMS)
    power = jax.lax.reduce_precision(largest / 4, jnp.finfo(real).nexp, 0)
    # The unit and its inverse are normal numbers; of an infinite weight it stays infinite.
    most = 2.0 ** (jnp.finfo(real).maxexp - 2) / many
    power = jnp.where(jnp.isfinite(power), jnp.minimum(power, most), power)
    power = jnp.where(power > 0, power, 1)
    own = sharing.spread(power)
    own = jnp.where(own > 0, own, 1)  # there is none for a domain out of range
    units = jnp.where(jnp.isfinite(own), weights / own, 0) * jnp.asarray(1 / many, real)
    return _Weights(units, power * many, largest)


def sample(x: Array, axes: Sequence[int], lanes: int = 1) -> Array:
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
        lanes: how many arrays like `x` there are. Of many, each may be small: in all they are not in the cache when
            they are read again.
    """
    positions = math.prod(x.shape[axis] for axis in axes)
    spec = jax.typeof(x).sharding.spec
    free = [axis for axis in axes if axis >= len(spec) or spec[axis] is None]
    if not free or lanes * x.size < _MANY_VALUES or positions < (_MANY_POSITIONS if lanes == 1 else _FEW_POSITIONS):
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
