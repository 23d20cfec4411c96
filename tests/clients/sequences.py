"""Small models of Linen that are no image models: padded sequences, several critics, loops over layers."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

import flaxbn


class PaddedBatchNorm(nn.Module):
    """A class of its own that is told by `input_paddings`, 1 where there is padding, and marks what it evaluates by."""

    momentum: float = 0.999
    epsilon: float = 1e-3

    @nn.compact
    def __call__(self, x, input_paddings, train: bool):
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "running_mean", lambda: jnp.zeros(shape, jnp.float32))
        var = self.variable("batch_stats", "running_var", lambda: jnp.ones(shape, jnp.float32))
        weights = 1 - input_paddings
        if train:
            count = weights.sum()
            m = (x * weights[..., None]).sum((0, 1)) / count
            v = (jnp.square(x - m.reshape(1, 1, -1)) * weights[..., None]).sum((0, 1)) / count
            if not self.is_initializing():
                mean.value = self.momentum * mean.value + (1 - self.momentum) * m
                var.value = self.momentum * var.value + (1 - self.momentum) * v
        else:
            m, v = flaxbn.mark(x, mean.value, var.value, mask=weights)
        gain = 1 + self.param("scale", nn.initializers.zeros, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        m, v, gain, bias = (a.reshape(1, 1, -1) for a in (m, v, gain, bias))
        return ((x - m) / jnp.sqrt(v + self.epsilon) * gain + bias) * weights[..., None]


class ConformerBlock(nn.Module):
    """Half a feed-forward, attention among what is no padding, gated convolution in time with batch normalization."""

    width: int
    dropout: float

    @nn.compact
    def __call__(self, x, paddings, train: bool):
        def dropped(x):
            return nn.Dropout(self.dropout, deterministic=not train)(x)

        x = x + 0.5 * dropped(nn.Dense(self.width)(nn.swish(nn.Dense(2 * self.width)(nn.LayerNorm()(x)))))
        present = (1 - paddings)[:, None, None, :] > 0
        x = x + dropped(nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=present))
        y = nn.glu(nn.Dense(2 * self.width)(nn.LayerNorm()(x))) * (1 - paddings)[..., None]
        y = nn.Conv(self.width, (3,), feature_group_count=self.width)(y)
        y = nn.swish(PaddedBatchNorm(name="bn")(y, paddings, train))
        return nn.LayerNorm()(x + dropped(nn.Dense(self.width)(y)))


class Conformer(nn.Module):
    """As init2winit's: sequences with paddings, returned with the outputs."""

    blocks: int = 2
    width: int = 8
    dropout: float = 0.1

    @nn.compact
    def __call__(self, inputs, input_paddings, train: bool):
        x = nn.Dense(self.width)(inputs)
        for _ in range(self.blocks):
            x = ConformerBlock(self.width, self.dropout)(x, input_paddings, train)
        return nn.Dense(3)(x) * (1 - input_paddings)[..., None], input_paddings


class OwnBatchRenorm(nn.Module):
    """Renormalizes from `warmup_steps` on, and keeps its bounds and its steps beside the statistics, as numbers."""

    use_running_average: bool | None = None
    axis: int = -1
    momentum: float = 0.99
    warmup_steps: int = 100_000

    @nn.compact
    def __call__(self, x, use_running_average: bool | None = None):
        use = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(shape, jnp.float32))
        var = self.variable("batch_stats", "var", lambda: jnp.ones(shape, jnp.float32))
        r_max, d_max = (self.variable("batch_stats", k, lambda v=v: v) for k, v in (("r_max", 3), ("d_max", 5)))
        steps = self.variable("batch_stats", "steps", lambda: 0)
        r, d, m, v = 1.0, 0.0, mean.value, var.value
        if not use:
            m, v = x.mean(0), x.var(0)
            if not self.is_initializing():
                warm = steps.value >= self.warmup_steps
                spread = jnp.sqrt(var.value + 1e-3)
                r = jnp.where(warm, jnp.clip(jnp.sqrt(v + 1e-3) / spread, 1 / r_max.value, r_max.value), 1)
                d = jnp.where(warm, jnp.clip((m - mean.value) / spread, -d_max.value, d_max.value), 0)
                mean.value = self.momentum * mean.value + (1 - self.momentum) * m
                var.value = self.momentum * var.value + (1 - self.momentum) * v
                steps.value += 1
        scale = self.param("scale", nn.initializers.ones, shape).reshape(1, -1)
        bias = self.param("bias", nn.initializers.zeros, shape).reshape(1, -1)
        y = (x - m.reshape(1, -1)) / jnp.sqrt(v + 1e-3).reshape(1, -1)
        return (y * jnp.reshape(r, (1, -1)) + jnp.reshape(d, (1, -1))) * scale + bias


class Critic(nn.Module):
    net_arch: tuple[int, ...]

    @nn.compact
    def __call__(self, observation, action, train: bool = False):
        x = jnp.concatenate([observation, action], -1)
        x = OwnBatchRenorm(use_running_average=not train)(x)
        for units in self.net_arch:
            x = OwnBatchRenorm(use_running_average=not train)(nn.relu(nn.Dense(units)(x)))
        return nn.Dense(1)(x)


class VectorCritic(nn.Module):
    """As SBX's: critics under `nn.vmap`, whose outputs come first."""

    net_arch: tuple[int, ...] = (8, 6)
    n_critics: int = 2

    @nn.compact
    def __call__(self, observation, action, train: bool = False):
        critics = nn.vmap(
            Critic,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True, "batch_stats": True},
            in_axes=None,
            out_axes=0,
            axis_size=self.n_critics,
        )
        return critics(self.net_arch)(observation, action, train)


class Layer(nn.Module):
    """One step of the loop, which hands its activations on and puts their means out."""

    width: int
    train: bool
    norm: Any = nn.BatchNorm

    @nn.compact
    def __call__(self, x, _):
        y = self.norm(use_running_average=not self.train, momentum=0.9)(nn.Dense(self.width)(x))
        return x + nn.tanh(y), y.mean(-1)


class ScannedMLP(nn.Module):
    """Layers under `nn.remat` and `nn.scan`, each with variables of its own along axis 0, behind a layer outside."""

    depth: int = 3
    width: int = 6

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="first")(nn.Dense(self.width)(x))
        layers = nn.scan(
            nn.remat(Layer, prevent_cse=False),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        x, means = layers(self.width, train, name="layers")(x, None)
        return {"logits": nn.Dense(2)(x), "means": means.T}
