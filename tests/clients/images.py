"""Small image models of Linen, in the manner of three well-known code bases."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with a shortcut; the last scale starts at 0 in training, here at 1, so that it is seen."""

    filters: int
    conv: Any
    norm: Any
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.norm()(self.conv(self.filters, (1, 1))(x)))
        y = nn.relu(self.norm()(self.conv(self.filters, (3, 3), self.strides)(y)))
        y = self.norm(name="norm_out")(self.conv(2 * self.filters, (1, 1))(y))
        if x.shape != y.shape:
            x = self.norm(name="norm_shortcut")(self.conv(2 * self.filters, (1, 1), self.strides, name="shortcut")(x))
        return nn.relu(x + y)


class ImageNetResNet(nn.Module):
    """As Flax's own example: stages are a list, `train` has no default, layers synchronize over a mapped axis."""

    stage_sizes: Sequence[int]
    num_filters: int = 4
    num_classes: int = 3
    dtype: Any = jnp.float32
    axis_name: str | None = "batch"

    @nn.compact
    def __call__(self, x, train: bool):
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            axis_name=self.axis_name,
        )
        x = nn.relu(norm(name="norm_init")(conv(self.num_filters, (3, 3), name="conv_init")(x)))
        x = nn.max_pool(x, (2, 2), (2, 2))
        for i, blocks in enumerate(self.stage_sizes):
            for j in range(blocks):
                strides = (2, 2) if i > 0 and j == 0 else (1, 1)
                x = Bottleneck(self.num_filters * 2**i, conv, norm, strides)(x)
        return jnp.asarray(nn.Dense(self.num_classes, dtype=self.dtype)(x.mean((1, 2))), self.dtype)


class UNet(nn.Module):
    """As scenic's: a contracting and an expanding path, keyword-only `train` and `debug`, an output for each pixel."""

    num_classes: int = 2
    block_size: tuple[int, ...] = (4, 6)
    use_batch_norm: bool = True

    @nn.compact
    def __call__(self, x, *, train: bool = False, debug: bool = False):
        def block(x, features):
            for _ in range(2):
                x = nn.Conv(features, (3, 3), use_bias=not self.use_batch_norm)(x)
                if self.use_batch_norm:
                    x = nn.BatchNorm(use_running_average=not train, momentum=0.99)(x)
                x = nn.relu(x)
            return x

        skips = []
        for features in self.block_size:
            x = block(x, features)
            skips.append(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = block(x, 2 * self.block_size[-1])
        for features, skip in zip(reversed(self.block_size), reversed(skips), strict=True):
            x = nn.ConvTranspose(features, (2, 2), (2, 2))(x)
            x = block(jnp.concatenate([skip, x], -1), features)
        return nn.Conv(self.num_classes, (1, 1))(x)


class OwnBatchNorm(nn.Module):
    """A class of its own, with the variables of Flax's and a one-pass variance, told at the call."""

    axis: int = -1
    momentum: float = 0.9
    epsilon: float = 1e-5
    scale_init: Callable = nn.initializers.ones

    @nn.compact
    def __call__(self, x, use_running_average: bool):
        shape = (x.shape[self.axis],)
        mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(shape, jnp.float32))
        var = self.variable("batch_stats", "var", lambda: jnp.ones(shape, jnp.float32))
        m, v = mean.value, var.value
        if not use_running_average:
            axes = tuple(range(x.ndim - 1))
            m = x.mean(axes)
            v = jnp.square(x).mean(axes) - jnp.square(m)
            if not self.is_initializing():
                mean.value = self.momentum * mean.value + (1 - self.momentum) * m
                var.value = self.momentum * var.value + (1 - self.momentum) * v
        scale, bias = self.param("scale", self.scale_init, shape), self.param("bias", nn.initializers.zeros, shape)
        m, v, scale, bias = (jnp.expand_dims(a, tuple(range(x.ndim - 1))) for a in (m, v, scale, bias))
        return (x - m) / jnp.sqrt(v + self.epsilon) * scale + bias


class Activations(nn.Module):
    """As flaxmodels': a batch-norm class of its own, stages in a dictionary of outputs, `normalize` at the door."""

    widths: tuple[int, ...] = (4, 6)
    normalize: bool = True

    @nn.compact
    def __call__(self, x, train: bool = True):
        if self.normalize:
            x = (x - np.float32([[[[0.4, 0.5, 0.6]]]])) / np.float32([[[[0.2, 0.25, 0.3]]]])
        found = {}
        for i, width in enumerate(self.widths):
            shortcut = nn.Conv(width, (1, 1), (2, 2), use_bias=False)(x)
            y = nn.Conv(width, (3, 3), (2, 2), use_bias=False)(x)
            y = nn.relu(OwnBatchNorm(name=f"bn{i}a")(y, use_running_average=not train))
            y = OwnBatchNorm(name=f"bn{i}b")(nn.Conv(width, (3, 3), use_bias=False)(y), use_running_average=not train)
            x = found[f"block{i}"] = nn.relu(shortcut + y)
        return found | {"fc": nn.Dense(3)(x.mean((1, 2)))}
