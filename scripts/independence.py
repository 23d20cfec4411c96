"""Whether a network predicts for each example what it predicts for it alone."""

from typing import Any

import jax
import numpy as np

EXAMPLES = 64
TOLERANCE = 1e-4
"""Of the largest logit. Float32 sums of 800 products in another order come to 1e-6; examples that affect each other by
the statistics of their batch, to 0.1 and more."""


def compare(variables: Any, images: jax.Array, *, model: Any) -> dict[str, Any]:
    """Compares the logits of a batch with those of its examples one at a time, relative to the largest logit."""
    predict = jax.jit(model.apply)
    with jax.default_matmul_precision("highest"):  # by default GPUs and TPUs round what they multiply, to 1e-3 or so
        together = np.asarray(predict(variables, images))
        alone = np.concatenate([predict(variables, image[None]) for image in images])
    difference = np.abs(alone - together).max() / max(np.abs(together).max(), np.finfo(np.float32).tiny)
    return {
        "independent": bool(difference <= TOLERANCE),
        "max_difference": float(difference) if np.isfinite(difference) else None,
        "tolerance": TOLERANCE,
        "examples": len(images),
    }
