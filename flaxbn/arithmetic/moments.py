"""Weighted mean and variance of arrays, as a monoid.

Every variance of the library is computed in this file, by one formula. About any pivot `p`,

    mean = p + E[x - p]
    var  = E[|x - p|^2] - |E[x - p]|^2

With `p` the rounded mean this is the corrected two-pass algorithm (Chan, Golub & LeVeque 1983); with
`p = 0` it is the one-pass form `E[x^2] - E[x]^2`; and with Moments in the place of single values, `E[var]` added, it
is the law of total variance, by which Moments merge.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from flaxbn.arithmetic.groups import Sharing, check_weights


class Moments(NamedTuple):
    """Count, mean and variance of weighted values, one of each for every channel.

    These three are enough to merge: Moments of parts give those of the whole, exactly and in any order, where the
    variances of parts alone would leave out how far their means lie from each other.

    Attributes:
        count: the sum of the weights; the number of values where they are unweighted.
        mean: `sum(w x) / sum(w)`, in the unit of the values.
        var: `sum(w |x - mean|^2) / sum(w)`, biased (it divides by the count), in that unit squared.

    All have one shape and are float32, or float64 if the values are; `mean` is complex where the values are. Where
    `count` is 0, so are `mean` and `var`: `Moments(0, 0, 0)` is the zero of `merge`.

    Examples:
        >>> import flaxbn, jax.numpy as jnp
        >>> count, mean, var = flaxbn.measure(jnp.array([1.0, 3.0]), axes=[0])
        >>> float(count), float(mean), float(var)
        (2.0, 2.0, 1.0)
    """

    count: Float[Array, "*channels"]  # type: ignore[assignment]  # hides tuple.count
    mean: Inexact[Array, "*channels"]
    var: Float[Array, "*channels"]


def widen(dtype: Any) -> Any:
    """The dtype in which values of `dtype` are computed with: float32, or wider if `dtype` is wider.

    Integers are measured in floats too, and complex values stay complex.
    """
    return jnp.promote_types(dtype, jnp.float32)


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

    def total(values: Any) -> Any:
        return across(sharing.total(values))

    count = sharing.count(weights, x.shape)
    if fast:
        count = across(count)
        pivot = jnp.zeros(count.shape, x.dtype)
    else:
        count, first = across((count, sharing.total(weights * x)))
        pivot = _pivot(first, count).astype(x.dtype)
    moments = _about(sharing.spread(pivot), weights, x, jnp.zeros((), real), count, total)
    wide = widen(x.dtype)
    return pivot.astype(wide), Moments(count, moments.mean.astype(wide), moments.var.astype(widen(real)))


def shifted(moments: Moments, by: Array) -> Moments:
    """The Moments of `x + by`, from those of `x`: a shift moves the mean and nothing else."""
    return moments._replace(mean=by + moments.mean)


def merge(*moments: Any) -> Any:
    """The Moments of all values behind `moments`: exact for any counts, never an average of variances.

    Associative, commutative, with the zero `Moments(0, 0, 0)`. Two Moments merge by the pairwise formula of Chan,
    Golub & LeVeque (1983); `measure` is for values that have no Moments yet.

    Args:
        *moments: Moments of equal shapes (or the scalar zero), or trees of one structure with Moments at the leaves.

    Returns:
        Moments, or a tree of them, like each argument.

    Raises:
        ValueError: if there is nothing to merge, or the shapes differ.

    Examples:
        >>> import flaxbn, jax.numpy as jnp
        >>> parts = [flaxbn.measure(jnp.array(values), axes=[0]) for values in ([0.0, 0.0, 0.0], [4.0])]
        >>> [float(field) for field in flaxbn.merge(*parts)]  # both parts have variance 0
        [4.0, 1.0, 3.0]
    """
    if not moments:
        raise ValueError("`merge` needs at least one Moments, or one tree of them: got none.")
    return jax.tree.map(_merge, *moments, is_leaf=is_moments)


def merge_along(moments: Moments, axis: int = 0) -> Moments:
    """Merges the Moments that lie along an array axis, which the result lacks; `merge_across`, along a mapped axis."""

    def total(values: Any) -> Any:
        return jax.tree.map(lambda v: jnp.sum(v, axis, keepdims=True), values)

    merged = _merge_by(total, moments)
    return Moments(*(jnp.squeeze(field, axis) for field in merged))


def merge_deviations_along(pivots: Array, deviations: Moments) -> Moments:
    """Merges along the leading axis what `measure_deviations` gives: nothing is lost to the rounding of large means.

    The parts' pivots differ by much less than they measure, so their differences are exact, and small.
    """
    count = deviations.count
    common = _pivot(jnp.sum(count * pivots, 0, keepdims=True), jnp.sum(count, 0, keepdims=True))
    return shifted(merge_along(shifted(deviations, pivots - common)), common[0])


def merge_across(
    moments: Moments, axis_name: Hashable, axis_index_groups: Sequence[Sequence[int]] | None = None
) -> Moments:
    """Merges the Moments of all members of a mapped axis, weighted by count; two `psum`s.

    Args:
        moments: those of this member, measured on its own part of the values.
        axis_name: the name of an axis of `jax.pmap`, `jax.vmap` or `jax.shard_map`, or several of them.
        axis_index_groups: merge within these groups of members only.

    Returns:
        The Moments of all values, the same on all members.

    Examples:
        >>> import flaxbn, jax, jax.numpy as jnp
        >>> def mean(x):
        ...     return flaxbn.merge_across(flaxbn.measure(x, axes=[0]), "devices").mean
        >>> jax.vmap(mean, axis_name="devices")(jnp.array([[0.0, 2.0], [4.0, 6.0]])).tolist()
        [3.0, 3.0]
    """

    def total(values: Any) -> Any:
        return jax.lax.psum(values, axis_name, axis_index_groups=axis_index_groups)

    return _merge_by(total, moments)


def merge_segments(moments: Moments, segments: Array, num_segments: int) -> Moments:
    """Merges those of the Moments along axis 0 that have the same number, in [0, num_segments), in `segments`."""

    def total(values: Any) -> Any:
        return jax.tree.map(lambda v: jax.ops.segment_sum(v, segments, num_segments), values)

    return _merge_by(total, moments, lambda statistics: statistics[segments])


def is_moments(value: Any) -> bool:
    """Whether `value` is a Moments: for `is_leaf` of tree functions."""
    return isinstance(value, Moments)


def _merge(*moments: Moments) -> Moments:
    means = [jnp.asarray(m.mean) for m in moments]
    shape = jnp.broadcast_shapes(*(mean.shape for mean in means))
    if any(mean.shape not in ((), shape) for mean in means):
        received = ", ".join(str(mean.shape) for mean in means)
        raise ValueError(f"Moments to merge must have the same shape: got means of shapes {received}.")
    fields = (jnp.stack([jnp.broadcast_to(jnp.asarray(f), shape) for f in fields]) for fields in zip(*moments))
    return merge_along(Moments(*(field.astype(widen(field.dtype)) for field in fields)))


def _merge_by(
    total: Callable[[Any], Any], moments: Moments, spread: Callable[[Array], Array] = lambda statistics: statistics
) -> Moments:
    count, first = total((moments.count, moments.count * moments.mean))
    pivot = _pivot(first, count)
    merged = _about(spread(pivot), moments.count, moments.mean, moments.var, count, total)
    return shifted(merged, pivot)


def _about(pivot: Array, weights: Array, mean: Array, var: Array, count: Array, total: Callable[[Any], Any]) -> Moments:
    """The Moments of `value - pivot`, the values being given in parts (weight, mean, var)."""
    deviation = mean - pivot
    first, second = total((weights * deviation, weights * (var + _abs2(deviation))))
    divisor = _divisor(count)
    shift = first / divisor
    return Moments(count, shift, _nonnegative(second / divisor - _abs2(shift)))


def _pivot(first: Array, count: Array) -> Array:
    """The mean, rounded to fewer digits than its dtype has.

    A division that XLA contracts with the subtractions that follow would be rounded in some of them and not in others,
    and the deviations would be from different pivots. This rounding cannot be contracted.
    """
    pivot = jax.lax.stop_gradient(first / _divisor(count))
    kept = jnp.finfo(pivot.dtype)
    if jnp.iscomplexobj(pivot):
        parts = (jax.lax.reduce_precision(part, kept.nexp, kept.nmant - 1) for part in (pivot.real, pivot.imag))
        return jax.lax.complex(*parts)
    return jax.lax.reduce_precision(pivot, kept.nexp, kept.nmant - 1)


def _abs2(x: Array) -> Array:
    if jnp.iscomplexobj(x):
        return jnp.square(x.real) + jnp.square(x.imag)
    return jnp.square(x)


def _divisor(count: Array) -> Array:
    return jnp.where(count > 0, count, 1)


def _nonnegative(var: Array) -> Array:
    """Lifts rounding errors below 0 to 0 without a kink: the derivative at 0 stays that of `var`."""
    return var - jax.lax.stop_gradient(jnp.minimum(var, 0))
