"""How much of a difference in loss is due to normalization."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Array

from flaxbn.data.batches import Stream, count_samples, open_batches
from flaxbn.data.progress import Progress, counting
from flaxbn.data.samples import gather_names, show
from flaxbn.diagnostics.compiled import compiled
from flaxbn.diagnostics.sample import labels_of
from flaxbn.models.apply import apply
from flaxbn.models.arguments import Model, open_model, takes_model
from flaxbn.models.linen import Call
from flaxbn.models.unseen import one_warning
from flaxbn.models.user_functions import run_explained


@dataclass(frozen=True)
class Gap:
    """Mean losses on the training data by two kinds of statistics, and on the validation data.

    Examples:
        >>> from flaxbn import diagnostics
        >>> loss = diagnostics.Gap(batch=0.5, stored=0.75, error=0.01, validation=1.5, samples=1000)
        >>> loss.normalization, loss.rest
        (0.25, 0.75)

    Attributes:
        batch: on the training data, each batch normalized by its own statistics, as in training.
        stored: on the same data with the same weights, normalized by the stored statistics, as in inference.
        error: the standard error of `stored - batch`. The examples of a batch share its statistics, so that K batches
            are K independent values: `K / (K - 1) sum_k (sum_i d_i - d)^2 / n^2`, the inner sum over the examples of a
            batch, whose difference is `d_i`, `d` being the mean. NaN for one batch.
        validation: on the validation data, by the stored statistics; None where none was given.
        samples: the number of training examples.
    """

    batch: float
    stored: float
    error: float
    validation: float | None
    samples: int

    @property
    def normalization(self) -> float:
        """What normalization adds to the loss on the same data with the same weights."""
        return self.stored - self.batch

    @property
    def rest(self) -> float | None:
        """What other data add to the loss with the same normalization: generalization, another distribution."""
        return None if self.validation is None else self.validation - self.stored


@takes_model
def gap(
    model: Model,
    variables: Mapping[str, Any],
    batches: Any,
    loss_fn: Callable[[Any, Any], Array],
    *,
    call: Call | None = None,
    batch_size: int | None = None,
    validation: Any = None,
    domain: Callable[[Any], Any] | None = None,
    progress: Progress | None = None,
) -> dict[Any, Gap]:
    """Splits the difference of training and validation loss into the part of normalization and the rest.

        validation - batch = (stored - batch) + (validation - stored)

    All are losses of the model in evaluation mode, with the same weights: dropout is off, nothing is augmented.

    Examples:
        >>> import flax.linen as nn, jax, numpy as np
        >>> from flaxbn import diagnostics
        >>> model = nn.BatchNorm(use_running_average=True)
        >>> x = np.tile(np.float32([[2.0], [4.0]]), (32, 1))
        >>> variables = model.init(jax.random.key(0), x)  # mean 0 and variance 1, where 3 and 1 are right
        >>> loss = diagnostics.gap(model, variables, x, lambda y, batch: (y**2).mean(-1), batch_size=8)[None]
        >>> round(loss.batch, 1), round(loss.stored, 1), round(loss.normalization, 1)
        (1.0, 10.0, 9.0)

    Args:
        model: the model; for one of flax.nnx, `*nnx.split(model)` stands in the place of `model, variables`.
        variables: its variables with the statistics to be looked at; read only.
        batches: training data, composed as in training: what is normalized together there is a batch here. Arrays with
            `batch_size`, which are cut in their order (what fills no batch is left out), or an iterable of batches.
        loss_fn: `(output, batch) -> losses`, one for each example.
        call: how the model is run for evaluation, `(module, batch) -> output`; by default `module(batch)`.
        batch_size: the number of samples in a batch, where arrays are given.
        validation: validation data, in the same form; all of them count.
        domain: `batch -> labels`, one for each example; then there is a record for each label of the training data
            besides.
        progress: `(done, total)`, called after each batch; `total` is None until all are done. `flaxbn.progress_bar()`
            shows it.

    Returns:
        Records by label; that of all examples under None.

    Raises:
        ValueError: if there are no data, or `loss_fn` or `domain` does not give one value for each example.
    """
    model, variables = open_model(model, variables)

    def loss(batch: Any, statistics: Literal["running", "batch"]) -> Any:
        output = apply(model, variables, batch, statistics=statistics, call=call)
        wanted = "`(output, batch) -> losses`, one for each example"
        return run_explained("loss_fn", wanted, loss_fn, output=output, batch=batch)

    losses = compiled(lambda batch: (loss(batch, "batch"), loss(batch, "running")))
    validation_losses = compiled(lambda batch: (loss(batch, "running"),))

    with one_warning(), counting(progress) as counter:
        training = counter.each(_cut(batches, batch_size, full=True))
        (by_batch, by_stored), labels, numbers = _over(training, losses, domain)
        rows = {None: np.full(len(labels), True)} | {label: labels == label for label in _distinct(labels, domain)}
        there: dict[Any, float | None] = dict.fromkeys(rows)
        if validation is not None:
            (found,), others, _ = _over(counter.each(_cut(validation, batch_size)), validation_losses, domain)
            there |= {label: float(np.mean(found[others == label])) for label in _distinct(others, domain)}
            there[None] = float(np.mean(found))
    return {
        label: _record(by_batch[taken], by_stored[taken], numbers[taken], there[label]) for label, taken in rows.items()
    }


def _over(
    batches: Iterable[Any], losses: Callable[[Any], Sequence[Array]], domain: Callable[[Any], Any] | None
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """The columns of losses of all examples, their labels, and the numbers of their batches.

    Losses are kept for each example, in float64, since the standard error needs to know which ones shared a batch.
    """
    rows = []
    for number, batch in enumerate(batches):
        size = count_samples(batch)
        labels = np.zeros(size) if domain is None else labels_of(domain, batch)
        found = [np.asarray(column, np.float64) for column in losses(batch)]
        if found[0].shape != (size,):
            raise ValueError(
                f"`loss_fn` must give one value for each example, shape ({size},): got {found[0].shape}. "
                + ("Reduce all axes but that of examples." if found[0].ndim else "Leave out its mean or sum over them.")
            )
        rows.append((*found, labels, np.full(size, number)))
    if not rows:
        raise ValueError("The data must hold at least one batch: got none.")
    *columns, labels, numbers = (np.concatenate(column) for column in zip(*rows))
    return columns, labels, numbers


def _cut(batches: Any, batch_size: int | None, *, full: bool = False) -> Iterable[Any]:
    """Batches in the order of the data; of arrays, where `full`, without a smaller last one."""
    data = open_batches(batches, batch_size, in_order=True)
    if isinstance(data, Stream) or not full:
        return (gather_names(show(batch)) for batch in data)
    return (data.take(places) for group in data.groups for places in group if len(places) == batch_size)


def _distinct(labels: np.ndarray, domain: Callable[[Any], Any] | None) -> list[Any]:
    """The labels of the domains in ascending order; none where domains are not told apart."""
    return [] if domain is None else np.unique(labels).tolist()


@np.errstate(invalid="ignore")  # where losses are infinite, their difference is NaN
def _record(by_batch: np.ndarray, by_stored: np.ndarray, numbers: np.ndarray, validation: float | None) -> Gap:
    """The record of some examples, with the numbers of the batches that they lay in."""
    difference = by_stored - by_batch
    sums = np.bincount(numbers, difference - np.mean(difference))
    count = len(np.unique(numbers))
    error = math.sqrt(count / (count - 1) * float(np.sum(sums**2))) / len(difference) if count > 1 else math.nan
    return Gap(float(np.mean(by_batch)), float(np.mean(by_stored)), error, validation, len(difference))
