"""Weighted mean and variance of arrays, as a monoid: `measure` makes Moments of values, and here they merge."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Inexact

from flaxbn.arithmetic.pivot import abs2, is_on_host, mean_and_var, rounded_mean


class Moments(NamedTuple):
    """Count, mean and variance of weighted values, one of each for every channel.

    These three are enough to merge: Moments of parts give those of the whole, exactly and in any order, where the
    variances of parts alone would leave out how far their means lie from each other.

    Attributes:
        count: the sum of the weights; the number of values where they are unweighted.
        mean: `sum(w x) / sum(w)`, in the unit of the values.
        var: `sum(w |x - mean|^2) / sum(w)`, biased (it divides by the count), in that unit squared.

    All have one shape; `mean` is complex where the values are. In a compiled program they are float32, or float64 if
    the values are. On the host, in numpy arrays as `population_moments` returns them, they are merged in float64, where
    nothing is lost however many parts there are: in float32 a count stands still at 2**24 when ones are added. Where
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
        return jax.tree.map(lambda v: v.sum(axis, keepdims=True), values)

    merged = _merge_by(total, moments)
    return Moments(*(field.squeeze(axis) for field in merged))


def merge_deviations_along(pivots: Array, deviations: Moments) -> tuple[Array, Moments]:
    """Merges along the leading axis what `measure_deviations` gives: nothing is lost to the rounding of large means.

    The parts' pivots differ by much less than they measure, so their differences are exact, and small.

    Returns:
        A pivot, and the Moments of the deviations from it.
    """
    count = deviations.count
    common = rounded_mean(jnp.sum(count * pivots, 0, keepdims=True), jnp.sum(count, 0, keepdims=True))
    return common[0], merge_along(shifted(deviations, pivots - common))


def merge_groups(
    pivots: Array,
    deviations: Moments,
    axis_name: Hashable = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> tuple[Array, Moments]:
    """`merge_deviations_along` for groups that may lie on several members of a mapped axis; two `psum`s.

    Args:
        pivots: those of the groups, along the leading axis; constants.
        deviations: the Moments of what was measured about them.
        axis_name, axis_index_groups: merge the groups of all members, as in `merge_across`.

    Returns:
        A pivot, and the Moments of the deviations from it, of all groups.
    """
    total = functools.partial(total_of_groups, axis_name=axis_name, axis_index_groups=axis_index_groups)
    count, first = total((deviations.count, deviations.count * pivots))
    pivot = rounded_mean(first, count)
    mean = deviations.mean + (pivots - pivot[None])
    first, second = total((deviations.count * mean, deviations.count * (deviations.var + abs2(mean))))
    return pivot, Moments(count, *mean_and_var(count, first, second))


def total_of_groups(
    values: Any, axis_name: Hashable = None, axis_index_groups: Sequence[Sequence[int]] | None = None
) -> Any:
    """The sums of a tree of arrays over their leading axis of groups, and over the members of a mapped axis."""
    sums = jax.tree.map(lambda v: v.sum(0), values)
    return sums if axis_name is None else jax.lax.psum(sums, axis_name, axis_index_groups=axis_index_groups)


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


def merge_numbered(moments: Moments, numbers: np.ndarray, total: int) -> Moments:
    """Merges on the host those of the Moments along axis 0 that have the same number, in [0, total).

    Args:
        moments: numpy arrays of length n.
        numbers: (n,), for each of them its number.
        total: how many numbers there are.

    Returns:
        Moments of length `total` in float64, of count 0 where nothing has that number.
    """

    def sums(values: np.ndarray) -> np.ndarray:
        if np.iscomplexobj(values):
            return sums(values.real) + 1j * sums(values.imag)
        return np.bincount(numbers, values, total).astype(np.float64)  # of nothing it would be integers

    wide = Moments(*(np.asarray(field, _host_dtype(field)) for field in moments))  # type: ignore[arg-type]
    if np.bincount(numbers).max(initial=0) < 2:  # as in most networks: there is nothing to merge
        return Moments(*(_placed(np.where(wide.count > 0, field, 0), numbers, total) for field in wide))  # type: ignore[arg-type]
    return _merge_by(lambda values: jax.tree.map(sums, values), wide, lambda statistics: statistics[numbers])


def is_moments(value: Any) -> bool:
    """Whether `value` is a Moments: for `is_leaf` of tree functions."""
    return isinstance(value, Moments)


def _merge(*moments: Moments) -> Moments:
    shapes = [np.shape(m.mean) for m in moments]
    shape = np.broadcast_shapes(*shapes)
    if any(own not in ((), shape) for own in shapes):
        received = ", ".join(map(str, shapes))
        raise ValueError(f"Moments to merge must have the same shape: got means of shapes {received}.")
    on_host = all(is_on_host(field) for m in moments for field in m)
    xp: Any = np if on_host else jnp
    fields = (xp.stack([xp.broadcast_to(xp.asarray(f), shape) for f in fields]) for fields in zip(*moments))
    return merge_along(Moments(*(f.astype(_host_dtype(f) if on_host else widen(f.dtype)) for f in fields)))


def _placed(values: np.ndarray, numbers: np.ndarray, total: int) -> np.ndarray:
    found = np.zeros(total, values.dtype)
    found[numbers] = values
    return found


def _host_dtype(field: Any) -> Any:
    return np.result_type(field, np.float64)


def _merge_by(
    total: Callable[[Any], Any], moments: Moments, spread: Callable[[Array], Array] = lambda statistics: statistics
) -> Moments:
    count, first = total((moments.count, moments.count * moments.mean))
    pivot = rounded_mean(first, count)
    deviation = moments.mean - spread(pivot)
    first, second = total((moments.count * deviation, moments.count * (moments.var + abs2(deviation))))
    return shifted(Moments(count, *mean_and_var(count, first, second)), pivot)
