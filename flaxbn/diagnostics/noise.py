"""How far the statistics of a batch stray from the population's."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from flaxbn.arithmetic.moments import Moments, merge
from flaxbn.data.batches import count_samples
from flaxbn.data.progress import Progress, counting
from flaxbn.diagnostics.sample import some_batches
from flaxbn.estimation.precise import batch_moments
from flaxbn.models.arguments import Model, open_model, takes_model
from flaxbn.models.batch_stats import by_path
from flaxbn.models.linen import Call
from flaxbn.models.rows import RowsByLayer, rows_of, seen_rows
from flaxbn.models.unseen import one_warning


@dataclass(frozen=True)
class BatchNoise:
    """The noise that batches of one size bring to one layer.

    Examples:
        >>> from flaxbn import diagnostics
        >>> noise = diagnostics.BatchNoise(
        ...     "norm", batch_size=16, mean=0.25, var=0.5, enough=400, typical_share=0.125, batches=64
        ... )
        >>> noise.share
        0.125

    With `s^2 = var + epsilon` of the population:

    Attributes:
        layer: its path in `batch_stats`, joined by "/"; with the row in brackets where it has several, of domains say;
            "(the model itself)" for a model that is a single layer.
        batch_size: the number of samples in a batch.
        mean: the root mean square of `(mean_batch - mean) / s` over batches and channels whose variance exceeds
            `epsilon`.
        var: that of `(var_batch - var) / s^2`.
        enough: the smallest batch size at which both are at most the tolerance.
        typical_share: `share` of the median channel, which a few channels that are rarely active do not raise.
        batches: how many batches say so, of the median channel.
    """

    layer: str
    batch_size: int
    mean: float
    var: float
    enough: int
    typical_share: float
    batches: int

    @property
    def share(self) -> float:
        """The part of a normalized value's variance that is noise of the batch: `mean^2 + var^2 / 4` at first order."""
        return self.mean**2 + self.var**2 / 4


@takes_model
def batch_noise(
    model: Model,
    variables: Mapping[str, Any],
    batches: Any,
    *,
    batch_size: int | None = None,
    call: Call | None = None,
    only: Callable[[str], bool] | None = None,
    tolerance: float = 0.1,
    num_batches: int = 64,
    epsilon: float = 1e-5,
    progress: Progress | None = None,
) -> tuple[BatchNoise, ...]:
    """How far batches of one size stray from their population in each layer, the weights being frozen.

    Each batch is normalized by itself in all layers, as in training. Its moments are compared with those of all
    batches, merged; since those hold the batch itself, squares are multiplied by `K / (K - 1)` for K batches.

    The noise of independent samples falls as `1 / sqrt(B)`, by which `enough` is computed: `B (noise / tolerance)^2`.
    Batches that are sorted, by class say, stray further: give the samples in the order of training, in which
    consecutive samples make a batch.

    Examples:
        >>> import flax.linen as nn, jax, numpy as np
        >>> from flaxbn import diagnostics
        >>> model = nn.BatchNorm(use_running_average=True)
        >>> x = np.random.default_rng(0).normal(3, 1, (1024, 100)).astype("float32")
        >>> (noise,) = diagnostics.batch_noise(model, model.init(jax.random.key(0), x), x, batch_size=16)
        >>> round(noise.mean, 2), 16**-0.5
        (0.25, 0.25)

    Args:
        model: the model; for one of flax.nnx, `*nnx.split(model)` stands in the place of `model, variables`.
        variables: its variables; read only.
        batches: with `batch_size`, a pytree of arrays with a common leading sample axis; without, an iterable of
            batches of one size, which is read once, up to `num_batches` batches; a smaller last one is left out.
        batch_size: the number of samples in a batch; what does not fill one at the end is left out.
        call: how the model is run for evaluation, `(module, batch) -> output`; by default `module(batch)`.
        only: `path -> bool`, the layers that training normalizes by their batches; by default all.
        tolerance: of the noise, in standard deviations for the mean and as a part of the variance.
        num_batches: at most so many batches, of arrays or of a list of batches drawn at random, always the same; of
            another iterable the first, whose population stands for all.
        epsilon: what the layers add to the variance.
        progress: `(done, total)`, called after each batch; `flaxbn.progress_bar()` shows it.

    Returns:
        A record for each layer; for layers with several rows of statistics one for each row that saw data.

    Raises:
        ValueError: if there are fewer than two batches, or of several sizes; or the tolerance is not positive.
        TypeError: if `batches` does not fit `batch_size`.
    """
    if not tolerance > 0:
        raise ValueError(f"`tolerance` must be positive: got {tolerance}.")
    model, variables = open_model(model, variables)
    chosen = some_batches(batches, batch_size, num_batches)
    with one_warning(), counting(progress) as counter:
        counter.expect(len(chosen))
        found = [*counter.each(batch_moments(model, variables, chosen, call=call, only=only))]
    rows = rows_of(model, variables, chosen[0], call=call)
    return noise_among(found, count_samples(chosen[0]), rows, tolerance=tolerance, epsilon=epsilon)


