"""Which positions of an array share statistics: those along some axes, or those of examples of one domain."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@dataclass(frozen=True)
class Sharing:
    """Positions along `axes` share statistics; where `domain` is given, only those of examples of one domain do.

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
        """Sums a tree of arrays: of shape (*channels), or (num_domains, *channels)."""
        domain = self.domain
        sums = jax.tree.map(lambda v: jnp.sum(v, self._inner, dtype=jnp.promote_types(v.dtype, jnp.float32)), values)
        if domain is None:
            return sums
        return jax.tree.map(lambda v: jax.ops.segment_sum(v, domain, self.num_domains), sums)

    def count(self, weights: Array, shape: tuple[int, ...]) -> Array:
        """The sum of weights of the rank of `shape`, each axis equal to that of `shape` or 1; float32 or wider."""
        repeats = math.prod(shape[axis] for axis in self._inner if weights.shape[axis] == 1)
        sums = float(repeats) * jnp.sum(weights, self._inner, dtype=jnp.promote_types(weights.dtype, jnp.float32))
        sums = jnp.broadcast_to(sums, tuple(n for axis, n in enumerate(shape) if axis not in self._inner))
        return sums if self.domain is None else jax.ops.segment_sum(sums, self.domain, self.num_domains)

    def spread(self, statistics: Array) -> Array:
        """Statistics as `total` gives them, shaped to broadcast against the positions."""
        if self.domain is not None:
            statistics = statistics.at[self.domain].get(mode="fill", fill_value=jnp.nan)
        return jnp.expand_dims(statistics, self._inner)

    @property
    def _inner(self) -> tuple[int, ...]:
        return self.axes if self.domain is None else self.axes[1:]
