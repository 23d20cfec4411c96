"""The moments of all calls of a program, end to end: written, merged and fetched together, not layer by layer.

On an accelerator an operation takes as long for one layer's few hundred channels as for all layers' thousands.
"""

import math
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
    shapes = [entries.shape for entries in result.entries]
    found: list[Any] = [None] * len(shapes)
    first_bad, first_single = [-1] * len(shapes), [-1] * len(shapes)
    kinds = [[i for i, own in enumerate(result.is_complex) if own == kind] for kind in (False, True)]
    for own, (real, *complex_mean) in zip([kind for kind in kinds if kind], packed, strict=True):
        count, var, bad, single, mean = *real[:4], complex_mean[0] if complex_mean else real[4]
        end = 0
        for i in own:
            begin, end = end, end + math.prod(shapes[i])
            found[i] = Moments(*(field[begin:end].reshape(shapes[i]) for field in (count, mean, var)))  # type: ignore[arg-type]
            first_bad[i], first_single[i] = earliest(bad[begin:end]), earliest(single[begin:end])
    return Result(result.entries, result.steps, found, first_bad, first_single)


def earliest(places: np.ndarray) -> int:
    """The least of some places, or -1 where all are infinity."""
    least = np.min(places, initial=np.inf)
    return -1 if np.isinf(least) else int(least)
