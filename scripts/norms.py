"""The layer that normalizes in train_mnist.py."""

import functools
from collections.abc import Callable
from typing import Any

import flaxbn


def make_norm(api: str, norm: str, num_steps: int) -> Callable[..., Any]:
    """The layer; the ramp of renorm, 40 000 steps in the paper, is scaled to the run."""
    layers = flaxbn.linen if api == "linen" else flaxbn.nnx
    if norm == "batch":
        return layers.BatchNorm
    scale = 40_000 / num_steps
    return functools.partial(
        layers.BatchRenorm,
        r_max=lambda step: flaxbn.paper_r_max(step * scale),
        d_max=lambda step: flaxbn.paper_d_max(step * scale),
    )
