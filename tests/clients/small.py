"""The small models, each with data and the ways in which it is run."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from clients import bonsai, images, sequences
from clients.tools import PARTS, Client
from flax import nnx

import flaxbn

SAMPLES = 8 * PARTS


def pictures(size: int) -> np.ndarray:
    """Smooth images, with a mean and a spread of their own for each channel."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(SAMPLES, size // 4, size // 4, 3)).repeat(4, 1).repeat(4, 2)
    return (x * [0.2, 0.3, 0.4] + [0.4, 0.5, 0.6] + rng.normal(0, 0.1, x.shape)).astype(np.float32)


def linen(
    model: Any,
    data: Any,
    run: Callable[..., Any],
    *,
    momentum: float,
    calls: int,
    exactly: Any = None,
    mapped: str | None = None,
    **options: Any,
) -> Client:
    """A client of Linen, which `run(module, batch, train)` runs.

    Args:
        model: the model.
        data: its data.
        run: how it is run.
        momentum: that of its layers.
        calls: how many of them are called.
        exactly: the model in float64 and without dropout.
        mapped: the axis over which its layers synchronize in training.
        **options: what else `Client` takes.
    """
    exactly = exactly or model
    init = jax.jit(partial(model.init, method=partial(run, train=False)))
    variables = init(jax.random.key(0), jax.tree.map(lambda a: a[:2], data))

    def trained(variables: Any, batch: Any) -> Any:
        def step(batch: Any) -> Any:
            return exactly.apply(variables, batch, method=partial(run, train=True), mutable=["batch_stats"])

        if mapped is None:
            output, after = step(batch)
        else:
            one = jax.tree.map(lambda a: a[None], batch)
            output, after = jax.tree.map(lambda a: a[0], jax.vmap(step, axis_name=mapped)(one))
        return output, after["batch_stats"]

    def evaluated(variables: Any, batch: Any) -> Any:
        return exactly.apply(variables, batch, method=partial(run, train=False))

    return Client(
        model,
        variables,
        data,
        call=partial(run, train=False),
        trained=trained,
        evaluated=evaluated,
        momentum=momentum,
        calls=calls,
        **options,
    )


def of_nnx(model: Any, data: Any, *, calls: int) -> Client:
    """A client of nnx, in training mode, as its users have it."""
    graphdef, state = nnx.split(model)

    def trained(state: Any, batch: Any) -> Any:
        model = nnx.merge(graphdef, state)
        model.train()
        return model(batch), nnx.state(model, nnx.BatchStat)

    def evaluated(state: Any, batch: Any) -> Any:
        model = nnx.merge(graphdef, state)
        model.eval()
        return model(batch)

    return Client(
        graphdef,
        state,
        data,
        call=call_nnx,
        trained=trained,
        evaluated=evaluated,
        momentum=0.99,
        calls=calls,
    )


def call_nnx(model: Any, batch: Any) -> Any:
    return model(batch)


def run_resnet(module, x, train):
    return module(x, train)


def run_unet(module, x, train):
    return module(x, train=train)


def run_activations(module, x, train):
    return module(x, train=train)


def run_conformer(module, batch, train):
    return module(batch["inputs"], batch["paddings"], train)[0]


def run_critic(module, batch, train):
    return jax.numpy.moveaxis(module(batch["observation"], batch["action"], train), 0, 1)


def run_scanned(module, x, train):
    return module(x, train)


def imagenet_resnet() -> Client:
    model = images.ImageNetResNet([1, 1])
    exactly = model.clone(dtype=np.float64)
    return linen(model, pictures(16), run_resnet, momentum=0.9, calls=9, exactly=exactly, mapped="batch")


def unet() -> Client:
    return linen(images.UNet(), pictures(8), run_unet, momentum=0.99, calls=10)


def flaxmodels() -> Client:
    flaxbn.recognize(images.OwnBatchNorm)
    return linen(images.Activations(), pictures(16), run_activations, momentum=0.9, calls=4)


def conformer() -> Client:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 8, SAMPLES)
    data = {
        "inputs": rng.normal(1, 2, (SAMPLES, 7, 5)).astype(np.float32),
        "paddings": (np.arange(7) >= lengths[:, None]).astype(np.float32),
    }
    model = sequences.Conformer()
    return linen(
        model,
        data,
        run_conformer,
        momentum=0.999,
        calls=2,
        exactly=model.clone(dropout=0.0),
        names=("running_mean", "running_var"),
        positions=lambda batch: (1 - batch["paddings"]).sum(),
    )


def transitions() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "observation": rng.normal(3, 2, (SAMPLES, 4)).astype(np.float32),
        "action": rng.normal(size=(SAMPLES, 2)).astype(np.float32),
    }


def critics() -> Client:
    flaxbn.recognize(sequences.OwnBatchRenorm)
    return linen(sequences.VectorCritic(), transitions(), run_critic, momentum=0.99, calls=3)


def scanned() -> Client:
    x = np.random.default_rng(0).normal(2, 3, (SAMPLES, 5)).astype(np.float32)
    return linen(sequences.ScannedMLP(), x, run_scanned, momentum=0.9, calls=4)


def bonsai_resnet() -> Client:
    model = bonsai.ResNet(rngs=nnx.Rngs(0))
    return of_nnx(model, pictures(16), calls=17)


def bonsai_efficientnet() -> Client:
    model = bonsai.EfficientNet(rngs=nnx.Rngs(0))
    return of_nnx(model, pictures(32), calls=49)


CLIENTS: dict[str, Callable[[], Client]] = {
    "ResNet of Flax's ImageNet example": imagenet_resnet,
    "UNet": unet,
    "a batch-norm class of its own": flaxmodels,
    "Conformer with paddings": conformer,
    "critics under nn.vmap": critics,
    "layers under nn.scan": scanned,
    "ResNet of nnx, 17 layers": bonsai_resnet,
    "EfficientNet of nnx, 49 layers": bonsai_efficientnet,
}
