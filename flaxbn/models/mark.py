"""The mark that a layer of somebody's own puts on its statistics, so that they can be chosen from outside."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Shaped

from flaxbn.layers.arguments import feature_axes, position_weights
from flaxbn.layers.names import layer_label
from flaxbn.tracing.primitive import bind_tap, is_looking

_running: ContextVar[Any] = ContextVar("running", default=None)


@contextmanager
def running_module(module: Any) -> Iterator[None]:
    """While a method of this module runs, a mark is its own."""
    token = _running.set(module)
    try:
        yield
    finally:
        _running.reset(token)


def mark(
    x: Shaped[Array, "..."],
    mean: Shaped[Array, "..."],
    var: Shaped[Array, "..."],
    axis: int | Sequence[int] = -1,
    mask: ArrayLike | None = None,
    axis_name: Any = None,
) -> tuple[Array, Array]:
    """Says of a layer's statistics that they are those of a batch normalization of `x`.

    A batch-norm layer of your own, which flaxbn does not know, calls it where it evaluates, and goes on with what it
    returns. When flaxbn looks at the model, these are the statistics that it chooses: those of the batch in
    `flaxbn.apply(..., statistics="batch")`, those of the data in an estimate. Otherwise `mark` is the identity: it
    returns `mean` and `var` as they are, gradients pass, and nothing of it is left in what is compiled or exported.

    Which variables the layer reads is found by following their values through the model, whatever they are called, in
    one module: a mean and a variance of one shape, taken as they are stored, or parts of them.

    Examples:
        >>> import flax.linen as nn, flaxbn, jax, jax.numpy as jnp, numpy as np
        >>> class Norm(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, train=False):
        ...         mu = self.variable("batch_stats", "mu", jnp.zeros, x[:1].shape)
        ...         sigma2 = self.variable("batch_stats", "sigma2", jnp.ones, x[:1].shape)
        ...         of_batch = x.mean(0, keepdims=True), x.var(0, keepdims=True)
        ...         mean, var = of_batch if train else flaxbn.mark(x, mu.value, sigma2.value)
        ...         return (x - mean) / jnp.sqrt(var + 1e-5)
        >>> model, x = Norm(), np.float32([[1.0], [3.0]])
        >>> variables = model.init(jax.random.key(0), x)
        >>> stats = flaxbn.estimate_population_stats(model, variables, x, batch_size=2)
        >>> stats["mu"].tolist(), stats["sigma2"].tolist()
        ([[2.0]], [[1.0]])

    Args:
        x: what the layer normalizes.
        mean: the mean by which it would, of the shape of the feature axes of `x`, but for axes of length 1.
        var: the variance, biased, of the same shape.
        axis: the feature axis of `x`, or several.
        mask: the positions that count, as `flaxbn.BatchNorm` takes it: bool or float weights, of the rank of `x`, each
            axis equal to that of `x` or 1; or, with one feature axis, exactly the shape of `x` without it.
        axis_name: the mapped axis over which the layer synchronizes.

    Returns:
        The mean and the variance to normalize by, in the shape of those given.

    Raises:
        ValueError: if `mean` and `var` have not one such shape, or that of `mask` is another one.
    """
    features = feature_axes(jnp.ndim(x), axis)
    check_statistics("`mean` and `var`", mean, var, jnp.shape(x), features)
    weights = None if mask is None else position_weights(mask, jnp.shape(x), features).astype(jnp.float32)
    if not is_looking():
        return mean, var
    layer = "a layer with `flaxbn.mark`" if _running.get() is None else layer_label(_running.get())
    return through_tap(x, mean, var, features, layer=layer, weights=weights, axis_name=axis_name)


def through_tap(x: Any, mean: Any, var: Any, features: tuple[int, ...], **options: Any) -> tuple[Array, Array]:
    """The statistics to evaluate by, in the shape of those given, which may have axes of length 1 more.

    Args:
        x: the layer's input.
        mean: the mean that is stored.
        var: the variance.
        features: the feature axes of `x`.
        **options: those of `bind_tap`.
    """
    x = jnp.asarray(x)
    channels = tuple(x.shape[axis] for axis in features)
    chosen = bind_tap(x, jnp.reshape(mean, channels), jnp.reshape(var, channels), features, **options)
    new_mean, new_var = (_as_given(new, old, x.dtype) for new, old in zip(chosen, (mean, var)))
    return new_mean, new_var


def _as_given(chosen: Array, given: Any, dtype: Any) -> Array:
    """In the shape that was given, and as wide as the input, so that what is computed with both is as wide as ever."""
    kept = jnp.result_type(given)
    if jnp.issubdtype(dtype, jnp.complexfloating) and not jnp.issubdtype(kept, jnp.complexfloating):
        dtype = jnp.finfo(dtype).dtype
    return chosen.reshape(jnp.shape(given)).astype(jnp.promote_types(kept, dtype))


def check_statistics(what: str, mean: Any, var: Any, shape: tuple[int, ...], features: tuple[int, ...]) -> None:
    """Statistics are of the shape of the feature axes, but for axes of length 1.

    Raises:
        ValueError: naming them by `what`, if they are not.
    """
    channels = tuple(shape[axis] for axis in features)
    kept = [[n for n in one if n != 1] for one in (jnp.shape(mean), jnp.shape(var), channels)]
    if jnp.shape(mean) != jnp.shape(var) or kept[0] != kept[2]:
        raise ValueError(
            f"{what} must have the shape {channels} of the feature axes {features}, but for axes of length 1, for an "
            f"input of shape {shape}: got {jnp.shape(mean)} and {jnp.shape(var)}. Say by `axis` which axes of the "
            "input are features."
        )
