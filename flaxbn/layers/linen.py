"""`BatchNorm` and `BatchRenorm` for flax.linen: shells that own the variables and call the ground floor."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.linen.dtypes import canonicalize_dtype
from jaxtyping import Array, Inexact, Int, Shaped

from flaxbn.arithmetic.groups import Sharing
from flaxbn.arithmetic.moments import Moments, measure_deviations, members, widen
from flaxbn.arithmetic.normalize import ema, normalize
from flaxbn.arithmetic.renorm import Statistics, corrected_affine, correction, paper_d_max, paper_r_max
from flaxbn.layers.arguments import domain_of, feature_axes, position_weights
from flaxbn.layers.names import layer_name


class BatchNorm(nn.Module):
    """Batch normalization (Ioffe & Szegedy 2015), a drop-in for `flax.linen.BatchNorm`.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    with one `mean` and (biased) `var` for every channel: in training those of the batch, over positions i of weight
    w_i (1 without a mask), in evaluation the running average of these.

        mean = sum_i w_i x_i / sum_i w_i
        var = sum_i w_i |x_i - mean|^2 / sum_i w_i

    With `num_domains` there is one pair for every domain, whose sums run over the positions of its examples.

    Unlike Flax's layer it computes the variance in two passes by default, honours the weights in a mask, and keeps
    *using* batch statistics and *updating* the running average apart, so that a model can be validated with batch
    statistics while nothing is mutable.

    Variables: params `scale` and `bias`; in the collection `batch_stats`, `mean` and `var`, float32 (`mean` complex64
    if the input is complex) whatever `dtype` is, of the shape of the feature axes.

    Attributes:
        use_running_average: True in evaluation, False in training; give it here or at the call.
        axis: the feature axis, or several.
        momentum: the weight of the old value in the running average.
        epsilon: what is added to the variance.
        dtype: of the output; by default that to which the input and the parameters promote.
        param_dtype: of `scale` and `bias`.
        use_bias: whether there is a `bias`.
        use_scale: whether there is a `scale`.
        bias_init: the initializer of `bias`.
        scale_init: that of `scale`.
        axis_name: the axis of `jax.pmap`, `jax.vmap` or `jax.shard_map` over which batch statistics are merged,
            weighted by count. Under `jax.jit` with sharded arrays none is needed.
        axis_index_groups: merge within these groups of the axis only.
        use_fast_variance: compute the variance in one pass, less accurately; see `flaxbn.measure`.
        force_float32_reductions: compute batch statistics in float32 or wider; otherwise in `dtype`.
        num_domains: keep statistics of their own for so many domains: `mean` and `var` get a leading axis, and the
            call takes `domain`. For training and inference on several datasets with shared weights.
        domain_affine: keep a `scale` and a `bias` for each domain, too.
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
    num_domains: int | None = None
    domain_affine: bool = False

    def __post_init__(self) -> None:
        if self.num_domains is not None and (not isinstance(self.num_domains, int) or self.num_domains < 1):
            raise ValueError(f"`num_domains` must be a positive integer: got {self.num_domains!r}.")
        if self.domain_affine and self.num_domains is None:
            raise ValueError("`domain_affine` needs `num_domains`: got none.")
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Shaped[Array, "..."],
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
        domain: int | Int[Array, ""] | Int[Array, " batch"] | None = None,
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
            domain: with `num_domains`, the number of the domain of the whole batch, or an int array (B,) along the
                leading axis with that of each example. Each example is normalized by the statistics of its domain,
                exactly as if it ran with the examples of that domain alone. A domain without examples is not updated,
                nor is one with a single value per channel, which is normalized by its running average.
                A traced number out of range updates nothing and gives NaN.
            update_running_average: update the stored statistics with this batch; by default in training. Channels
                of total weight 0, or whose batch statistics are not finite, are not updated.

        Returns:
            The normalized input, in `dtype`. Channels of total weight 0 are normalized by the running average.

        Raises:
            ValueError: if an update is asked for and `batch_stats` is not mutable; if the batch has one value per
                channel, which would make the output constant; if the shape of `mask` is another one; if `domain` is
                missing or does not belong, is out of range, or has another shape.
            TypeError: if `domain` is not of integers.
        """
        use_running_average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        update = not use_running_average if update_running_average is None else update_running_average
        update = update and not self.is_initializing()
        x = jnp.asarray(x)
        features = feature_axes(x.ndim, self.axis)
        others = tuple(axis for axis in range(x.ndim) if axis not in features)
        weights = None if mask is None else position_weights(mask, x.shape, features)
        if weights is not None:
            x = jnp.where((weights > 0) | jnp.isfinite(x), x, 0)
        domain = domain_of(domain, self.num_domains, x.shape, features)
        if update and not self.is_mutable_collection("batch_stats"):
            raise ValueError(_immutable_message(self))

        channels = tuple(x.shape[axis] for axis in features)
        stored_mean, stored_var, scale, bias = self._variables(channels, x.dtype)
        dtype = canonicalize_dtype(x, scale, bias, dtype=self.dtype)

        measured = update or not use_running_average
        if domain is not None and domain.ndim == 0 and measured and self._members_may_differ(features):
            domain = jnp.broadcast_to(domain, x.shape[:1])
        row = domain if domain is not None and domain.ndim == 0 else None
        sharing = Sharing(others) if row is not None else Sharing(others, domain, self.num_domains)
        if self.domain_affine:
            scale, bias = _row(scale, row), _row(bias, row)
        running = _Statistics(_row(stored_mean.value, row), _row(stored_var.value, row))
        pivot, residual, var = running.mean, None, running.var
        if measured:
            batch_pivot, deviation = self._measure(x, sharing, weights)
            batch = deviation._replace(mean=batch_pivot + deviation.mean)
            seen = batch.count > self._least_count(sharing, mask)
        if not use_running_average:
            pivot = jnp.where(seen, batch_pivot, running.mean)
            if row is not None:
                pivot = jnp.where(row < stored_mean.value.shape[0], pivot, jnp.nan)
            residual, var = jnp.where(seen, deviation.mean, 0), jnp.where(seen, batch.var, running.var)
            about_pivot = _Statistics(residual, var), _Statistics(running.mean - pivot, running.var)
            scale, bias = self._training_affine(*about_pivot, scale, bias, row)
        if update:
            usable = seen & jnp.isfinite(batch.mean) & jnp.isfinite(batch.var)
            for variable, old, new in zip((stored_mean, stored_var), running, batch[1:]):
                variable.value = _with_row(variable.value, row, _updated(old, new, self.momentum, usable))
        if update or self.is_initializing():
            self._count_update(jnp.any(usable, [-1 - i for i in range(len(channels))]) if update else None, row)

        y = normalize(
            x,
            pivot,
            var,
            scale=_leading(scale, pivot),
            bias=_leading(bias, pivot),
            epsilon=self.epsilon,
            residual=residual,
            spread=sharing.spread,
        )
        return y.astype(dtype)

    @nn.nowrap
    def _variables(
        self, channels: tuple[int, ...], dtype: Any
    ) -> tuple[nn.Variable[Any], nn.Variable[Any], Array | None, Array | None]:
        shape = channels if self.num_domains is None else (self.num_domains, *channels)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, _stored_dtype(dtype))
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        affine_shape = shape if self.domain_affine else channels
        scale = self.param("scale", self.scale_init, affine_shape, self.param_dtype) if self.use_scale else None
        bias = self.param("bias", self.bias_init, affine_shape, self.param_dtype) if self.use_bias else None
        return mean, var, scale, bias

    @nn.nowrap
    def _measure(self, x: Array, sharing: Sharing, weights: Array | None) -> tuple[Array, Moments]:
        axis_name = None if self.is_initializing() else self.axis_name
        values = math.prod(x.shape[axis] for axis in sharing.axes) * members(axis_name, self.axis_index_groups)
        if values == 1 and not self.is_initializing() and not self._accepts_single_value():
            raise ValueError(_single_value_message(self, x.shape))
        return measure_deviations(
            x,
            sharing,
            weights=weights,
            fast=self.use_fast_variance,
            dtype=None if self.force_float32_reductions else (self.dtype or x.dtype),
            axis_name=axis_name,
            axis_index_groups=self.axis_index_groups,
        )

    @nn.nowrap
    def _members_may_differ(self, features: tuple[int, ...]) -> bool:
        """Whether members of `axis_name` may run different domains, which are then told apart by example."""
        if self.axis_name is None or self.is_initializing():
            return False
        if 0 in features:
            raise ValueError(
                "With `num_domains` and `axis_name` the leading axis of x must be that of examples: got feature axes "
                f"{features}."
            )
        return True

    @nn.nowrap
    def _least_count(self, sharing: Sharing, mask: Array | None) -> int:
        """Statistics of this weight or less are not used; a domain's single value would have a constant output."""
        single = sharing.domain is not None and not self._accepts_single_value()
        return int(single and (mask is None or jnp.asarray(mask).dtype == bool))

    @nn.nowrap
    def _accepts_single_value(self) -> bool:
        return False

    @nn.nowrap
    def _training_affine(
        self, batch: Statistics, running: Statistics, scale: Array | None, bias: Array | None, row: Array | None
    ) -> tuple[Array | None, Array | None]:
        del batch, running, row
        return scale, bias

    @nn.nowrap
    def _count_update(self, updated: Array | None, row: Array | None) -> None:
        del updated, row


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
        self, batch: Statistics, running: Statistics, scale: Array | None, bias: Array | None, row: Array | None
    ) -> tuple[Array | None, Array | None]:
        if jnp.iscomplexobj(batch.mean):
            raise TypeError(
                f"BatchRenorm takes real input, since its offset d is clipped: got {batch.mean.dtype}. "
                "Use BatchNorm for complex input."
            )
        steps = _row(self._steps(), row)
        bounds = (_scheduled(b, steps) for b in (self.r_max, self.d_max))
        r_max, d_max = (_expanded(b, batch.var.ndim) for b in bounds)
        corrected = correction(batch, running, r_max=r_max, d_max=d_max, epsilon=self.epsilon)
        return corrected_affine(corrected, _leading(scale, batch.var), _leading(bias, batch.var))

    @nn.nowrap
    def _count_update(self, updated: Array | None, row: Array | None) -> None:
        steps = self._steps()
        if updated is not None:
            steps = _with_row(steps, row, _row(steps, row) + updated)
        self.put_variable("batch_stats", "steps", steps.astype(jnp.int32))

    @nn.nowrap
    def _steps(self) -> Array:
        """The stored step count, also where averaging tools have made it a float."""
        missing = jnp.zeros(() if self.num_domains is None else (self.num_domains,), jnp.int32)
        return jnp.round(jnp.asarray(self.get_variable("batch_stats", "steps", missing))).astype(jnp.int32)


