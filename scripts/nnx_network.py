"""The network of the training scripts in flax.nnx, and its functions for a training that is a pure function.

The scripts keep what changes in one value, which they checkpoint and put on devices: so `NnxNetwork` has `init` and
`apply`, as a Linen module has, and its variables are two states.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

LAYERS = ((16, 2), (32, 2), (64, 1))
"""Features and stride of each convolution."""


class NnxCNN(nnx.Module):
    """Convolution, norm, ReLU for each layer; global average pooling; dense. Takes uint8 images."""

    def __init__(
        self, num_classes: int, channels: int, norm: Callable[..., nnx.Module] | None, *, rngs: nnx.Rngs
    ) -> None:
        self.convs, self.norms, before = nnx.List([]), nnx.List([]), channels
        for features, stride in LAYERS:
            self.convs.append(nnx.Conv(before, features, (5, 5), (stride, stride), use_bias=norm is None, rngs=rngs))
            if norm is not None:
                self.norms.append(norm(features, rngs=rngs))
            before = features
        self.out = nnx.Linear(before, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array, domain: None = None, *, update: bool = False) -> jax.Array:
        del domain
        x = images.astype(jnp.float32) / 255
        for i, conv in enumerate(self.convs):
            x = conv(x)
            if len(self.norms):
                x = self.norms[i](x, update_running_average=update)
            x = nnx.relu(x)
        return self.out(x.mean(axis=(1, 2)))


@dataclasses.dataclass(frozen=True)
class NnxNetwork:
    """An `NnxCNN` without its variables."""

    num_classes: int
    channels: int
    norm: Callable[..., nnx.Module] | None

    @functools.cached_property
    def graphdef(self) -> nnx.GraphDef[NnxCNN]:
        """What of the network is no variable, in evaluation mode."""
        network = nnx.eval_shape(lambda: NnxCNN(self.num_classes, self.channels, self.norm, rngs=nnx.Rngs(0)))
        network.eval()
        return nnx.graphdef(network)

    def init(self, key: jax.Array, images: jax.Array, domain: None = None) -> dict[str, Any]:
        """The variables of a network that was never trained."""
        del images, domain
        network = NnxCNN(self.num_classes, self.channels, self.norm, rngs=nnx.Rngs(key))
        _, params, batch_stats = nnx.split(network, nnx.Param, nnx.BatchStat)
        return {"params": params, "batch_stats": batch_stats}

    def parts(self, variables: dict[str, Any]) -> tuple[nnx.GraphDef[NnxCNN], nnx.State]:
        """What `nnx.split` gives for the network with these variables."""
        return self.graphdef, nnx.merge_state(variables["params"], variables["batch_stats"])

    def apply(
        self,
        variables: dict[str, Any],
        images: jax.Array,
        domain: None = None,
        *,
        train: bool = False,
        update: bool = False,
        mutable: Any = (),
    ) -> Any:
        """The logits; in training also what was updated, in the form of `flax.linen.Module.apply`."""
        del domain
        network = nnx.merge(*self.parts(variables), copy=True)
        if train:
            network.train()
        logits = network(images, update=update)
        return (logits, {"batch_stats": nnx.state(network, nnx.BatchStat)}) if mutable else logits


def parts_of(model: nn.Module | NnxNetwork, variables: Any) -> tuple[Any, Any]:
    """What functions of flaxbn take for `model, variables`."""
    return model.parts(variables) if isinstance(model, NnxNetwork) else (model, variables)
