"""What the taps of a program let through: the readers of `Program.run`, and the moments that they record.

A reader gets a `Tap` and returns the mean and variance by which the layer is to normalize, and a record.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from flaxbn.arithmetic.groups import Sharing, values_per_channel
from flaxbn.arithmetic.measure import Measured, Platform, measure_deviations
from flaxbn.arithmetic.moments import Moments
from flaxbn.arithmetic.pivot import is_on_host
from flaxbn.tracing.primitive import Tap


def stored_statistics(tap: Tap) -> tuple[Array, Array, None]:
    """A reader that lets a layer's stored statistics through, and records nothing."""
    return tap.mean, tap.var, None


def batch_statistics(tap: Tap, measured: Measured) -> tuple[Array, Array]:
    """The statistics of the tap's input, and what is stored where these cannot be used.

    As in a layer that trains: those of a single value would make the output constant, and those that overflow are none.
    """
    moments = measured.moments
    usable = measured.several & ~measured.overflow
    return jnp.where(usable, moments.mean, tap.mean), jnp.where(usable, moments.var, tap.var)


def check_values(tap: Tap, shape: tuple[int, ...]) -> None:
    """A single value per channel has no batch statistics: an error.

    Args:
        tap: the tap.
        shape: that of its input, without what is padding.
    """
    if values_per_channel(shape[tap.lanes :], tap.axes, tap.axis_name, tap.axis_index_groups) == 1:
        raise ValueError(
            f"{tap.layer} normalizes by batch statistics, which needs more than one value per channel: got an input "
            f"of shape {shape} reduced over axes {tap.axes}. Use a larger batch, or drop a last batch of one; "
            'or, in an estimate, `method="exact"`, for which one batch need not have more.'
        )


def replace_seen(mean: Any, var: Any, moments: Moments) -> tuple[Any, Any]:
    """The mean and variance of `moments`, of one shape with `mean` and `var`; the latter where its count is 0."""
    where: Any = np.where if is_on_host(moments.count) else jnp.where
    seen = moments.count > 0
    return where(seen, moments.mean, mean), where(seen, moments.var, var)


def measure_tap(tap: Tap, weights: Array | None, *, on: Platform | None = None) -> Measured:
    """What is measured of the tap's input, by the weights of samples and the layer's mask.

    A layer with domains that runs on one has the moments of that row, and none of the others. Where members of a mapped
    axis may run on different domains, each example carries its number, so that all members sum the same rows.

    Args:
        tap: the tap.
        weights: of the rank of its input, each axis equal to that of it or 1; None where samples have no weights.
        on: as in `measure_deviations`.

    Returns:
        Of the shape of the statistics that the layer reads. With domains, those of all; without examples their count
        is 0.
    """
    if weights is None:
        weights = tap.weights
    elif tap.weights is not None:
        weights = weights * tap.weights

    def measured(x: Array, weights: Array | None, domain: Array | None) -> Measured:
        options = {"weights": weights, "axis_name": tap.axis_name, "axis_index_groups": tap.axis_index_groups}
        options |= {"on": None if on == "cpu" and tap.lanes else on}
        if domain is None:
            return measure_deviations(x, Sharing(tap.axes), **options)
        num_domains = tap.mean.shape[tap.lanes]
        if domain.ndim == 0 and tap.axis_name is not None:
            domain = jnp.broadcast_to(domain, x.shape[:1])
        if domain.ndim:
            return measure_deviations(x, Sharing(tap.axes, domain, num_domains), **options)
        row = measure_deviations(x, Sharing(tap.axes), **options)
        return jax.tree.map(lambda a: jnp.zeros((num_domains, *a.shape), a.dtype).at[domain].set(a, mode="drop"), row)

    for _ in range(tap.lanes):
        measured = jax.vmap(measured)
    if weights is not None:
        weights = jnp.broadcast_to(weights, (*tap.x.shape[: tap.lanes], *weights.shape[tap.lanes :]))
    return measured(tap.x, weights, tap.domain)
