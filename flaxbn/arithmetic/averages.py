"""How much a running average keeps at each update, as a function of how many updates there were."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

_NUMBERS = int | float | np.number


def cumulative(steps: ArrayLike) -> Array:
    """The weight of the old value in the plain average of all batches, `steps / (steps + 1)`: a `momentum`.

        average_t = average_(t-1) + (batch_t - average_(t-1)) / t

    The first batch replaces what was there, and after `t` updates each batch has the weight `1 / t`: PyTorch's
    `momentum=None`. While the weights of the model still change, early batches tell of another model, and are never
    forgotten: it is for statistics that are collected with the weights at rest, or nearly so. `steps` is float32, and
    stands still at 2**24 updates.

    Args:
        steps: how many updates there were.

    Examples:
        >>> import flaxbn
        >>> [round(float(flaxbn.cumulative(steps)), 3) for steps in (0, 1, 3, 999)]
        [0.0, 0.5, 0.75, 0.999]
        >>> layer = flaxbn.BatchNorm(momentum=flaxbn.cumulative)
    """
    return 1 - weight_of_new(cumulative, jnp.asarray(steps))


@dataclass(frozen=True)
class Debiased:
    """The zero-debiased running average: a `momentum` that keeps no trace of the initial mean and variance.

        m (1 - m^t) / (1 - m^(t+1))        the weight of the old value after t updates

    An average that begins at 0 and is divided by the weight that batches have in it, `1 - m^t` (Kingma & Ba 2015,
    "Adam", section 3), as one recursion: the first batch replaces what was there, later on it is the running average
    with momentum `m`. What is stored is ready for use at any time, and no second variable is needed; whereas dividing
    the stored variance, which begins at 1 and not at 0, is wrong.

    Equal ones compare equal, and so do layers that have them.

    Attributes:
        momentum: `m`, the weight of the old value in the end, more than 0 and less than 1.

    Raises:
        ValueError: if it is not.
        TypeError: if it is no number.

    Examples:
        >>> import flaxbn
        >>> momentum = flaxbn.Debiased(0.9)
        >>> [round(float(momentum(steps)), 3) for steps in (0, 1, 10, 100)]
        [0.0, 0.474, 0.854, 0.9]
        >>> layer = flaxbn.BatchNorm(momentum=momentum)
    """

    momentum: float

    def __post_init__(self) -> None:
        if not isinstance(self.momentum, _NUMBERS):
            raise TypeError(f"`momentum` of Debiased must be a number: got a {type(self.momentum).__name__}.")
        if not 0 < self.momentum < 1:
            raise ValueError(
                f"`momentum` of Debiased must be more than 0 and less than 1: got {self.momentum}. It is the weight of "
                "the old value: 0.9 where PyTorch has 0.1."
            )

    def __call__(self, steps: ArrayLike) -> Array:
        """The weight of the old value after so many updates."""
        return 1 - weight_of_new(self, jnp.asarray(steps))


def weight_of_new(momentum: Callable[[ArrayLike], ArrayLike], steps: Array) -> Any:
    """The weight of a new value after so many updates, `1 - momentum(steps)`.

    Of a float32 momentum near 1 the difference would have few digits: at 0.999 it is off by up to 3e-5 of itself. Where
    the schedule is known, so is the difference.

    Args:
        momentum: the schedule.
        steps: a number.

    Raises:
        ValueError: if a schedule returns a number that does not lie in [0, 1]; a traced one cannot be looked at.
    """
    if momentum is cumulative:
        return 1 / (steps + 1)
    if isinstance(momentum, Debiased):
        rate = math.log(momentum.momentum)  # 1 - m^t would cancel
        weight = (momentum.momentum - 1) / jnp.expm1((steps + 1) * rate)
        return jnp.where(steps > 0, jnp.minimum(weight, 1), 1)  # nothing of what was there is left, to the last digit
    kept = momentum(steps)
    if not isinstance(kept, jax.core.Tracer) and not np.all((np.asarray(kept) >= 0) & (np.asarray(kept) <= 1)):
        raise ValueError(
            f"`momentum` must return a number in [0, 1], the weight of the old value: {momentum!r} returned {kept}."
        )
    return 1 - kept


def averaged(old: Array, new: Array, weight: Array) -> Array:
    """The average after one update, with the weight of `new` given: `(1 - weight) * old + weight * new`.

    Both forms below are that. Weights that are rounded one by one do not add up to 1, and a small one would let the
    average drift by 6e-5 of itself; and of a large difference nothing is left of a small new value.

    Args:
        old: the average so far.
        new: the statistics of this batch.
        weight: in [0, 1], shaped to broadcast against them.
    """
    weight = weight.astype(jnp.finfo(old.dtype).dtype)
    mixed = jnp.where(weight < 0.5, old + weight * (new - old), (1 - weight) * old + weight * new)
    return jnp.where(weight < 1, mixed, new)  # of what was there nothing is left, NaN neither


def at_steps(schedule: Any, steps: Array, ndim: int) -> Array:
    """A schedule, or a number, after so many updates, shaped to broadcast against statistics of rank `ndim`.

    Domains have counts of their own, and a schedule takes one step at a time: it is asked for each of them.
    """
    value = schedule
    if callable(schedule):
        value = jax.vmap(schedule)(steps) if steps.ndim else schedule(steps)
    value = jnp.asarray(value)
    return value.reshape(value.shape + (1,) * (ndim - value.ndim)) if value.ndim else value
