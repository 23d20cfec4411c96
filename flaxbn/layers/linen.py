"""`BatchNorm` and `BatchRenorm` for flax.linen: shells that own variables, and compute nothing.

What their call does with them is `flaxbn.layers.core.run_layer`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Inexact, Int, Shaped

from flaxbn.arithmetic.renorm import Schedule, paper_d_max, paper_r_max
from flaxbn.layers.arguments import (
    Mode,
    check_activation,
    check_averaging,
    check_bounds,
    check_domains,
    check_virtual_batch_size,
    feature_axes,
    options_of,
)
from flaxbn.layers.core import run_layer
from flaxbn.layers.names import layer_label
from flaxbn.layers.running_average import Stored, initial_steps, stored_dtype


class BatchNorm(nn.Module):
    """Batch normalization (Ioffe & Szegedy 2015), a drop-in for `flax.linen.BatchNorm`.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    with one `mean` and (biased) `var` for every channel: in training those of the batch, over positions i of weight
    w_i (1 without a mask), in evaluation the running average of these.

        mean = sum_i w_i x_i / sum_i w_i
        var = sum_i w_i |x_i - mean|^2 / sum_i w_i

    With `num_domains` there is one pair for every domain, whose sums run over the positions of its examples.

    Unlike Flax's layer it computes the variance about a pivot by default, so that large means do no harm, honours the
    weights in a mask, and keeps *using* batch statistics and *updating* the running average apart, so that a model can
    be validated with batch statistics while nothing is mutable. For the backward pass it keeps its input and a few
    values for each channel.

    Variables: params `scale` and `bias`; in the collection `batch_stats`, `mean` and `var`, float32, or float64 where
    the input is (`mean` complex where the input is), whatever `dtype` is, of the shape of the feature axes.

    Attributes:
        use_running_average: True in evaluation, False in training; give it here or at the call.
        axis: the feature axis, or several.
        momentum: the weight of the old value in the running average; or a function of the number of updates so far
            that returns it, such as `flaxbn.cumulative` and `flaxbn.Debiased(0.99)`. The layer then counts its updates,
            in `steps`, float32, in `batch_stats`; with domains, those of each.
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
        use_fast_variance: compute the variance as `E[x^2] - E[x]^2`, less accurately; see `fast` of `flaxbn.measure`.
        force_float32_reductions: compute batch statistics in float32 or wider; otherwise in `dtype`.
        num_domains: keep statistics of their own for so many domains: `mean` and `var` get a leading axis, and the
            call takes `domain`. For training and inference on several datasets with shared weights.
        domain_affine: keep a `scale` and a `bias` for each domain, too.
        virtual_batch_size: in training, normalize so many consecutive examples by themselves (ghost batches; Hoffer et
            al. 2017), the groups along the leading axis, whose length it divides. The running average takes the moments
            of all groups, merged, once. With `axis_name`, only the running average is merged over members.
        activation: a function of the output, such as `nn.relu`, that the layer applies itself. The backward pass then
            computes its input again, where otherwise that or a mask of it is kept for each activation.

    Examples:
        >>> import flaxbn, jax, jax.numpy as jnp
        >>> layer = flaxbn.BatchNorm(momentum=0.5)
        >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
        >>> variables = layer.init(jax.random.key(0), x, use_running_average=True)
        >>> y, updated = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        >>> jnp.round(y, 3).tolist(), updated["batch_stats"]["mean"].tolist()
        ([[-1.0, -1.0], [1.0, 1.0]], [1.0, 10.0])
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float | Schedule = 0.99
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
    virtual_batch_size: int | None = None
    activation: Callable[[Array], Array] | None = None

    def __post_init__(self) -> None:
        check_averaging(self.use_running_average, self.momentum, self.epsilon)
        check_activation(self.activation)
        check_domains(self.num_domains, self.domain_affine)
        check_virtual_batch_size(self.virtual_batch_size)
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
                exactly as if it ran with the examples of that domain alone. A domain without examples is not updated.
                A traced number out of range updates nothing and gives NaN.
            update_running_average: update the stored statistics with this batch; by default in training.

        A channel is not updated, and normalized by its running average, where a mask or a domain leaves it no value or
        a single one, whose own variance is 0, or where its sums overflow. Where it holds NaN it is not updated either.

        Returns:
            The normalized input, in `dtype`, after `activation`.

        Raises:
            ValueError: if an update is asked for and `batch_stats` is not mutable; if the batch has one value per
                channel, which would make the output constant; if `virtual_batch_size` does not divide it; if the shape
                of `mask` is another one; if `domain` is missing or does not belong, is out of range, or has another
                shape.
            TypeError: if `domain` is not of integers.
        """
        use_running_average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        update = not use_running_average if update_running_average is None else update_running_average
        mode = Mode(use_running_average, update and not self.is_initializing(), self.is_initializing())
        if mode.update and not self.is_mutable_collection("batch_stats"):
            raise ValueError(_immutable_message(self))
        x = jnp.asarray(x)
        options = options_of(self, layer_label(self))
        channels = tuple(x.shape[axis] for axis in feature_axes(x.ndim, self.axis))
        mean, var, scale, bias = self._variables(channels, x.dtype)
        if mode.initializing and options.counts_updates:
            self.put_variable("batch_stats", "steps", initial_steps(self.num_domains))
        stored = Stored(mean.value, var.value, self.get_variable("batch_stats", "steps", None))
        y, stored = run_layer(options, mode, x, stored, scale, bias, mask=mask, domain=domain)
        if mode.update:
            mean.value, var.value = stored.mean, stored.var
            if options.counts_updates:
                self.put_variable("batch_stats", "steps", stored.steps)
        return y

    @nn.nowrap
    def _variables(
        self, channels: tuple[int, ...], dtype: Any
    ) -> tuple[nn.Variable[Any], nn.Variable[Any], Array | None, Array | None]:
        shape = channels if self.num_domains is None else (self.num_domains, *channels)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, stored_dtype(dtype))
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.finfo(stored_dtype(dtype)).dtype)
        affine_shape = shape if self.domain_affine else channels
        scale = self.param("scale", self.scale_init, affine_shape, self.param_dtype) if self.use_scale else None
        bias = self.param("bias", self.bias_init, affine_shape, self.param_dtype) if self.use_bias else None
        return mean, var, scale, bias


class BatchRenorm(BatchNorm):
    """Batch renormalization (Ioffe 2017): batch normalization tied to the running average while training.

        y = ((x - mean_B) / sqrt(var_B + epsilon) * r + d) * scale + bias

    `r` and `d` are those of `flaxbn.correction`, from the running average before this batch's update. In evaluation
    it is `BatchNorm`. Where nothing is clipped, training and evaluation give the same output; with `r_max=1, d_max=0`
    it is `BatchNorm` in training too. Complex input is a TypeError. One value per channel is allowed in training, and
    used where a mask leaves it, if `d_max` is a positive number.

    Adds to `batch_stats` the number of updates, `steps`, float32: read in training only, 0 where it is missing.

    Attributes:
        r_max: the bound of `r`: a number of at least 1, or a schedule: a function of `steps`, such as those of optax.
        d_max: the bound of `|d|`: a number of at least 0, or a schedule likewise.

    Examples:
        >>> import flaxbn, jax, jax.numpy as jnp
        >>> layer = flaxbn.BatchRenorm(r_max=3.0, d_max=5.0)
        >>> x = jnp.array([[0.5], [1.5]])
        >>> variables = layer.init(jax.random.key(0), x, use_running_average=True)  # mean 0, variance 1
        >>> y, updated = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        >>> bool(jnp.allclose(y, x, rtol=1e-4)), int(updated["batch_stats"]["steps"])  # as in evaluation
        (True, 1)
    """

    r_max: float | Schedule = paper_r_max
    d_max: float | Schedule = paper_d_max

    def __post_init__(self) -> None:
        check_bounds(self.r_max, self.d_max)
        super().__post_init__()


def _immutable_message(layer: nn.Module) -> str:
    return (
        f"{layer_label(layer)} updates its running average, so the collection 'batch_stats' must be "
        "mutable: it is not. Either\n"
        '- pass `mutable=["batch_stats"]` to `apply`, and keep the collection that it returns; or\n'
        "- to normalize by batch statistics without an update, pass `update_running_average=False`, or call "
        '`flaxbn.apply(model, variables, batch, statistics="batch")`; or\n'
        "- inside `nn.scan`, list 'batch_stats' in `variable_axes` or `variable_carry`. Flax's scan does not create "
        "what it carries: while the model is initializing (`self.is_initializing()`), list 'batch_stats' in "
        "`variable_broadcast` instead."
    )
