"""The moments of all calls of a program, end to end: written, merged and fetched together, not layer by layer.

On an accelerator an operation takes as long for one layer's few hundred channels as for all layers' thousands.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from flaxbn.arithmetic.moments import Moments, merge_along
from flaxbn.estimation.layer_moments import Result

Packed = list[list[Array]]
"""What `merge_joined` gives."""


class Pending(NamedTuple):
    """A `Result` on the device, where it may not be computed yet; `packed` as `merge_joined` gives it."""

    entries: list[np.ndarray]
    steps: Sequence[int]
    packed: Packed
    is_complex: list[bool]


def join(moments: Sequence[Moments]) -> list[Moments]:
    """The moments of some calls as one Moments or, where some means are complex and others are not, as two."""

    def end_to_end(fields: Sequence[Array]) -> Array:
        return jnp.concatenate([jnp.ravel(field) for field in fields])

    kinds = [[m for m in moments if jnp.iscomplexobj(m.mean) == kind] for kind in (False, True)]
    return [Moments(*map(end_to_end, zip(*kind))) for kind in kinds if kind]


def merge_joined(steps: Sequence[Moments], *, by_device: bool) -> Packed:
    """Joined moments along a leading axis of batches, merged; packed, since every array to fetch is a transfer.

    Args:
        steps: what `join` gives for each batch; where each device normalizes by itself, with an axis of devices next.

    Returns:
        For each of them one array of real numbers, (4 or 3, channels): the count, the variance, for each channel the
        first batch whose moments are not finite, or infinity, and the mean; a complex mean is an array of its own.
    """

    def packed(moments: Moments) -> list[Array]:
        finite = jnp.isfinite(moments.mean) & jnp.isfinite(moments.var)
        first_bad = jnp.where(jnp.all(finite, 0), jnp.inf, jnp.argmin(finite, 0))
        if by_device:
            moments, first_bad = jax.vmap(merge_along, in_axes=1)(moments), jnp.min(first_bad, 0)
        count, mean, var = merge_along(moments)
        real = [count, var, first_bad.astype(var.dtype)]
        return [jnp.stack(real), mean] if jnp.iscomplexobj(mean) else [jnp.stack([*real, mean])]

    return [packed(moments) for moments in steps]


def fetched(results: Sequence[Pending]) -> list[Result]:
    """The results in host memory, by one transfer."""
    packed = jax.device_get([result.packed for result in results])
    return [_unpack(result, arrays) for result, arrays in zip(results, packed)]


def _unpack(result: Pending, packed: Sequence[Sequence[np.ndarray]]) -> Result:
    shapes = [entries.shape for entries in result.entries]
    found: list[Any] = [None] * len(shapes)
    first_bad = [-1] * len(shapes)
    kinds = [[i for i, own in enumerate(result.is_complex) if own == kind] for kind in (False, True)]
    for own, (real, *complex_mean) in zip([kind for kind in kinds if kind], packed, strict=True):
        count, var, bad, mean = *real[:3], complex_mean[0] if complex_mean else real[3]
        end = 0
        for i in own:
            begin, end = end, end + math.prod(shapes[i])
            found[i] = Moments(*(field[begin:end].reshape(shapes[i]) for field in (count, mean, var)))  # type: ignore[arg-type]
            earliest = np.min(bad[begin:end], initial=np.inf)
            first_bad[i] = -1 if np.isinf(earliest) else int(earliest)
    return Result(result.entries, result.steps, found, first_bad)
