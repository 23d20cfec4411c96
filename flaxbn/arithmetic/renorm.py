"""Batch renormalization: the correction that ties batch statistics to the running ones.

Ioffe 2017, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models".

In training, batch normalization divides by the statistics of a batch, in evaluation by running ones: two functions,
and the smaller the batch, the further apart. Batch renormalization takes the batch's output to that of the running
statistics by a factor `r` and an offset `d`. Their bounds keep early training, whose running statistics mean little,
close to batch normalization.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

Schedule = Callable[[ArrayLike], Array]
"""A number that changes in training: from the count of updates so far (a scalar), its value. Optax's are of it."""


class Statistics(Protocol):
    """Anything with a mean and a variance, Moments among others."""

    @property
    def mean(self) -> Array:
        """The mean."""

    @property
    def var(self) -> Array:
        """The variance."""


class Correction(NamedTuple):
    """The factor `r` and the offset `d`, one of each for every channel, both without unit and without gradient."""

    r: Float[Array, "*channels"]
    d: Float[Array, "*channels"]


def correction(
    batch: Statistics, running: Statistics, *, r_max: ArrayLike, d_max: ArrayLike, epsilon: float
) -> Correction:
    """The `r` and `d` of batch renormalization (Ioffe 2017, algorithm 1).

        r = clip(sigma_B / sigma, 1 / r_max, r_max)
        d = clip((mu_B - mu) / sigma, -d_max, d_max)        sigma = sqrt(var + epsilon)

    so that `(x - mu_B) / sigma_B * r + d`, where nothing is clipped, is `(x - mu) / sigma`. Both are constants to
    differentiation; the gradient flows through `mu_B` and `sigma_B` as in batch normalization.

    Args:
        batch: the statistics of this batch.
        running: the running average before this batch's update.
        r_max: the bound of `r`, at least 1; at 1, with `d_max` 0, this is batch normalization.
        d_max: the bound of `|d|`, in running standard deviations.
        epsilon: what is added to both variances.

    Returns:
        `(r, d)`, of the shape of the statistics.

    Examples:
        >>> import flaxbn, jax.numpy as jnp
        >>> batch = flaxbn.Moments(jnp.array([32.0]), jnp.array([3.0]), jnp.array([4.0]))
        >>> running = flaxbn.Moments(jnp.array([1e4]), jnp.array([0.0]), jnp.array([1.0]))
        >>> r, d = flaxbn.correction(batch, running, r_max=3.0, d_max=1.0, epsilon=0.0)
        >>> r.tolist(), d.tolist()  # the mean lies 3 deviations away, of which one is let through
        ([2.0], [1.0])
    """
    sigma_batch = jnp.sqrt(batch.var + epsilon)
    sigma = jnp.sqrt(running.var + epsilon)
    r_max, d_max = jnp.asarray(r_max), jnp.asarray(d_max)
    r = jnp.clip(sigma_batch / sigma, 1 / r_max, r_max)
    d = jnp.clip((batch.mean - running.mean) / sigma, -d_max, d_max)
    return jax.lax.stop_gradient(Correction(r, d))


def corrected_affine(corrected: Correction, scale: Array | None, bias: Array | None) -> tuple[Array, Array]:
    """The affine parameters that apply the correction as well: `(y * r + d) * scale + bias`, `y` being normalized.

    That is `y * (scale * r) + (scale * d + bias)`, so that a corrected batch costs no pass over the values more than an
    uncorrected one. A fake variance that held `r` would have epsilon added twice.

    Args:
        corrected: `r` and `d`.
        scale, bias: shaped to broadcast against them; None stands for 1 and 0.
    """
    r, d = corrected
    scale = jnp.ones_like(r) if scale is None else scale
    bias = jnp.zeros_like(d) if bias is None else bias
    return scale * r, scale * d + bias


def paper_r_max(step: ArrayLike) -> Array:
    """The paper's ramp of `r_max`: 1 until step 5 000, then linear to 3 at step 40 000 (Ioffe 2017, section 4).

    It is a `Schedule` itself, and no maker of one: two layers with it compare equal, and compile once.

    Examples:
        >>> import flaxbn
        >>> [round(float(flaxbn.paper_r_max(step)), 3) for step in (0, 5_000, 22_500, 40_000, 10**6)]
        [1.0, 1.0, 2.0, 3.0, 3.0]
    """
    return 1 + 2 * _ramp(step, 5_000, 40_000)


def paper_d_max(step: ArrayLike) -> Array:
    """The paper's ramp of `d_max`: 0 until step 5 000, then linear to 5 at step 25 000 (Ioffe 2017, section 4).

    While it is 0 and `paper_r_max` is 1, batch renormalization is batch normalization.

    Examples:
        >>> import flaxbn
        >>> [round(float(flaxbn.paper_d_max(step)), 3) for step in (0, 5_000, 9_000, 25_000, 10**6)]
        [0.0, 0.0, 1.0, 5.0, 5.0]
    """
    return 5 * _ramp(step, 5_000, 25_000)


def _ramp(step: ArrayLike, begin: int, end: int) -> Array:
    return jnp.clip((jnp.asarray(step, jnp.float32) - begin) / (end - begin), 0, 1)
