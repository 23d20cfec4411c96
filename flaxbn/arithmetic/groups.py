"""Which positions of an array share statistics: those along some axes, those of one domain, those of several devices.

Moments know nothing of axes: they are sums, and this file says over what. A layer that normalizes images reduces over
the batch and both spatial axes; one with domains only over the examples of each domain; one that is synchronized over
the members of a mapped axis as well.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Int

_BLOCK = 512  # examples


@functools.partial(jax.tree_util.register_dataclass, data_fields=["domain"], meta_fields=["axes", "num_domains"])
@dataclass(frozen=True)
class Sharing:
    """Positions along `axes` share statistics; where `domain` is given, only those of examples of one domain do.

    `total` and `count` reduce positions to statistics, of shape (*channels) or (num_domains, *channels), and `spread`
    goes the other way. What lies between is the same arithmetic for both shapes.

    Attributes:
        axes: the axes to reduce, not negative and in ascending order.
        domain: for each example along axis 0, which must be among `axes`, the number of its domain. Examples whose
            number is not in [0, num_domains) take no part, and are given NaN.
        num_domains: the number of domains.
    """

    axes: tuple[int, ...]
    domain: Int[Array, " batch"] | None = None
    num_domains: int | None = None

    def total(self, values: Any) -> Any:
        """Sums a tree of arrays over what shares statistics.

        Args:
            values: a tree of arrays of the full rank. What is narrower than float32 is summed in float32, since a sum
                of many halves would soon be larger than what their dtype resolves.

        Returns:
            A tree of sums of shape (*channels), or (num_domains, *channels).
        """
        sums = jax.tree.map(lambda v: jnp.sum(v, self._inner, dtype=jnp.promote_types(v.dtype, jnp.float32)), values)
        if self.domain is None:
            return sums
        return jax.tree.map(self._by_domain, sums)

    def count(self, weights: Array, shape: tuple[int, ...]) -> Array:
        """The sum of weights, without making an array of the size of the values for it.

        An axis along which weights do not vary is multiplied out: a mask of examples is summed over the batch alone,
        and where there is no mask nothing is left to sum. Channels are told apart where weights do.

        Args:
            weights: of the rank of `shape`, each axis equal to that of `shape` or 1.
            shape: that of the values.

        Returns:
            float32 or wider, shaped as `total` gives it.
        """
        repeats = math.prod(shape[axis] for axis in self._inner if weights.shape[axis] == 1)
        sums = float(repeats) * jnp.sum(weights, self._inner, dtype=jnp.promote_types(weights.dtype, jnp.float32))
        channels = tuple(n for axis, n in enumerate(shape) if axis not in self.axes)
        if self.domain is None:
            return jnp.broadcast_to(sums, channels)
        sums = jnp.broadcast_to(sums, (shape[0], *sums.shape[1:]))
        sums = self._by_domain(sums)
        return jnp.broadcast_to(sums, (len(sums), *channels))

    def largest(self, weights: Array, shape: tuple[int, ...]) -> Array:
        """The largest weight of what shares statistics, 0 where there is nothing.

        Args:
            weights: not negative; of the rank of `shape`, each axis equal to that of `shape` or 1.
            shape: that of the values.

        Returns:
            Shaped as `total` gives it, but that channels are one where weights do not tell them apart: for `spread`.
        """
        found = jnp.max(weights, self._inner, initial=0)
        if self.domain is None:
            return found
        found = jnp.broadcast_to(found, (shape[0], *found.shape[1:]))
        return jnp.maximum(jax.ops.segment_max(found, self.domain, self.num_domains), 0)

    def spread(self, statistics: Array) -> Array:
        """Statistics as `total` gives them, shaped to broadcast against the positions.

        With domains each example is given those of its own, and NaN where its number is out of range: a wrong number
        then shows in the output, where jax would clamp it and take another domain's statistics.
        """
        if self.domain is not None:
            statistics = statistics.at[self.domain].get(mode="fill", fill_value=jnp.nan)
        return jnp.expand_dims(statistics, self._inner)

    def _by_domain(self, values: Array) -> Array:
        """Sums over the examples of each domain, (num_domains, *channels), of values (batch, *channels).

        What is added one after another rounds each time: a million float32 values lose four of seven digits. Examples
        are added in blocks, and then the blocks.
        """
        domain, domains = jnp.asarray(self.domain), self.num_domains or 0
        blocks = -(-len(values) // _BLOCK)
        exists = (domain >= 0) & (domain < domains)
        block = jax.lax.iota(jnp.int32, len(values)) // _BLOCK
        numbers = jnp.where(exists, block * domains + domain.astype(jnp.int32), blocks * domains)
        sums = jax.ops.segment_sum(values, numbers, blocks * domains)
        return jnp.sum(sums.reshape(blocks, domains, *values.shape[1:]), 0)

    @property
    def _inner(self) -> tuple[int, ...]:
        return self.axes if self.domain is None else self.axes[1:]


def check_weights(weights: ArrayLike, shape: tuple[int, ...]) -> None:
    """Weights of another rank than the values would broadcast against the wrong axes without a word: an error.

    Args:
        weights: of the rank of `shape`, each axis equal to that of `shape` or 1.
        shape: that of the values.
    """
    found = jnp.shape(weights)
    if len(found) != len(shape) or any(w not in (1, n) for w, n in zip(found, shape)):
        raise ValueError(
            f"`weights` must have rank {len(shape)}, each axis equal to that of the values or 1: got weights of shape "
            f"{found} for values of shape {shape}. Insert axes of length 1 where the weights do not vary."
        )


def members(axis_name: Any, axis_index_groups: Sequence[Sequence[int]] | None) -> int:
    """How many members of a mapped axis share statistics, in the smallest group; 1 without an axis.

    Args:
        axis_name: the name of an axis that a transformation under way maps, several of them, or None.
        axis_index_groups: the groups of members that share, where not all do.

    Raises:
        NameError: if no transformation maps `axis_name`.
    """
    if axis_name is None:
        return 1
    if axis_index_groups is not None:
        return min(len(group) for group in axis_index_groups)
    return jax.lax.psum(1, axis_name)


def values_per_channel(
    shape: Sequence[int],
    axes: Sequence[int],
    axis_name: Any = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> int:
    """How many values one channel's statistics are computed from, as far as shapes tell; masks may leave fewer.

    A single value is its own mean, and its variance is 0: whoever normalizes by such statistics puts out a constant,
    whatever goes in. Callers make an error of it.

    Args:
        shape: that of the values on this member.
        axes: the axes of it that are reduced.
        axis_name: the mapped axis whose members share statistics, or None.
        axis_index_groups: the groups of members that share, where not all do.
    """
    return math.prod(shape[axis] for axis in axes) * members(axis_name, axis_index_groups)
