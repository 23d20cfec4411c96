"""The moments of all calls of a program, end to end: written, merged and fetched together, not layer by layer.

On an accelerator an operation takes as long for one layer's few hundred channels as for all layers' thousands.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from flaxbn.arithmetic.measure import Measured
from flaxbn.arithmetic.moments import Moments, merge_along
from flaxbn.estimation.layer_moments import Result

Packed = list[list[Array]]
"""What `merge_joined` gives."""


class Record(NamedTuple):
    """What calls of layers see of a batch: its moments, and which channels have a single value."""

    moments: Moments
    single: Array

    @classmethod
    def of(cls, measured: Measured) -> "Record":
        """What a batch leaves of what was measured."""
        return cls(measured.moments, (measured.deviations.count > 0) & ~measured.several)


class Pending(NamedTuple):
    """A `Result` on the device, where it may not be computed yet; `packed` as `merge_joined` gives it."""

    entries: list[np.ndarray]
    steps: Sequence[int]
    packed: Packed
    is_complex: list[bool]


def join(records: Sequence[Record]) -> list[Record]:
    """The records of some calls as one or, where some means are complex and others are not, as two."""

    def end_to_end(*fields: Array) -> Array:
        return jnp.concatenate([jnp.ravel(field) for field in fields])

    kinds = [[r for r in records if jnp.iscomplexobj(r.moments.mean) == kind] for kind in (False, True)]
    return [jax.tree.map(end_to_end, *kind) for kind in kinds if kind]


def merge_joined(steps: Sequence[Record], *, by_device: bool) -> Packed:
    """Joined records along a leading axis of batches, merged; packed, since every array to fetch is a transfer.

    Args:
        steps: what `join` gives for each batch; where each device normalizes by itself, with an axis of devices next.

    Returns:
        For each of them one array of real numbers, (5 or 4, channels): the count, the variance, for each channel the
        first batch whose moments are not finite and the first in which it has a single value, or infinity, and the
        mean; a complex mean is an array of its own.
    """

    def packed(moments: Moments, single: Array) -> list[Array]:
        if by_device:
            within = jax.vmap(merge_along, in_axes=1)(moments)
            first_bad = jnp.min(jax.vmap(partial(first_not_finite, xp=jnp), in_axes=(1, 0))(moments, within), 0)
            moments, single = within, jnp.any(single, 1)
            merged = merge_along(moments)
        else:
            merged = merge_along(moments)
            first_bad = first_not_finite(moments, merged, jnp)
        count, mean, var = merged
        first_single = jnp.where(jnp.any(single, 0), jnp.argmax(single, 0).astype(var.dtype), jnp.inf)
        real = [field.astype(var.dtype) for field in (count, var, first_bad, first_single)]
        return [jnp.stack(real), mean] if jnp.iscomplexobj(mean) else [jnp.stack([*real, mean])]

    return [packed(*record) for record in steps]


def first_not_finite(steps: Moments, merged: Moments, xp: Any) -> Any:
    """For each channel the first place along the leading axis where the moments are not finite, or infinity.

    So do moments that are finite, and of which sums that merging takes are not.

    Args:
        steps: the moments of some batches.
        merged: the same, merged.
        xp: numpy or jax.numpy.
    """
    finite = xp.isfinite(steps.count * steps.mean) & xp.isfinite(steps.count * steps.var) & xp.isfinite(steps.count)
    whole = xp.isfinite(merged.mean) & xp.isfinite(merged.var) & xp.isfinite(merged.count)
    return xp.where(xp.all(finite, 0) & whole, xp.inf, xp.argmin(finite, 0).astype(merged.var.dtype))


def fetched(results: Sequence[Pending]) -> list[Result]:
    """The results in host memory, by one transfer."""
    packed = jax.device_get([result.packed for result in results])
    return [_unpack(result, arrays) for result, arrays in zip(results, packed)]


def _unpack(result: Pending, packed: Sequence[Sequence[np.ndarray]]) -> Result:
    kinds = [kind for kind in (False, True) if kind in result.is_complex]
    sizes = [entries.size for entries in result.entries]
    real = np.empty((4, sum(sizes)))
    mean = np.empty(sum(sizes), complex if True in kinds else float)
    for kind, (own, *complex_mean) in zip(kinds, packed, strict=True):
        at: Any = slice(None) if len(kinds) == 1 else np.repeat(result.is_complex, sizes) == kind
        real[:, at], mean[at] = own[:4], complex_mean[0] if complex_mean else own[4]
    count, var, bad, single = real
    return Result(result.entries, result.steps, Moments(count, mean, var), bad, single, result.is_complex)  # type: ignore[arg-type]
