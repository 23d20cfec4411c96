"""Batch-norm layers with the variables, names and habits that copied and rewritten classes in the wild have."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

EPSILON = 1e-3


class Foreign(nn.Module):
    """A layer whose update has no memory; classes differ in how they are told to train, and what they keep."""

    @nn.nowrap
    def normalize(self, x, train, names=("mean", "var"), shape=None):
        channels = x.shape[-1:]
        shape = shape or channels
        mean = self.variable("batch_stats", names[0], jnp.zeros, shape)
        var = self.variable("batch_stats", names[1], jnp.ones, shape)
        used = mean.value.reshape(channels), var.value.reshape(channels)
        if train:
            axes = tuple(range(x.ndim - 1))
            used = x.mean(axes), jnp.maximum((x**2).mean(axes) - x.mean(axes) ** 2, 0)
            if not self.is_mutable_collection("params"):
                mean.value, var.value = (a.reshape(shape) for a in used)
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        broadcast = (1,) * (x.ndim - 1) + (-1,)
        mean, var, scale, bias = (a.reshape(broadcast) for a in (*used, scale, bias))
        return (x - mean) * jax.lax.rsqrt(var + EPSILON) * scale + bias


class Copied(Foreign):
    """Told by a field or by an argument, as Flax's own; a field of it holds a function."""

    use_running_average: bool | None = None
    axis: int = -1
    mean_init: Any = lambda shape: jnp.zeros(shape)

    @nn.compact
    def __call__(self, x, use_running_average=None):
        use = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        return self.normalize(x, not use)


class Renorm(Foreign):
    """Keeps its bounds and a counter beside the statistics, as Python numbers at first."""

    use_running_average: bool | None = None
    axis: int = -1

    @nn.compact
    def __call__(self, x, use_running_average=None):
        use = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        for name, bound in (("r_max", 3), ("d_max", 5)):
            self.variable("batch_stats", name, lambda bound=bound: bound)
        steps = self.variable("batch_stats", "steps", lambda: 0)
        if not use and not self.is_initializing():
            steps.value += 1
        return self.normalize(x, not use)


class Running(Foreign):
    """Other names, with an axis of length 1 in front; told by an argument."""

    @nn.compact
    def __call__(self, x, use_running_average=None):
        names = ("batch_norm_running_mean", "batch_norm_running_var")
        return self.normalize(x, not use_running_average, names, (1, x.shape[-1]))


class Training(Foreign):
    """Told by an argument that must be given, and that says the opposite."""

    @nn.compact
    def __call__(self, x, training: bool):
        return self.normalize(x, training)


class Paired(Foreign):
    """Returns something beside the output."""

    use_running_average: bool | None = None

    @nn.compact
    def __call__(self, inputs, use_running_average=None, spatial_shape=None):
        return self.normalize(inputs, not self.use_running_average), spatial_shape


class KeepsDims(Foreign):
    """Statistics of the rank of the input; a field that says the opposite."""

    is_training: bool = False

    @nn.compact
    def __call__(self, x):
        return self.normalize(x, self.is_training, ("average", "spread"), (1,) * (x.ndim - 1) + x.shape[-1:])


def stock(x, train, name):
    return nn.BatchNorm(not train, momentum=0.0, epsilon=EPSILON, name=name)(x)


RUN = {
    Copied: lambda x, train, name: Copied(not train, name=name)(x),
    Renorm: lambda x, train, name: Renorm(name=name)(x, use_running_average=not train),
    Running: lambda x, train, name: Running(name=name)(x, use_running_average=not train),
    Training: lambda x, train, name: Training(name=name)(x, train),
    Paired: lambda x, train, name: Paired(not train, name=name)(x)[0],
    KeepsDims: lambda x, train, name: KeepsDims(train, name=name)(x),
}
KNOWN = {
    Copied: {},
    Renorm: {},
    Running: {"mean": "batch_norm_running_mean", "var": "batch_norm_running_var"},
    Training: {"evaluation": {"training": False}},
    Paired: {},
    KeepsDims: {"mean": "average", "var": "spread", "evaluation": {"is_training": False}, "axis": -1},
}


class Net(nn.Module):
    """Two layers, each behind a Dense; `run(x, train, name)` calls a layer."""

    run: Any

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(self.run(nn.Dense(6, name="in")(x), train, "first"))
        return nn.Dense(2, name="out")(self.run(nn.Dense(5, name="between")(x), train, "second"))


def statistics(batch_stats, cls):
    """Those of the layers, as Flax names them."""
    mean, var = KNOWN[cls].get("mean", "mean"), KNOWN[cls].get("var", "var")
    return {
        name: {"mean": np.asarray(held[mean]).reshape(-1), "var": np.asarray(held[var]).reshape(-1)}
        for name, held in batch_stats.items()
    }
