"""`BatchNorm` and `BatchRenorm` for flax.nnx: shells that own variables, and compute nothing.

What their call does with them is `flaxbn.layers.core.run_layer`, as for the layers of flax.linen.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype as flax_promote_dtype
from jaxtyping import Array, Inexact, Int, Shaped

from flaxbn.arithmetic.renorm import Schedule, paper_d_max, paper_r_max
from flaxbn.layers.arguments import (
    Mode,
    check_activation,
    check_averaging,
    check_bounds,
    check_domains,
    check_virtual_batch_size,
    checked_features,
    feature_axes,
    options_of,
)
from flaxbn.layers.core import run_layer
from flaxbn.layers.running_average import Stored, initial_steps, stored_dtype

_Initializer = Callable[..., Any]
_ZEROS, _ONES = nnx.initializers.zeros_init(), nnx.initializers.ones_init()


class BatchNorm(nnx.Module):
    """Batch normalization (Ioffe & Szegedy 2015), a drop-in for `flax.nnx.BatchNorm`.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    with one `mean` and (biased) `var` for every channel: in training those of the batch, over positions i of weight
    w_i (1 without a mask), in evaluation the running average of these.

        mean = sum_i w_i x_i / sum_i w_i
        var = sum_i w_i |x_i - mean|^2 / sum_i w_i

    It computes what `flaxbn.BatchNorm`, the layer for flax.linen, computes, to the last bit. Unlike Flax's layer it
    computes the variance about a pivot by default, so that large means do no harm, keeps statistics wide whatever
    `dtype` is, honours the weights in a mask, never stores what is not finite, and keeps *using* batch statistics and
    *updating* the running average apart. For the backward pass it keeps its input and a few values for each channel.

    Variables: `scale` and `bias`, `nnx.Param`; `mean` and `var`, `nnx.BatchStat`, float32, or as wide as `param_dtype`
    (`mean` complex where that is). A state of Flax's layer loads unchanged.

    Attributes:
        num_features: the number of channels; where `axis` names several axes, their lengths in ascending order of the
            axes.
        use_running_average: True in evaluation, False in training, as `model.eval()`, `model.train()` and `nnx.view`
            set it; None where it is given at each call.
        axis: the feature axis, or several.
        momentum: the weight of the old value in the running average; or a function of the number of updates so far
            that returns it, such as `flaxbn.cumulative` and `flaxbn.Debiased(0.99)`. The layer then counts its updates,
            in `steps`, a float32 `nnx.BatchStat`; with domains, those of each.
        epsilon: what is added to the variance.
        dtype: of the output; by default that to which the input and the parameters promote.
        param_dtype: of `scale` and `bias`.
        use_bias: whether there is a `bias`.
        use_scale: whether there is a `scale`.
        bias_init: the initializer of `bias`.
        scale_init: that of `scale`.
        axis_name: the axis of `jax.pmap`, `jax.vmap` or `jax.shard_map` over which batch statistics are merged,
            weighted by count. Under `nnx.jit` with sharded arrays none is needed.
        axis_index_groups: merge within these groups of the axis only.
        use_fast_variance: compute the variance as `E[x^2] - E[x]^2`, less accurately; see `fast` of `flaxbn.measure`.
        promote_dtype: `((x, mean, var, scale, bias), dtype=dtype) -> the same, promoted`, for layers with a rule of
            their own: what it makes of `x`, `scale` and `bias` goes on. With Flax's, the default, nothing is cast
            before it is measured; stored statistics never are.
        rngs: random keys for the initializers.
        bias_metadata: metadata of `bias`, such as `sharding`.
        scale_metadata: that of `scale`.
        force_float32_reductions: compute batch statistics in float32 or wider; otherwise in `dtype`.
        num_domains: keep statistics of their own for so many domains: `mean` and `var` get a leading axis, and the
            call takes `domain`. For training and inference on several datasets with shared weights.
        domain_affine: keep a `scale` and a `bias` for each domain, too.
        virtual_batch_size: in training, normalize so many consecutive examples by themselves (ghost batches; Hoffer et
            al. 2017), the groups along the leading axis, whose length it divides. The running average takes the moments
            of all groups, merged, once. With `axis_name`, only the running average is merged over members.
        activation: a function of the output, such as `nnx.relu`, that the layer applies itself. The backward pass then
            computes its input again, where otherwise that or a mask of it is kept for each activation.
        frozen: normalize by the running average and update nothing, whatever `train()`, `nnx.view` or a call asks for;
            `nnx.view(model, frozen=True)` freezes all layers of a model. The parameters are trained all the same.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import flaxbn.nnx
        >>> layer = flaxbn.nnx.BatchNorm(2, momentum=0.5, rngs=nnx.Rngs(0))
        >>> y = layer(jnp.array([[1.0, 10.0], [3.0, 30.0]]))  # in training, as Flax's
        >>> jnp.round(y, 3).tolist(), layer.mean[...].tolist()
        ([[-1.0, -1.0], [1.0, 1.0]], [1.0, 10.0])
        >>> layer.eval()
        >>> layer(jnp.array([[1.0, 10.0]])).tolist()
        [[0.0, 0.0]]
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        use_running_average: bool | None = False,
        axis: int | Sequence[int] = -1,
        momentum: float | Schedule = 0.99,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: _Initializer = _ZEROS,
        scale_init: _Initializer = _ONES,
        axis_name: Any = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = False,
        promote_dtype: Callable[..., Any] = flax_promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        force_float32_reductions: bool = True,
        num_domains: int | None = None,
        domain_affine: bool = False,
        virtual_batch_size: int | None = None,
        activation: Callable[[Array], Array] | None = None,
        frozen: bool = False,
    ) -> None:
        check_averaging(use_running_average, momentum, epsilon)
        check_activation(activation)
        check_domains(num_domains, domain_affine)
        check_virtual_batch_size(virtual_batch_size)
        self.num_features = checked_features(num_features)
        self.use_running_average, self.frozen = use_running_average, frozen
        self.axis = axis if isinstance(axis, int) else tuple(axis)
        self.momentum, self.epsilon, self.dtype, self.param_dtype = momentum, epsilon, dtype, param_dtype
        self.use_bias, self.use_scale = use_bias, use_scale
        self.axis_name, self.axis_index_groups = axis_name, _hashable(axis_index_groups)
        self.use_fast_variance, self.promote_dtype = use_fast_variance, promote_dtype
        self.force_float32_reductions, self.activation = force_float32_reductions, activation
        self.num_domains, self.domain_affine, self.virtual_batch_size = num_domains, domain_affine, virtual_batch_size
        channels = self._channels()
        shape = channels if num_domains is None else (num_domains, *channels)
        stored = stored_dtype(param_dtype)
        self.mean = nnx.BatchStat(jnp.zeros(shape, stored))
        self.var = nnx.BatchStat(jnp.ones(shape, jnp.finfo(stored).dtype))
        if options_of(self, "").counts_updates:
            self.steps: nnx.BatchStat[Any] = nnx.BatchStat(initial_steps(num_domains))
        affine_shape = shape if domain_affine else channels

        def parameter(used: bool, init: _Initializer, metadata: Mapping[str, Any]) -> Any:
            return nnx.Param(init(rngs.params(), affine_shape, param_dtype), **metadata) if used else nnx.data(None)

        self.scale = parameter(use_scale, scale_init, scale_metadata)
        self.bias = parameter(use_bias, bias_init, bias_metadata)

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
            use_running_average: normalize by the running average (evaluation) or by the batch (training); by default
                as the layer is set. A frozen layer takes no notice of it.
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
            ValueError: if `x` has another number of features; if the mode is given neither here nor to the layer; if
                the batch has one value per channel, which would make the output constant; if `virtual_batch_size`
                does not divide it; if the shape of `mask` is another one; if `domain` is missing or does not belong, is
                out of range, or has another shape.
            TypeError: if `domain` is not of integers.
        """
        mode = self._mode(use_running_average, update_running_average)
        x = jnp.asarray(x)
        self._check_features(x.shape)
        stored = Stored(self.mean[...], self.var[...], self.steps[...] if hasattr(self, "steps") else None)
        x, scale, bias = self._promoted(x, stored)
        options = options_of(self, type(self).__name__)
        y, stored = run_layer(options, mode, x, stored, scale, bias, mask=mask, domain=domain)
        if mode.update:
            self.mean.set_value(stored.mean)  # `self.mean[...] = ` would keep a narrower dtype
            self.var.set_value(stored.var)
            if options.counts_updates:
                self.steps.set_value(stored.steps)
        return y

    def set_view(self, use_running_average: bool | None = None, frozen: bool | None = None) -> None:
        """What `nnx.view` calls, and `nnx.view_info` shows, which reads arguments that are indented by two.

        Args:
          use_running_average: normalize by the running average, or by the batch; None to leave it.
          frozen: freeze the layer, or thaw it; None to leave it.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
        if frozen is not None:
            self.frozen = frozen

    def _mode(self, use_running_average: bool | None, update: bool | None) -> Mode:
        if self.frozen:
            return Mode(use_running_average=True, update=False, initializing=False)
        use_running_average = self.use_running_average if use_running_average is None else use_running_average
        if use_running_average is None:
            raise ValueError(
                "`use_running_average` must be given: got None from the layer and from the call. Set it for the whole "
                "model by `model.train()` or `model.eval()`, or give it to the constructor or at the call."
            )
        return Mode(use_running_average, not use_running_average if update is None else update, initializing=False)

    def _channels(self) -> tuple[int, ...]:
        return (self.num_features,) if isinstance(self.num_features, int) else self.num_features

    def _check_features(self, shape: tuple[int, ...]) -> None:
        found = tuple(shape[axis] for axis in feature_axes(len(shape), self.axis))
        if found != self._channels():
            raise ValueError(
                f"x must have `num_features` features, {self._channels()} along axis {self.axis}: got {found}, in an "
                f"input of shape {shape}."
            )

    def _promoted(self, x: Array, stored: Stored) -> tuple[Array, Array | None, Array | None]:
        scale, bias = (None if p is None else p[...] for p in (self.scale, self.bias))
        if self.promote_dtype is flax_promote_dtype:
            return x, scale, bias
        x, _, _, scale, bias = self.promote_dtype((x, stored.mean, stored.var, scale, bias), dtype=self.dtype)
        return x, scale, bias