class _Statistics(NamedTuple):
    mean: Array
    var: Array


def _row(a: Any, row: Array | None) -> Any:
    return a if a is None or row is None else a.at[row].get(mode="fill", fill_value=None)


def _with_row(a: Array, row: Array | None, new: Array) -> Array:
    return new if row is None else a.astype(new.dtype).at[row].set(new, mode="drop")


def _scheduled(bound: float | optax.Schedule, steps: Array) -> Any:
    """A bound at a step, or at each of several: schedules take one."""
    if not callable(bound):
        return bound
    return jax.vmap(bound)(steps) if steps.ndim else bound(steps)


def _expanded(bound: Any, ndim: int) -> Any:
    """A bound for each domain, shaped to broadcast against statistics; one bound for all as it is."""
    bound = jnp.asarray(bound)
    return bound.reshape(bound.shape + (1,) * (ndim - bound.ndim)) if bound.ndim else bound


def _leading(a: Array | None, like: Array) -> Array | None:
    return None if a is None else a.reshape((1,) * (like.ndim - a.ndim) + a.shape)


def _updated(old: Array, new: Array, momentum: float, usable: Array) -> Array:
    dtype = jnp.promote_types(widen(old.dtype), _stored_dtype(new.dtype))
    old = old.astype(dtype)
    return jax.lax.stop_gradient(jnp.where(usable, ema(old, new.astype(dtype), momentum), old))


def _stored_dtype(dtype: Any) -> Any:
    return jnp.complex64 if jnp.issubdtype(dtype, jnp.complexfloating) else jnp.float32


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
    return f"'{layer_name(layer.path)}'"
