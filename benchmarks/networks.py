"""The networks that are timed."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

STAGES = ((3, 1), (4, 2), (6, 2), (3, 2))  # of a ResNet-50: blocks, and the stride of the first


class CNN(nn.Module):
    """A convolution, batch normalization and relu for each pair of features and stride."""

    norm: Callable[..., nn.Module]
    layers: tuple[tuple[int, int], ...] = ((16, 1), (32, 2), (64, 2))
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for features, stride in self.layers:
            x = nn.Conv(features, (3, 3), (stride, stride), use_bias=False, dtype=self.dtype)(x)
            x = nn.relu(self.norm(use_running_average=not train, dtype=self.dtype)(x))
        return nn.Dense(10, dtype=self.dtype)(x.mean((1, 2)))


class ResNet20(nn.Module):
    """That of CIFAR-10, with nine blocks of two convolutions."""

    norm: Callable[..., nn.Module]
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        norm = functools.partial(self.norm, use_running_average=not train, dtype=self.dtype)
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), use_bias=False, dtype=self.dtype)
        x = nn.relu(norm()(conv(16)(x)))
        for features, first_stride in ((16, 1), (32, 2), (64, 2)):
            for stride in (first_stride, 1, 1):
                y = nn.relu(norm()(conv(features, strides=stride)(x)))
                y = norm()(conv(features)(y))
                if y.shape != x.shape:
                    x = norm()(conv(features, kernel_size=(1, 1), strides=stride)(x))
                x = nn.relu(x + y)
        return nn.Dense(10, dtype=self.dtype)(x.mean((1, 2)))


class ResNet50(nn.Module):
    """Its bottleneck blocks; `width` is 64 in the original, whose stem makes images four times smaller."""

    norm: Callable[..., nn.Module]
    width: int = 8
    stem: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        norm = functools.partial(self.norm, use_running_average=not train, dtype=self.dtype)
        conv = functools.partial(nn.Conv, kernel_size=(1, 1), use_bias=False, dtype=self.dtype)
        first = conv(self.width, kernel_size=(7, 7), strides=2) if self.stem else conv(self.width, kernel_size=(3, 3))
        x = nn.relu(norm()(first(x)))
        if self.stem:
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for i, (blocks, first_stride) in enumerate(STAGES):
            features = self.width * 2**i
            for stride in (first_stride, *[1] * (blocks - 1)):
                y = nn.relu(norm()(conv(features)(x)))
                y = nn.relu(norm()(conv(features, kernel_size=(3, 3), strides=stride)(y)))
                y = norm()(conv(4 * features)(y))
                if y.shape != x.shape:
                    x = norm()(conv(4 * features, strides=stride)(x))
                x = nn.relu(x + y)
        return nn.Dense(10, dtype=self.dtype)(x.mean((1, 2)))
