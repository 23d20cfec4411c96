"""`BatchNorm` and `BatchRenorm` for flax.linen: shells that own the variables and call the ground floor."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.linen.dtypes import canonicalize_dtype
from jaxtyping import Array, ArrayLike, Inexact, Shaped

from flaxbn.moments import Moments, measure_deviations, widen
from flaxbn.normalize import ema, normalize
from flaxbn.renorm import Statistics, corrected_affine, correction, paper_d_max, paper_r_max


class BatchNorm(nn.Module):
    """Batch normalization (Ioffe & Szegedy 2015), a drop-in for `flax.linen.BatchNorm`.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    with one `mean` and (biased) `var` for every channel: in training those of the batch, in evaluation the running
    average. Unlike Flax's layer it computes the variance in two passes by default, honours the weights in a mask, and
    keeps *using* batch statistics and *updating* the running average apart, so that a model can be validated with
    batch statistics while nothing is mutable.

    Variables: params `scale` and `bias`; in the collection `batch_stats`, `mean` and `var`, float32 (`mean` complex64
    if the input is complex) whatever `dtype` is, of the shape of the feature axes.

    Attributes:
        use_running_average: True in evaluation, False in training; give it here or at the call.
        axis: the feature axis, or several.
        momentum: the weight of the old value in the running average.
        epsilon: what is added to the variance.
        dtype: of the output; by default that to which the input and the parameters promote.
        param_dtype: of `scale` and `bias`.
        use_bias, use_scale: whether there is a `bias`, a `scale`.
        bias_init, scale_init: their initializers.
        axis_name: the axis of `jax.pmap`, `jax.vmap` or `jax.shard_map` over which batch statistics are merged,
            weighted by count. Under `jax.jit` with sharded arrays none is needed.
        axis_index_groups: merge within these groups of the axis only.
        use_fast_variance: compute the variance in one pass, less accurately; see `flaxbn.measure`.
        force_float32_reductions: compute batch statistics in float32 or wider; otherwise in `dtype`.
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    axis_name: Any = None
    axis_index_groups: Any = None
    use_fast_variance: bool = False
    force_float32_reductions: bool = True

    @nn.compact
    def __call__(
        self,
        x: Shaped[Array, "..."],
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
        update_running_average: bool | None = None,
    ) -> Inexact[Array, "..."]:
        """Normalizes `x`.

        Args:
            x: the input.
            use_running_average: normalize by the running average (evaluation) or by the batch (training); give it
                here or to the constructor.
            mask: the positions that count, as bool or float weights: of the rank of `x`, each axis equal to that of
                `x` or 1; or, with a single feature axis, exactly the shape of `x` without it. What a masked position
                holds, NaN included, reaches neither statistics, gradients nor other positions.
            update_running_average: update the stored statistics with this batch; by default in training. Channels
                of total weight 0, or whose batch statistics are not finite, are not updated.

        Returns:
            The normalized input, in `dtype`. Channels of total weight 0 are normalized by the running average.

        Raises:
            ValueError: if an update is asked for and `batch_stats` is not mutable; if the batch has one value per
                channel, which would make the output constant; if the shape of `mask` is another one.
        """
        use_running_average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        update = not use_running_average if update_running_average is None else update_running_average
        update = update and not self.is_initializing()
        x = jnp.asarray(x)
        features = feature_axes(x.ndim, self.axis)
        others = tuple(axis for axis in range(x.ndim) if axis not in features)
        weights = None if mask is None else position_weights(mask, x.shape, features)
        if update and not self.is_mutable_collection("batch_stats"):
            raise ValueError(_immutable_message(self))

        shape = tuple(x.shape[axis] for axis in features)
        stored_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, _stored_dtype(x.dtype))
        stored_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = self.param("scale", self.scale_init, shape, self.param_dtype) if self.use_scale else None
        bias = self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None
        dtype = canonicalize_dtype(x, scale, bias, dtype=self.dtype)

        running = used = _Statistics(stored_mean.value, stored_var.value)
        pivot, residual = running.mean, None
        if update or not use_running_average:
            batch_pivot, deviation = self._measure(x, others, weights)
            batch = deviation._replace(mean=batch_pivot + deviation.mean)
        if not use_running_average:
            seen = batch.count > 0
            pivot, residual = jnp.where(seen, batch_pivot, running.mean), deviation.mean
            used = _Statistics(jnp.where(seen, batch.mean, running.mean), jnp.where(seen, batch.var, running.var))
            scale, bias = self._training_affine(used, running, scale, bias)
        if update:
            usable = (batch.count > 0) & jnp.isfinite(batch.mean) & jnp.isfinite(batch.var)
            stored_mean.value = _updated(running.mean, batch.mean, self.momentum, usable)
            stored_var.value = _updated(running.var, batch.var, self.momentum, usable)
        if update or self.is_initializing():
            self._count_update(jnp.any(usable) if update else False)

        def spread(a: Any) -> Any:
            return None if a is None else jnp.expand_dims(a, others)

        y = normalize(
            x,
            spread(pivot),
            spread(used.var),
            scale=spread(scale),
            bias=spread(bias),
            epsilon=self.epsilon,
            residual=spread(residual),
        )
        return y.astype(dtype)

    @nn.nowrap
    def _measure(self, x: Array, axes: tuple[int, ...], weights: Array | None) -> tuple[Array, Moments]:
        axis_name = None if self.is_initializing() else self.axis_name
        values = math.prod(x.shape[axis] for axis in axes) * _members(axis_name, self.axis_index_groups)
        if values == 1 and not self.is_initializing() and not self._accepts_single_value():
            raise ValueError(_single_value_message(self, x.shape))
        return measure_deviations(
            x,
            axes,
            weights=weights,
            fast=self.use_fast_variance,
            dtype=None if self.force_float32_reductions else (self.dtype or x.dtype),
            axis_name=axis_name,
            axis_index_groups=self.axis_index_groups,
        )

    @nn.nowrap
    def _accepts_single_value(self) -> bool:
        return False

    @nn.nowrap
    def _training_affine(
        self, batch: Statistics, running: Statistics, scale: Array | None, bias: Array | None
    ) -> tuple[Array | None, Array | None]:
        del batch, running
        return scale, bias

    @nn.nowrap
    def _count_update(self, updated: ArrayLike) -> None:
        del updated


