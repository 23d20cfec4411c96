"""Population statistics from a class-imbalanced sample, weighted by inverse sampling probability."""

from typing import Any

import data
import flax.linen as nn
import jax
import numpy as np
import processes
from domain_results import distances
from training import accuracy, evaluate

import flaxbn

# A small batch holds few rare examples, and each layer normalizes by its own batch.
BATCH_SIZE = 512


def sampling_probability(labels: np.ndarray, imbalance: float) -> np.ndarray:
    """The probability of each example to be drawn: in the upper half of the classes `imbalance` times smaller."""
    rate = np.where(labels <= labels.max() / 2, 1, 1 / imbalance)
    return rate / rate.sum()


def estimates(
    model: nn.Module,
    variables: dict[str, Any],
    split: data.Split,
    *,
    imbalance: float,
    num_samples: int,
    seed: int,
) -> dict[str, Any]:
    """The population statistics of all of `split` (balanced), and those from a sample of it drawn with replacement.

    Each process reads its part of them.
    """
    probability = sampling_probability(split.labels, imbalance)
    drawn = np.random.default_rng(seed).choice(len(probability), num_samples, p=probability)
    weights = 1 / (len(probability) * probability[drawn])
    sample = {"images": split.images[drawn], "weight": weights.astype(np.float32)}
    return {
        kind: flaxbn.estimate_population_stats(
            model,
            variables,
            jax.tree.map(lambda a: a[processes.own_rows(len(a))], batches),
            call=evaluate,
            batch_size=max(BATCH_SIZE // jax.process_count(), 2),
            sample_weight=sample_weight,
            sharding=flaxbn.data_sharding(),
        )
        for kind, batches, sample_weight in (
            ("balanced", {"images": split.images}, None),
            ("weighted", sample, _weight),
            ("unweighted", sample, None),
        )
    }


def compare(
    model: nn.Module, variables: dict[str, Any], train: data.Split, test: tuple[data.Split, Any], **options: Any
) -> dict[str, Any]:
    """For each of the `estimates` from `train` the accuracy on `test`, and how far it is from the balanced one."""
    found = estimates(model, variables, train, **options)
    return {
        kind: {
            "test_accuracy": accuracy(flaxbn.domains.select(variables, found, kind), *test, model=model),
            "layers": distances(found[kind], found["balanced"]),
        }
        for kind in found
    }


def _weight(batch: dict[str, jax.Array]) -> jax.Array:
    return batch["weight"]
