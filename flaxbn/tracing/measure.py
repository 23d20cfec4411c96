"""What the taps of a program let through: the readers of `Program.run`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from flaxbn.arithmetic.groups import Sharing, values_per_channel
from flaxbn.arithmetic.moments import Moments, measure_deviations, shifted
from flaxbn.tracing.primitive import Tap


def stored_statistics(tap: Tap) -> tuple[Array, Array, None]:
    """Reads a layer's stored statistics, and records nothing."""
    return tap.mean, tap.var, None


def batch_statistics(tap: Tap, moments: Moments) -> tuple[Array, Array, Moments]:
    """The moments of the tap's input; where their count is 0, the layer normalizes by what is stored."""
    return *replace_seen(tap.mean, tap.var, moments), moments


def check_values(tap: Tap, shape: tuple[int, ...]) -> None:
    """A single value per channel has no batch statistics: an error, `shape` being that of the input without padding."""
    if values_per_channel(shape[tap.lanes :], tap.axes, tap.axis_name, tap.axis_index_groups) == 1:
        raise ValueError(
            f"{tap.layer} normalizes by batch statistics, which needs more than one value per channel: got an input "
            f"of shape {shape} reduced over axes {tap.axes}. Use a larger batch, or drop a last batch of one."
        )


def replace_seen(mean: Array, var: Array, moments: Moments) -> tuple[Array, Array]:
    """The mean and variance of `moments`; the given ones where its count is 0."""
    seen = moments.count > 0
    return jnp.where(seen, moments.mean, mean), jnp.where(seen, moments.var, var)


def measure_tap(tap: Tap, weights: Array | None) -> Moments:
    """The moments of the tap's input, by the weights of samples (of the rank of the input) and the layer's mask."""
    pivot, deviations = measure_tap_deviations(tap, weights)
    return shifted(deviations, pivot)


def measure_tap_deviations(tap: Tap, weights: Array | None) -> tuple[Array, Moments]:
    """`measure_tap` before rounding: a pivot, and the Moments of the deviations from it."""
    if weights is None:
        weights = tap.weights
    elif tap.weights is not None:
        weights = weights * tap.weights

    def measured(x: Array, weights: Array | None, domain: Array | None) -> tuple[Array, Moments]:
        options = {"weights": weights, "axis_name": tap.axis_name, "axis_index_groups": tap.axis_index_groups}
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
