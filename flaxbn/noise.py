"""How far the statistics of a batch stray from the population's."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from flaxbn import batches as data
from flaxbn import stored
from flaxbn.moments import Moments, merge
from flaxbn.observe import Call
from flaxbn.population import population_moments


@dataclass(frozen=True)
class BatchNoise:
    """The noise that batches of one size bring to one layer.

    With `s^2 = var + epsilon` of the population:

    Attributes:
        layer: its path in `batch_stats`, joined by "/"; with the row in brackets where it has several, of domains say.
        batch_size: the number of samples in a batch.
        mean: the root mean square of `(mean_batch - mean) / s` over batches and channels.
        var: that of `(var_batch - var) / s^2`.
        enough: the smallest batch size at which both are at most the tolerance.
    """

    layer: str
    batch_size: int
    mean: float
    var: float
    enough: int

    @property
    def share(self) -> float:
        """The part of a normalized value's variance that is noise of the batch: `mean^2 + var^2 / 4` at first order."""
        return self.mean**2 + self.var**2 / 4


def batch_noise(
    model: nn.Module,
    variables: Mapping[str, Any],
    batches: Any,
    *,
    batch_size: int,
    call: Call | None = None,
    tolerance: float = 0.1,
    num_batches: int = 64,
    epsilon: float = 1e-5,
) -> tuple[BatchNoise, ...]:
    """How far batches of `batch_size` samples stray from their population in each layer, the weights being frozen.

    Each batch is normalized by itself in all layers, as in training. Its moments are compared with those of all
    batches, merged; since those hold the batch itself, squares are multiplied by `K / (K - 1)` for K batches.

    The noise of independent samples falls as `1 / sqrt(B)`, by which `enough` is computed: `B (noise / tolerance)^2`.
    Batches that are sorted, by class say, stray further: give the samples in the order of training, in which
    consecutive samples make a batch.

    Args:
        model: the model.
        variables: its variables; read only.
        batches: a pytree of arrays with a common leading sample axis.
        batch_size: the number of samples in a batch; what does not fill one at the end is left out.
        call: how the model is run for evaluation, `(module, batch) -> output`; by default `module(batch)`.
        tolerance: of the noise, in standard deviations for the mean and as a part of the variance.
        num_batches: at most so many batches, drawn at random, always the same.
        epsilon: what the layers add to the variance.

    Returns:
        A record for each layer; for layers with several rows of statistics one for each row that saw data.

    Raises:
        ValueError: if there are fewer than two batches, or the tolerance is not positive.
    """
    if not tolerance > 0:
        raise ValueError(f"`tolerance` must be positive: got {tolerance}.")
    chosen = some_batches(batches, batch_size, num_batches)
    found = [population_moments(model, variables, [batch], call=call, keep_unseen=True) for batch in chosen]
    return noise_among(found, batch_size, tolerance=tolerance, epsilon=epsilon)


def noise_among(
    moments: Sequence[Any], batch_size: int, *, tolerance: float = 0.1, epsilon: float = 1e-5
) -> tuple[BatchNoise, ...]:
    """`batch_noise` from the moments of at least two batches of one population, as `population_moments` gives them."""
    each = [stored.by_path(jax.device_get(tree)) for tree in moments]
    records: list[BatchNoise] = []
    for path, merged in stored.by_path(jax.device_get(merge(*moments))).items():
        everything = merged, *(by_path[path] for by_path in each)
        for name, index in stored.rows(path, np.shape(merged.mean)):
            whole, *rows = jax.tree.map(lambda a, index=index: np.asarray(a)[index], everything)
            seen = [row for row in rows if np.all(row.count > 0)]
            if len(seen) > 1:
                records.append(_noise(name, whole, seen, batch_size, tolerance, epsilon))
    return tuple(records)


def some_batches(arrays: Any, batch_size: int, num_batches: int) -> list[Any]:
    """At most so many batches of consecutive samples, drawn at random, always the same, in their order."""
    data.check_positive("batch_size", batch_size)
    data.check_positive("num_batches", num_batches)
    samples = data.count_samples(arrays)
    count = samples // batch_size
    if min(count, num_batches) < 2:
        raise ValueError(
            f"Two batches are needed at least: got {samples} samples, `batch_size={batch_size}` and "
            f"`num_batches={num_batches}`."
        )
    chosen = np.sort(np.random.default_rng(0).permutation(count)[:num_batches]) * batch_size
    return [jax.tree.map(lambda a, i=i: a[i : i + batch_size], arrays) for i in chosen.tolist()]


def _noise(
    name: str, merged: Moments, each: Sequence[Moments], batch_size: int, tolerance: float, epsilon: float
) -> BatchNoise:
    divisor = np.asarray(merged.var, np.float64) + epsilon
    factor = len(each) / (len(each) - 1)

    def rms(deviations: list[Any]) -> float:
        return math.sqrt(factor * float(np.mean(np.abs(np.stack(deviations)) ** 2)))

    mean = rms([(m.mean - merged.mean) / np.sqrt(divisor) for m in each])
    var = rms([(m.var - merged.var) / divisor for m in each])
    enough = max(2, math.ceil(batch_size * (max(mean, var) / tolerance) ** 2))
    return BatchNoise(name, batch_size, mean, var, enough)
