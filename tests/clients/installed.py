"""Models of other packages, with random weights: those that `make clients` installs."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import numpy as np
from clients.small import linen, pictures, run_critic, transitions
from clients.stand_ins import StandIns
from clients.tools import Client

import flaxbn


def run_hugging_face(module, x, train):
    return module(x, deterministic=not train).logits


def run_regnet(module, x, train):
    """Training of all layers: transformers' own hands `deterministic` on to the stem and to shortcuts alone."""

    def training(next_call, args, kwargs, context):
        trains = train and isinstance(context.module, nn.BatchNorm)
        return next_call(*args, **(kwargs | {"use_running_average": False} if trains else kwargs))

    with nn.intercept_methods(training):
        return run_hugging_face(module, x, train)


def hugging_face(model: Any, calls: int, run: Callable[..., Any] = run_hugging_face) -> Client:
    """The Linen module inside a model object of HF transformers."""
    module = model.module
    exactly = module.clone(dtype=np.float64)
    return linen(module, pictures(32), run, momentum=0.9, calls=calls, exactly=exactly)


def hf_resnet() -> Client:
    """Bottlenecks: a stem, three layers each, a shortcut in each stage."""
    from transformers import FlaxResNetForImageClassification, ResNetConfig

    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[2, 2], num_labels=3)
    return hugging_face(FlaxResNetForImageClassification(config, input_shape=(1, 32, 32, 3)), 15)


def hf_resnet_basic() -> Client:
    """Basic blocks: a stem, two layers each, a shortcut in the second stage alone, whose width is another one."""
    from transformers import FlaxResNetForImageClassification, ResNetConfig

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[2, 2], layer_type="basic", num_labels=3)
    return hugging_face(FlaxResNetForImageClassification(config, input_shape=(1, 32, 32, 3)), 10)


def hf_regnet() -> Client:
    """Y blocks, which squeeze and excite; of X blocks transformers 4.57 itself can make no model in Flax."""
    from transformers import FlaxRegNetForImageClassification, RegNetConfig

    config = RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], groups_width=4, num_labels=3)
    return hugging_face(FlaxRegNetForImageClassification(config, input_shape=(1, 32, 32, 3)), 15, run_regnet)


def sbx(name: str, calls: int) -> Client:
    """The critics of CrossQ, each with parameters and statistics of its own; their class renormalizes when warm."""
    with StandIns(["torch", "stable_baselines3", "gymnasium", "tensorflow_probability"]):
        from sbx.common.jax_layers import BatchRenorm
        from sbx.crossq import policies

    flaxbn.recognize(BatchRenorm)
    critics = getattr(policies, name)(net_arch=(16, 16))
    return linen(critics, transitions(), run_critic, momentum=0.99, calls=calls)


INSTALLED: dict[str, Callable[[], Client]] = {
    "transformers: FlaxResNet, bottlenecks": hf_resnet,
    "transformers: FlaxResNet, basic blocks": hf_resnet_basic,
    "transformers: FlaxRegNet": hf_regnet,
    "sbx: VectorCritic of CrossQ": lambda: sbx("VectorCritic", 3),
    "sbx: SimbaVectorCritic": lambda: sbx("SimbaVectorCritic", 4),
}