class BatchRenorm(BatchNorm):
    """Batch renormalization (Ioffe 2017): batch normalization tied to the running average while training.

        y = ((x - mean_B) / sqrt(var_B + epsilon) * r + d) * scale + bias

    `r` and `d` are those of `flaxbn.correction`, from the running average before this batch's update. In evaluation
    it is `flaxbn.nnx.BatchNorm`, whose other arguments it takes, too. Where nothing is clipped, training and evaluation
    give the same output; with `r_max=1, d_max=0` it is batch normalization in training too. Complex input is a
    TypeError. One value per channel is allowed in training if `d_max` is a positive number.

    Adds the number of updates, `steps`, a float32 `nnx.BatchStat`, read in training only. `nnx.update` loads a state of
    Flax's layer, which has none, and leaves it as it is.

    Attributes:
        num_features: the number of channels.
        r_max: the bound of `r`: a number of at least 1, or a schedule: a function of `steps`, such as those of optax.
        d_max: the bound of `|d|`: a number of at least 0, or a schedule likewise.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import flaxbn.nnx
        >>> layer = flaxbn.nnx.BatchRenorm(1, r_max=3.0, d_max=5.0, rngs=nnx.Rngs(0))  # mean 0, variance 1
        >>> x = jnp.array([[0.5], [1.5]])
        >>> bool(jnp.allclose(layer(x), x, rtol=1e-4)), int(layer.steps[...])  # as in evaluation
        (True, 1)
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        r_max: float | Schedule = paper_r_max,
        d_max: float | Schedule = paper_d_max,
        **options: Any,
    ) -> None:
        check_bounds(r_max, d_max)
        self.r_max, self.d_max = r_max, d_max
        super().__init__(num_features, **options)


def _hashable(groups: Any) -> Any:
    """Groups of members as tuples, since the attributes of an nnx module are compared."""
    return None if groups is None else tuple(tuple(group) for group in groups)