def noise_among(
    moments: Sequence[Any], batch_size: int, rows: RowsByLayer, *, tolerance: float = 0.1, epsilon: float = 1e-5
) -> tuple[BatchNoise, ...]:
    """`batch_noise` from the moments of at least two batches of one population, as `population_moments` gives them.

    Args:
        moments: a tree for each batch.
        batch_size: how many samples each of them held.
        rows: which channels of a layer are normalized together.
        tolerance: for `BatchNoise.enough`.
        epsilon: what the layers add to the variance.

    Returns:
        A record for each row that at least two batches reached: of one batch alone no noise is known.
    """
    each = [by_path(jax.device_get(tree)) for tree in moments]
    records: list[BatchNoise] = []
    for path, merged in by_path(jax.device_get(merge(*moments))).items():
        everything = merged, *(moments_of[path] for moments_of in each)
        for row in seen_rows(rows, path, merged.count):
            whole, *parts = row.of(everything)
            seen = np.stack([part.count > 0 for part in parts])
            if np.any(seen.sum(0) > 1):
                records.append(_noise(row.name, whole, parts, seen, batch_size, tolerance, epsilon))
    return tuple(records)


def by_layer(records: Iterable[BatchNoise]) -> dict[str, BatchNoise]:
    """The largest noise of each layer, where domains have one of their own."""
    found: dict[str, BatchNoise] = {}
    for record in sorted(records, key=lambda record: record.share):
        found[record.layer] = record
    return found


def _noise(
    name: str,
    merged: Moments,
    each: Sequence[Moments],
    seen: np.ndarray,
    batch_size: int,
    tolerance: float,
    epsilon: float,
) -> BatchNoise:
    """Of the channels that two batches or more have `seen`, of shape (batches, channels)."""
    number = seen.sum(0)
    alive = (np.asarray(merged.var) > epsilon) & (number > 1)
    divisor = (np.asarray(merged.var, np.float64) + epsilon)[alive]

    def mean_square(field: str, unit: np.ndarray) -> np.ndarray:
        deviations = np.stack([(getattr(m, field) - getattr(merged, field))[alive] / unit for m in each])
        return np.sum(np.abs(deviations) ** 2, 0, where=seen[:, alive]) / (number[alive] - 1)

    squares = mean_square("mean", np.sqrt(divisor)), mean_square("var", divisor)
    mean, var = (math.sqrt(float(np.mean(s))) if alive.any() else 0.0 for s in squares)
    enough = max(2, math.ceil(batch_size * (max(mean, var) / tolerance) ** 2))
    typical = float(np.median(squares[0] + squares[1] / 4)) if alive.any() else 0.0
    return BatchNoise(name, batch_size, mean, var, enough, typical, int(np.median(number[number > 1])))
