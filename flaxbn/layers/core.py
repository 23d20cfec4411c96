"""What a batch-norm layer computes, whoever owns its variables.

A shell for one of Flax's APIs passes in what it stores, and stores what comes back; nothing here creates a variable,
and no shell does arithmetic. `run_layer` reads in the order of the computation:

1. where statistics are shared, and which positions count (`arranged.arrange`),
2. what is stored for the batch (`_read`),
3. the output (`_output`): the statistics of the batch (`_measure`), those to normalize by, of the batch or the running
   average (`_select`), with renormalization's r and d folded into the affine parameters (`_renormalize`); where the
   examples normalize in groups, of each of them (`ghost.in_groups`); and
4. the new running average (`running_average.update_stored`).

In training, step 3 is computed again for the backward pass, from the input and one value or two for each channel.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from jaxtyping import Array, ArrayLike

from flaxbn.arithmetic.averages import at_steps
from flaxbn.arithmetic.measure import SUMS, measure_deviations
from flaxbn.arithmetic.moments import shifted, widen
from flaxbn.arithmetic.normalize import normalize
from flaxbn.arithmetic.renorm import Statistics, corrected_affine, correction
from flaxbn.layers.arguments import Mode, Options
from flaxbn.layers.arranged import Arranged, arrange, check_values
from flaxbn.layers.batch import Batch
from flaxbn.layers.ghost import in_groups, merged, spread_in_group
from flaxbn.layers.running_average import Stored, read_steps, row_of, update_stored

_Compute = Callable[..., tuple[Array, "Batch | None"]]
_KEEP_SUMS = jax.checkpoint_policies.save_only_these_names(SUMS)


class _Statistics(NamedTuple):
    mean: Array
    var: Array


class _Bounds(NamedTuple):
    """The bounds of renormalization, shaped to broadcast against statistics."""

    r_max: Array
    d_max: Array


class _Running(NamedTuple):
    """What is stored for the batch, as it was before.

    Attributes:
        mean, var: the running average, of all domains, or of that of the batch.
        exists: whether there is a row for the batch's domain: a traced number cannot raise, and NaN shows a wrong one.
        bounds: those of renormalization after so many updates; None where there is none.
    """

    mean: Array
    var: Array
    exists: Array | None
    bounds: _Bounds | None


class _Selected(NamedTuple):
    """What to normalize by: the mean is `pivot + residual`, which is None in evaluation, where it would be 0."""

    pivot: Array
    residual: Any
    var: Array


def run_layer(
    options: Options,
    mode: Mode,
    x: Array,
    stored: Stored,
    scale: Array | None,
    bias: Array | None,
    *,
    mask: ArrayLike | None,
    domain: ArrayLike | None,
) -> tuple[Array, Stored]:
    """The output of a layer, and what it stores afterwards.

    Args:
        options: what the layer is.
        mode: what this call is to do.
        x: the input.
        stored: the running average before this batch.
        scale, bias: the affine parameters, of shape (*channels), or with `domain_affine` (num_domains, *channels).
        mask: the positions that count, as `BatchNorm.__call__` takes it.
        domain: the domain of the batch or of each example, likewise.

    Returns:
        The output, in the layer's dtype; and `stored` as it is where `mode` asks for no update.

    Raises:
        ValueError: for masks, domains and axes that `layers.arguments` refuses, and for a single value per channel.
        TypeError: for domain numbers that are no integers, and for complex input to a layer that renormalizes.
    """
    dtype = canonicalize_dtype(x, scale, bias, dtype=options.dtype)
    arranged = arrange(options, mode, x, mask, domain)
    running = _read(options, mode, stored, arranged.row)
    if options.domain_affine:
        scale, bias = row_of(scale, arranged.row), row_of(bias, arranged.row)
    if mode.measures:
        check_values(options, mode, arranged)
    compute: _Compute = functools.partial(_output, options, mode, dtype)
    if mode.normalizes_by_batch:
        compute = jax.checkpoint(compute, prevent_cse=False, policy=_KEEP_SUMS)
    y, batch = compute(arranged, running, scale, bias)
    if mode.update and batch is not None:
        batch = batch if options.group_size(mode) is None else merged(options, arranged, batch)
        found = shifted(batch.deviations, batch.pivot)
        stored = update_stored(options, stored, running, found, batch.usable, arranged.row)
    return y, stored


def _read(options: Options, mode: Mode, stored: Stored, row: Array | None) -> _Running:
    """What is stored for the batch: all of it, or the row of its domain."""
    mean, var = row_of(stored.mean, row), row_of(stored.var, row)
    exists, bounds = None if row is None else row < len(stored.mean), None
    if options.r_max is not None and not mode.use_running_average:
        steps = row_of(read_steps(stored, options.num_domains), row)
        bounds = _Bounds(*(at_steps(bound, steps, var.ndim) for bound in (options.r_max, options.d_max)))
    return _Running(mean, var, exists, bounds)


def _output(
    options: Options,
    mode: Mode,
    dtype: Any,
    arranged: Arranged,
    running: _Running,
    scale: Array | None,
    bias: Array | None,
) -> tuple[Array, Batch | None]:
    """The output, in `dtype`, and the statistics of the batch where they are measured, constants to differentiation.

    Where the examples normalize in groups they are those of each group.

    What is excluded by a mask and not finite, which would spoil gradients even there, is 0 from here on. `x` is cast
    once for all that is made of it, since of two casts autodiff would round both cotangents to half precision.
    """
    x = arranged.x
    how = _how_to_measure(options, mode, x)
    if arranged.weights is not None:
        x = jnp.where((arranged.weights > 0) | jnp.isfinite(x), x, 0)
    arranged = arranged._replace(x=x.astype(widen(x.dtype)))
    compute = functools.partial(_normalized, options, mode, how, running=running, scale=scale, bias=bias)
    size = options.group_size(mode)
    y, batch = compute(arranged) if size is None else in_groups(compute, size, arranged)
    y = y.astype(dtype)
    y = y if options.activation is None else options.activation(y)
    return y, jax.lax.stop_gradient(batch)


def _normalized(
    options: Options,
    mode: Mode,
    how: dict[str, Any],
    arranged: Arranged,
    *,
    running: _Running,
    scale: Array | None,
    bias: Array | None,
) -> tuple[Array, Batch | None]:
    """The output, not cast yet, and the statistics of the batch, or of the group, where they are measured."""
    selected, batch = _Selected(running.mean, None, running.var), None
    if mode.measures:
        batch = _measure(options, how, arranged)
    if batch is not None and not mode.use_running_average:
        selected = _select(batch, running, arranged.weights is not None)
        if running.bounds is not None:
            scale, bias = _renormalize(options, selected, running, running.bounds, scale, bias)
    y = normalize(
        arranged.x,
        selected.pivot,
        selected.var,
        scale=_leading(scale, selected.pivot),
        bias=_leading(bias, selected.pivot),
        epsilon=options.epsilon,
        residual=selected.residual,
        spread=arranged.sharing.spread if how["lanes"] == 1 else spread_in_group(arranged.sharing),
    )
    return y, batch


def _how_to_measure(options: Options, mode: Mode, x: Array) -> dict[str, Any]:
    """The options of `measure_deviations` for the input as it is given: over all members, or for a group by itself."""
    size = options.group_size(mode)
    alone = mode.initializing or size is not None
    return {
        "fast": options.use_fast_variance,
        "dtype": None if options.force_float32_reductions else (options.dtype or x.dtype),
        "axis_name": None if alone else options.axis_name,
        "axis_index_groups": options.axis_index_groups,
        "lanes": 1 if size is None else len(x) // size,
    }


def _measure(options: Options, how: dict[str, Any], arranged: Arranged) -> Batch:
    """The statistics of the batch, or of a group."""
    measured = measure_deviations(arranged.x, arranged.sharing, weights=arranged.weights, **how)
    pivot, deviations, *_ = measured
    hides_some = arranged.weights is not None or arranged.sharing.domain is not None
    enough = measured.several if hides_some and not options.accepts_single_value else deviations.count > 0
    return Batch(pivot, deviations, enough & ~measured.overflow)


def _select(batch: Batch, running: _Running, weighted: bool) -> _Selected:
    """What training normalizes by: the statistics of the batch, and the running average where they cannot be used.

    Both means are taken about the batch's pivot, so that deviations from it are computed once. What a mask hides all of
    has none, and an output all the same.
    """
    pivot = jnp.where(batch.deviations.count > 0, batch.pivot, running.mean) if weighted else batch.pivot
    pivot = jax.lax.stop_gradient(pivot)
    residual = jnp.where(batch.usable, batch.deviations.mean, running.mean - pivot)
    if running.exists is not None:
        residual = jnp.where(running.exists, residual, jnp.nan)
    return _Selected(pivot, residual, jnp.where(batch.usable, batch.deviations.var, running.var))


def _renormalize(
    options: Options,
    selected: _Selected,
    running: Statistics,
    bounds: _Bounds,
    scale: Array | None,
    bias: Array | None,
) -> tuple[Array, Array]:
    """The affine parameters that renormalize, too: `(y * r + d) * scale + bias` of the normalized y.

    The running average is that before this batch's update, and both means are taken about the pivot, so that their
    difference, on which `d` rests, is not that of rounded numbers.
    """
    if jnp.iscomplexobj(selected.pivot):
        raise TypeError(
            f"BatchRenorm takes real input, since its offset d is clipped: got {selected.pivot.dtype}. "
            "Use BatchNorm for complex input."
        )
    batch = _Statistics(selected.residual, selected.var)
    about_pivot = _Statistics(running.mean - selected.pivot, running.var)
    corrected = correction(batch, about_pivot, r_max=bounds.r_max, d_max=bounds.d_max, epsilon=options.epsilon)
    return corrected_affine(corrected, _leading(scale, selected.var), _leading(bias, selected.var))


def _leading(a: Array | None, like: Array) -> Array | None:
    """Parameters shaped to the rank of statistics, which may have an axis of domains in front."""
    return None if a is None else a.reshape((1,) * (like.ndim - a.ndim) + a.shape)
