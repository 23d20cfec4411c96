"""What a batch-norm layer computes, whoever owns its variables.

A shell for one of Flax's APIs passes in what it stores, and stores what comes back; nothing here creates a variable,
and no shell does arithmetic. `run_layer` reads in the order of the computation:

1. where statistics are shared, and which positions count (`_arrange`),
2. the statistics of the batch (`_measure`),
3. those to normalize by, of the batch or the running average (`_select`), with renormalization's r and d folded into
   the affine parameters (`_renormalize`),
4. the output (`flaxbn.normalize`), and
5. the new running average (`running_average.update_stored`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from jaxtyping import Array, ArrayLike

from flaxbn.arithmetic.groups import Sharing, values_per_channel
from flaxbn.arithmetic.measure import SUMS, measure_deviations
from flaxbn.arithmetic.moments import Moments, shifted, widen
from flaxbn.arithmetic.normalize import normalize
from flaxbn.arithmetic.renorm import Statistics, corrected_affine, correction
from flaxbn.layers.arguments import Mode, Options, domain_of, feature_axes, position_weights
from flaxbn.layers.running_average import Stored, read_steps, row_of, update_stored

_Compute = Callable[..., tuple[Array, "_Batch | None"]]
_KEEP_SUMS = jax.checkpoint_policies.save_only_these_names(SUMS)


class _Arranged(NamedTuple):
    """An input, and which of its positions share statistics.

    Attributes:
        x: the values.
        weights: the mask as weights of the rank of `x`, or None.
        sharing: what the statistics are sums over.
        row: where the whole batch is of one domain, its number: the layer runs on that row of what is stored.
        least_count: statistics of this weight or less are not used.
    """

    x: Array
    weights: Array | None
    sharing: Sharing
    row: Array | None
    least_count: int


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


class _Batch(NamedTuple):
    """The statistics of a batch, whose mean is `pivot + deviations.mean` before that sum is rounded.

    Attributes:
        pivot: a constant to differentiation.
        deviations: the Moments of `x - pivot`.
        seen: for each channel, whether enough positions count for its statistics to be used.
    """

    pivot: Array
    deviations: Moments
    seen: Array


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
    arranged = _arrange(options, mode, x, mask, domain)
    running = _read(options, mode, stored, arranged.row)
    if options.domain_affine:
        scale, bias = row_of(scale, arranged.row), row_of(bias, arranged.row)
    if mode.measures:
        _check_values(options, mode, arranged)
    compute: _Compute = functools.partial(_normalize, options, mode, dtype)
    if not (mode.use_running_average or mode.initializing):
        compute = jax.checkpoint(compute, prevent_cse=False, policy=_KEEP_SUMS)
    y, batch = compute(arranged, running, scale, bias)
    if mode.update and batch is not None:
        found = shifted(batch.deviations, batch.pivot)
        stored = update_stored(options, stored, running, found, batch.seen, arranged.row)
    return y, stored


def _read(options: Options, mode: Mode, stored: Stored, row: Array | None) -> _Running:
    mean, var = row_of(stored.mean, row), row_of(stored.var, row)
    exists, bounds = None if row is None else row < len(stored.mean), None
    if options.r_max is not None and not mode.use_running_average:
        steps = row_of(read_steps(stored, options.num_domains), row)
        bounds = _Bounds(*(_at_steps(bound, steps, var.ndim) for bound in (options.r_max, options.d_max)))
    return _Running(mean, var, exists, bounds)


def _at_steps(bound: Any, steps: Array, ndim: int) -> Array:
    """A bound after so many updates, shaped to broadcast against statistics of rank `ndim`.

    Domains have counts of their own, and a schedule takes one step at a time: it is asked for each of them.
    """
    if callable(bound):
        bound = jax.vmap(bound)(steps) if steps.ndim else bound(steps)
    bound = jnp.asarray(bound)
    return bound.reshape(bound.shape + (1,) * (ndim - bound.ndim)) if bound.ndim else bound


def _normalize(
    options: Options,
    mode: Mode,
    dtype: Any,
    arranged: _Arranged,
    running: _Running,
    scale: Array | None,
    bias: Array | None,
) -> tuple[Array, _Batch | None]:
    """The output, in `dtype`, and the statistics of the batch where they are measured, constants to differentiation.

    In training a backward pass computes it again from its arguments and what `measure_deviations` has summed. What is
    excluded by a mask and not finite, which would spoil gradients even there, is 0 from here on; and `x` is cast once,
    since autodiff would round two cotangents of half precision, and then add them.
    """
    x = arranged.x
    if arranged.weights is not None:
        x = jnp.where((arranged.weights > 0) | jnp.isfinite(x), x, 0)
    x = x.astype(widen(x.dtype))
    selected, batch = _Selected(running.mean, None, running.var), None
    if mode.measures:
        batch = _measure(options, mode, arranged, x)
    if batch is not None and not mode.use_running_average:
        selected = _select(batch, running, arranged.weights is not None)
        if running.bounds is not None:
            scale, bias = _renormalize(options, selected, running, running.bounds, scale, bias)
    y = normalize(
        x,
        selected.pivot,
        selected.var,
        scale=_leading(scale, selected.pivot),
        bias=_leading(bias, selected.pivot),
        epsilon=options.epsilon,
        residual=selected.residual,
        spread=arranged.sharing.spread,
    )
    return y.astype(dtype), jax.lax.stop_gradient(batch)


def _arrange(options: Options, mode: Mode, x: Array, mask: Any, domain: Any) -> _Arranged:
    """Checks what a call is given, and finds out over what its statistics are sums.

    A batch of one domain runs as a plain layer does, on that domain's row. Only where members of a mapped axis bring
    batches of different domains must the sums be told apart, and the batch is one of mixed domains to each of them.
    """
    features = feature_axes(x.ndim, options.axis)
    axes = tuple(axis for axis in range(x.ndim) if axis not in features)
    weights = None if mask is None else position_weights(mask, x.shape, features)
    numbers = domain_of(domain, options.num_domains, x.shape, features)
    row = None
    if numbers is not None and not numbers.ndim:
        if mode.measures and _members_may_differ(options, mode, features):
            numbers = jnp.broadcast_to(numbers, x.shape[:1])
        else:
            row, numbers = numbers, None
    sharing = Sharing(axes) if numbers is None else Sharing(axes, numbers, options.num_domains)
    return _Arranged(x, weights, sharing, row, _least_count(options, sharing, mask))


def _members_may_differ(options: Options, mode: Mode, features: tuple[int, ...]) -> bool:
    """Whether members of `axis_name` may run different domains, which are then told apart by example."""
    if options.axis_name is None or mode.initializing:
        return False
    if 0 in features:
        raise ValueError(
            "With `num_domains` and `axis_name` the leading axis of x must be that of examples: got feature axes "
            f"{features}."
        )
    return True


def _least_count(options: Options, sharing: Sharing, mask: Any) -> int:
    """The weight up to which statistics are not used: 1 for a single value of a domain, whose output would be constant.

    It counts 1 where weights are 0 or 1; of other weights, one value cannot be told from several.
    """
    single = sharing.domain is not None and not options.accepts_single_value
    return int(single and (mask is None or jnp.asarray(mask).dtype == bool))


def _check_values(options: Options, mode: Mode, arranged: _Arranged) -> None:
    """Without a mask shapes tell whether there is more than one value per channel: if not, it is an error.

    Training would go on without one, on a constant.
    """
    if mode.initializing or options.accepts_single_value:
        return
    shape, axes = arranged.x.shape, arranged.sharing.axes
    if values_per_channel(shape, axes, options.axis_name, options.axis_index_groups) == 1:
        raise ValueError(
            f"{options.label} normalizes by batch statistics, which needs more than one value per channel: got an "
            f"input of shape {shape} with feature axis {options.axis}, so its output would be constant. Use a larger "
            "batch (drop a last batch of one), or `use_running_average=True` for evaluation."
        )


def _measure(options: Options, mode: Mode, arranged: _Arranged, x: Array) -> _Batch:
    """The statistics of the batch `x`, those of other members of `axis_name` included."""
    pivot, deviations = measure_deviations(
        x,
        arranged.sharing,
        weights=arranged.weights,
        fast=options.use_fast_variance,
        dtype=None if options.force_float32_reductions else (options.dtype or arranged.x.dtype),
        axis_name=None if mode.initializing else options.axis_name,
        axis_index_groups=options.axis_index_groups,
    )
    return _Batch(pivot, deviations, deviations.count > arranged.least_count)


def _select(batch: _Batch, running: _Running, weighted: bool) -> _Selected:
    """What training normalizes by: the statistics of the batch, and the running average where there are none.

    Both means are taken about the batch's pivot, so that deviations from it are computed once. Only where a mask hides
    all positions but the layer has an output for them, there is none.
    """
    pivot = jnp.where(batch.deviations.count > 0, batch.pivot, running.mean) if weighted else batch.pivot
    pivot = jax.lax.stop_gradient(pivot)
    residual = jnp.where(batch.seen, batch.deviations.mean, running.mean - pivot)
    if running.exists is not None:
        residual = jnp.where(running.exists, residual, jnp.nan)
    return _Selected(pivot, residual, jnp.where(batch.seen, batch.deviations.var, running.var))


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
