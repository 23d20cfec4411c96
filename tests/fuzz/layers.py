"""Layers that flaxbn does not know of itself: a copied class that is recognized, one that marks, and a subclass."""

import flax.linen as nn
import jax
import jax.numpy as jnp

import flaxbn


class Scaled(nn.BatchNorm):
    """Calls the stock layer, and has a parameter of its own."""

    @nn.compact
    def __call__(self, x, use_running_average=None, **kwargs):
        gain = self.param("gain", nn.initializers.ones, ())
        return super().__call__(x * gain, use_running_average, **kwargs)


class Foreign(nn.Module):
    """A copied layer: an average with a memory, the variance about the mean, and other names for them."""

    use_running_average: bool
    axis: int = -1
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: object = None

    @nn.nowrap
    def look(self, x, mean, var):
        return mean, var

    @nn.compact
    def __call__(self, x):
        axis = self.axis % x.ndim
        others = tuple(i for i in range(x.ndim) if i != axis)
        shape = tuple(n if i == axis else 1 for i, n in enumerate(x.shape))
        mean, var = (self.variable("batch_stats", n, init, shape) for n, init in (("mu", jnp.zeros), ("s2", jnp.ones)))
        if self.use_running_average:
            used = self.look(x, mean.value, var.value)
        else:
            wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            used = wide.mean(others, keepdims=True), wide.var(others, keepdims=True)
            if not self.is_initializing():
                for old, new in zip((mean, var), used):
                    old.value = self.momentum * old.value + (1 - self.momentum) * new
        scale = self.param("scale", nn.initializers.ones, shape)
        return ((x - used[0]) * jax.lax.rsqrt(used[1] + self.epsilon) * scale).astype(self.dtype or x.dtype)


class Recognized(Foreign):
    """Known by `flaxbn.recognize`."""


class Unknown(Foreign):
    """Of which nobody says anything."""


class Marked(Foreign):
    """Known by its own mark."""

    @nn.nowrap
    def look(self, x, mean, var):
        return flaxbn.mark(x, mean, var, axis=self.axis)


flaxbn.recognize(Recognized, mean="mu", var="s2")