class BatchRenorm(BatchNorm):
    """Batch renormalization (Ioffe 2017): batch normalization tied to the running average while training.

        y = ((x - mean_B) / sqrt(var_B + epsilon) * r + d) * scale + bias

    `r` and `d` are those of `flaxbn.correction`, from the running average before this batch's update. In evaluation
    it is `BatchNorm`. Where nothing is clipped, training and evaluation give the same output; with `r_max=1, d_max=0`
    it is `BatchNorm` in training too. Complex input is a TypeError. One value per channel is allowed in training if
    `d_max` is a positive number.

    Adds to `batch_stats` the number of updates, `steps`, int32: read in training only, 0 where it is missing.

    Attributes:
        r_max: the bound of `r`: a number of at least 1, or an optax schedule of `steps`.
        d_max: the bound of `|d|`: a number of at least 0, or an optax schedule of `steps`.
    """

    r_max: float | optax.Schedule = paper_r_max
    d_max: float | optax.Schedule = paper_d_max

    def __post_init__(self) -> None:
        for name, least in (("r_max", 1), ("d_max", 0)):
            bound = getattr(self, name)
            if not callable(bound) and not bound >= least:
                raise ValueError(f"`{name}` must be at least {least}, or a schedule: got {bound}.")
        super().__post_init__()

    @nn.nowrap
    def _accepts_single_value(self) -> bool:
        return not callable(self.d_max) and self.d_max > 0

    @nn.nowrap
    def _training_affine(
        self, batch: Statistics, running: Statistics, scale: Array | None, bias: Array | None
    ) -> tuple[Array | None, Array | None]:
        if jnp.iscomplexobj(batch.mean):
            raise TypeError(
                f"BatchRenorm takes real input, since its offset d is clipped: got {batch.mean.dtype}. "
                "Use BatchNorm for complex input."
            )
        steps = self._steps()
        r_max = self.r_max(steps) if callable(self.r_max) else self.r_max
        d_max = self.d_max(steps) if callable(self.d_max) else self.d_max
        corrected = correction(batch, running, r_max=r_max, d_max=d_max, epsilon=self.epsilon)
        return corrected_affine(corrected, scale, bias)

    @nn.nowrap
    def _count_update(self, updated: ArrayLike) -> None:
        steps = self._steps()
        self.put_variable("batch_stats", "steps", steps + jnp.asarray(updated, jnp.int32))

    @nn.nowrap
    def _steps(self) -> Array:
        """The stored step count, also where averaging tools have made it a float."""
        return jnp.round(jnp.asarray(self.get_variable("batch_stats", "steps", 0))).astype(jnp.int32)


class _Statistics(NamedTuple):
    mean: Array
    var: Array


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


def _updated(old: Array, new: Array, momentum: float, usable: Array) -> Array:
    dtype = jnp.promote_types(widen(old.dtype), _stored_dtype(new.dtype))
    return jax.lax.stop_gradient(jnp.where(usable, ema(old, new, momentum), old)).astype(dtype)


def _stored_dtype(dtype: Any) -> Any:
    return jnp.complex64 if jnp.issubdtype(dtype, jnp.complexfloating) else jnp.float32


def _members(axis_name: Any, axis_index_groups: Any) -> int:
    if axis_name is None:
        return 1
    if axis_index_groups is not None:
        return min(len(group) for group in axis_index_groups)
    return jax.lax.psum(1, axis_name)


def _immutable_message(layer: nn.Module) -> str:
    return (
        f"{type(layer).__name__} {_path(layer)} updates its running average, so the collection 'batch_stats' must be "
        "mutable: it is not. Either\n"
        '- pass `mutable=["batch_stats"]` to `apply`, and keep the collection that it returns; or\n'
        "- to normalize by batch statistics without an update, pass `update_running_average=False`, or call "
        '`flaxbn.apply(model, variables, batch, statistics="batch")`; or\n'
        "- inside `nn.scan`, list 'batch_stats' in `variable_axes` or `variable_carry`."
    )


def _single_value_message(layer: nn.Module, shape: tuple[int, ...]) -> str:
    return (
        f"{type(layer).__name__} {_path(layer)} normalizes by batch statistics, which needs more than one value per "
        f"channel: got an input of shape {shape} with feature axis {layer.axis}, so its output would be constant. "
        "Use a larger batch (drop a last batch of one), or `use_running_average=True` for evaluation."
    )


def _path(layer: nn.Module) -> str:
    return f"'{'/'.join(layer.path)}'"
