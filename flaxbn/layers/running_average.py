"""What a layer keeps from batch to batch, and how a batch changes it.

The running average of the statistics, and, where something is scheduled, the number of updates. A layer with domains
keeps a row of each for every domain; a batch of one domain reads and writes that row alone.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from flaxbn.arithmetic.averages import at_steps, averaged, weight_of_new
from flaxbn.arithmetic.moments import Moments, widen
from flaxbn.arithmetic.normalize import ema
from flaxbn.arithmetic.renorm import Schedule, Statistics
from flaxbn.layers.arguments import Options


class Stored(NamedTuple):
    """What a layer keeps from batch to batch.

    Attributes:
        mean, var: the running average, of shape (*channels), or (num_domains, *channels).
        steps: the number of updates, a scalar or (num_domains,); None where there is none.
    """

    mean: Array
    var: Array
    steps: Array | None = None


def initial_steps(num_domains: int | None) -> Array:
    """The number of updates of a layer, or of each domain of it, before the first.

    It is float32, as the statistics beside it are: an integer among them breaks what averages or differentiates all
    variables, such as a target network in `lax.scan`. Beyond 2**24 it stands still, and so does every schedule.
    """
    return jnp.zeros(() if num_domains is None else (num_domains,), jnp.float32)


def stored_dtype(dtype: Any) -> Any:
    """The dtype of the running mean of input of `dtype`: float32, complex64, or as wide as the input.

    Averages of half precision would soon stand still; and of float64 input at a mean of 1e4 a float32 mean would shift
    the evaluation by 3e-4 of a standard deviation.
    """
    return widen(dtype)


def row_of(a: Any, row: Array | None) -> Any:
    """What is stored for one domain, NaN for one out of range; all of it where there is no row."""
    return a if a is None or row is None else jnp.asarray(a).at[row].get(mode="fill", fill_value=None)


def read_steps(stored: Stored, num_domains: int | None) -> Array:
    """The stored number of updates, 0 where a checkpoint lacks it.

    One number for a layer whose domains have one each stands for all of them. The integers of an older checkpoint stay
    integers. What was cast to half precision is widened, since there it would stand still at 256 or 2 048; what tools
    have averaged may be a fraction, and is taken as it is.
    """
    steps = initial_steps(num_domains) if stored.steps is None else jnp.asarray(stored.steps)
    steps = steps if num_domains is None or steps.ndim else jnp.full(num_domains, steps)
    return steps if jnp.issubdtype(steps.dtype, jnp.integer) else steps.astype(widen(steps.dtype))


def update_stored(
    options: Options, stored: Stored, running: Statistics, batch: Moments, usable: Array, row: Array | None
) -> Stored:
    """What is stored after a batch; where it has no usable statistics, what was stored before.

    One infinite activation, as loss scaling makes them on purpose, would otherwise stay in the average for ever. A step
    counts where any channel was updated.

    Args:
        options: what the layer is.
        stored: what it stored before.
        running: the part of it that belongs to the batch: `row`, or all of it.
        batch: the Moments of the batch, of the shape of `running`.
        usable: for each of them, whether they were used, if they are finite.
        row: the domain of the batch, if there is one.
    """
    usable = usable & jnp.isfinite(batch.mean) & jnp.isfinite(batch.var)
    steps = own = stored.steps
    if options.counts_updates:
        all_steps = read_steps(stored, options.num_domains)
        own = jax.lax.stop_gradient(row_of(all_steps, row))
        channels = range((options.num_domains is not None) - stored.mean.ndim, 0)
        steps = _with_row(all_steps, row, own + jnp.any(usable, tuple(channels)).astype(own.dtype))
    average = _average(options.momentum, own, running.mean.ndim)
    mean = _averaged(running.mean, batch.mean, average, usable)
    var = _averaged(running.var, batch.var, average, usable)
    return Stored(_with_row(stored.mean, row, mean), _with_row(stored.var, row, var), steps)


def _average(momentum: float | Schedule, steps: Array | None, ndim: int) -> Callable[[Array, Array], Array]:
    """The average of old and new statistics of rank `ndim`, after so many updates."""
    if not callable(momentum):
        return functools.partial(ema, momentum=momentum)
    weight = at_steps(functools.partial(weight_of_new, momentum), jnp.asarray(steps), ndim)
    return functools.partial(averaged, weight=weight)


def _averaged(old: Array, new: Array, average: Callable[[Array, Array], Array], usable: Array) -> Array:
    """The running average, in the dtype that is stored, float32 at least; no gradient flows into what is stored.

    How wide it is was decided when the variables were made: a dtype that changed with the input would not go through
    `lax.scan`.
    """
    dtype = jnp.promote_types(widen(old.dtype), jnp.complex64) if jnp.iscomplexobj(new) else widen(old.dtype)
    old = old.astype(dtype)
    return jax.lax.stop_gradient(jnp.where(usable, average(old, new.astype(dtype)), old))


def _with_row(a: Array, row: Array | None, new: Array) -> Array:
    """What is stored, with `new` for one domain; nothing is written for one out of range."""
    return new if row is None else jnp.asarray(a, new.dtype).at[row].set(new, mode="drop")
