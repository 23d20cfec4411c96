"""What a layer is called with, checked: feature axes, masks, domain numbers."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


def feature_axes(ndim: int, axis: int | Sequence[int]) -> tuple[int, ...]:
    """The feature axes of an input of rank `ndim`, not negative and in ascending order."""
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if any(not -ndim <= a < ndim for a in axes):
        raise ValueError(f"`axis` must lie within the rank of the input: got axis {axis} for an input of rank {ndim}.")
    found = tuple(sorted({a % ndim for a in axes}))
    if len(found) != len(axes):
        raise ValueError(f"`axis` must name each axis once: got axis {axis} for an input of rank {ndim}.")
    return found


def position_weights(mask: Array, shape: tuple[int, ...], features: tuple[int, ...]) -> Array:
    """The weights in `mask`, of the rank of the input; a mask of any shape but the two allowed is an error."""
    mask = jnp.asarray(mask)
    without_features = tuple(n for axis, n in enumerate(shape) if axis not in features)
    if len(features) == 1 and mask.shape == without_features:
        return jnp.expand_dims(mask, features)
    if mask.ndim == len(shape) and all(m in (1, n) for m, n in zip(mask.shape, shape)):
        return mask
    short = f" or exactly the shape {without_features}" if len(features) == 1 else ""
    ones = ", None" * (len(shape) - 1)
    raise ValueError(
        f"`mask` must have rank {len(shape)} (each axis equal to that of x or 1){short}: got a mask of shape "
        f"{mask.shape} for x of shape {shape}. To mask whole examples, pass `mask[:{ones}]`."
    )


def domain_of(
    domain: Any, num_domains: int | None, shape: tuple[int, ...], features: tuple[int, ...]
) -> Int[Array, "..."] | None:
    """The domain numbers of a call, a scalar or one for each example; what is out of range is `num_domains`."""
    if num_domains is None:
        if domain is not None:
            raise ValueError("`domain` belongs to a layer with `num_domains`: got one without.")
        return None
    if domain is None:
        raise ValueError(f"`domain` must be given to a layer with `num_domains={num_domains}`: got none.")
    if isinstance(domain, int | np.integer) and not 0 <= domain < num_domains:
        raise ValueError(f"`domain` must lie in [0, {num_domains}): got {domain}.")
    numbers = jnp.asarray(domain)
    if not jnp.issubdtype(numbers.dtype, jnp.integer):
        raise TypeError(f"`domain` must be of integers: got {numbers.dtype}.")
    if numbers.shape not in ((), shape[:1]) or (numbers.ndim and 0 in features):
        raise ValueError(
            f"`domain` must be a scalar, or have one number for each example along the leading axis of x, which is no "
            f"feature axis: got shape {numbers.shape} for x of shape {shape} with feature axes {features}."
        )
    return domain_numbers(numbers, num_domains)


def domain_numbers(domain: Array, num_domains: int) -> Array:
    """Domain numbers with what is out of range moved to `num_domains`, where reading gives NaN and writing nothing."""
    domain = jnp.asarray(domain, jnp.int32)
    return jnp.where((domain >= 0) & (domain < num_domains), domain, num_domains)
