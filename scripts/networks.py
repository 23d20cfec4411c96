"""The networks that are trained and timed; `NETWORKS` names those of the training scripts."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

STAGES = ((3, 1), (4, 2), (6, 2), (3, 2))  # of a ResNet-50: blocks, and the stride of the first
Norm = Callable[..., nn.Module]


def scaled(images: jax.Array) -> jax.Array:
    """Images of uint8 as float32 from 0 to 1, and others as they are."""
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


def normalized(norm: Norm, x: jax.Array, *, train: bool, update: bool | None, domain: Any, dtype: Any) -> jax.Array:
    """x through a new layer, which is handed what is not None: Flax's own layers know neither `update` nor domains."""
    given = {"update_running_average": update, "domain": domain}
    given = {name: value for name, value in given.items() if value is not None}
    return norm(use_running_average=not train, dtype=dtype)(x, **given)


class CNN(nn.Module):
    """Convolution, norm, ReLU for each layer; global average pooling; dense."""

    num_classes: int
    norm: Norm | None
    layers: tuple[tuple[int, int], ...] = ((16, 2), (32, 2), (64, 1))
    """Features and stride of each convolution."""
    kernel: int = 5
    dtype: Any = None

    @nn.compact
    def __call__(
        self, images: jax.Array, domain: Any = None, *, train: bool = False, update: bool | None = None
    ) -> jax.Array:
        x = scaled(images)
        kernel = self.kernel, self.kernel
        for features, stride in self.layers:
            x = nn.Conv(features, kernel, (stride, stride), use_bias=self.norm is None, dtype=self.dtype)(x)
            if self.norm is not None:
                x = normalized(self.norm, x, train=train, update=update, domain=domain, dtype=self.dtype)
            x = nn.relu(x)
        return nn.Dense(self.num_classes, dtype=self.dtype)(x.mean((1, 2)))


class ResNet20(nn.Module):
    """That of CIFAR-10, with nine blocks of two convolutions (He et al. 2016, section 4.2; shortcuts are projected)."""

    num_classes: int
    norm: Norm | None
    width: int = 16
    """Features of the first third."""
    dtype: Any = None

    @nn.compact
    def __call__(
        self, images: jax.Array, domain: Any = None, *, train: bool = False, update: bool | None = None
    ) -> jax.Array:
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), use_bias=self.norm is None, dtype=self.dtype)

        def norm(x: jax.Array) -> jax.Array:
            if self.norm is None:
                return x
            return normalized(self.norm, x, train=train, update=update, domain=domain, dtype=self.dtype)

        x = nn.relu(norm(conv(self.width)(scaled(images))))
        for features, first_stride in ((self.width, 1), (2 * self.width, 2), (4 * self.width, 2)):
            for stride in (first_stride, 1, 1):
                y = nn.relu(norm(conv(features, strides=stride)(x)))
                y = norm(conv(features)(y))
                if y.shape != x.shape:
                    x = norm(conv(features, kernel_size=(1, 1), strides=stride)(x))
                x = nn.relu(x + y)
        return nn.Dense(self.num_classes, dtype=self.dtype)(x.mean((1, 2)))


class ResNet50(nn.Module):
    """Its bottleneck blocks; `width` is 64 in the original, whose stem makes images four times smaller."""

    num_classes: int
    norm: Norm
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
        return nn.Dense(self.num_classes, dtype=self.dtype)(x.mean((1, 2)))


NETWORKS = {"cnn": CNN, "resnet20": ResNet20}
Name = Literal["cnn", "resnet20"]
