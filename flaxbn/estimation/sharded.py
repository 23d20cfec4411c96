"""Moments of a layer's input that is split over devices, with one exchange between them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array

from flaxbn.arithmetic.measure import Measured, Platform
from flaxbn.arithmetic.moments import Moments, merge_deviations_along
from flaxbn.data.placement import replicated, shards
from flaxbn.tracing.measure import measure_tap
from flaxbn.tracing.primitive import Tap


def measure_sharded(
    tap: Tap, weights: Array | None, samples: int | None, sharding: NamedSharding | None, *, on: Platform | None
) -> Measured:
    """`measure_tap` where batches of `samples` samples lie as `sharding`.

    Each device measures its part of the input, all gather what all have found and merge that by themselves. A mean and
    the deviations from it would be two exchanges, the second waiting for the first. The result does not depend on
    whether the axis that is cut into parts is the one along which the samples lie.

    Args:
        tap: the call of a layer.
        weights: of its positions, or None.
        samples: how many a batch has; None where that is not known.
        sharding: how they lie; None for one device.
        on: as in `measure_deviations`, where nothing is cut.
    """
    parts = shards(sharding)
    axis = None if samples is None else _axis_of_samples(tap, samples)
    if sharding is None or samples is None or parts == 1 or axis is None or samples % parts:
        return measure_tap(tap, weights, on=on)

    def cut(values: Array | None, axis: int) -> Array | None:
        if values is None or values.ndim <= axis or values.shape[axis] == 1:
            return values
        shape = (*values.shape[:axis], parts, -1, *values.shape[axis + 1 :])
        return jnp.moveaxis(values.reshape(shape), axis, 0)

    whole = tap.x, weights, tap.weights, tap.domain
    given = cut(tap.x, axis), cut(weights, axis), cut(tap.weights, axis), cut(tap.domain, axis)
    in_axes = tuple(None if part is value else 0 for part, value in zip(given, whole))

    def measured(x: Any, weights: Any, mask: Any, domain: Any) -> Array:
        pivot, deviations, largest, _ = measure_tap(tap._replace(x=x, weights=mask, domain=domain), weights)
        return jnp.stack((pivot, *deviations, largest))

    found = jax.vmap(measured, in_axes)(*given)
    found = jax.lax.with_sharding_constraint(found, replicated(sharding))
    pivots, *deviations, largest = jnp.moveaxis(found, 1, 0)
    pivot, merged = merge_deviations_along(pivots, Moments(*deviations))
    return Measured(pivot, merged, jnp.max(largest, 0), jnp.isinf(merged.var))


def _axis_of_samples(tap: Tap, samples: int) -> int | None:
    """The axis of the input along which the samples seem to lie; None where there is no telling."""
    if tap.axis_name is not None or jnp.iscomplexobj(tap.x):
        return None
    axes = [tap.lanes + axis for axis in tap.axes if tap.x.shape[tap.lanes + axis] % samples == 0]
    axis = min(axes, key=lambda axis: tap.x.shape[axis], default=None)  # the first of several alike
    by_example = tap.domain is not None and tap.domain.ndim > tap.lanes
    return None if by_example and axis != tap.lanes else axis
