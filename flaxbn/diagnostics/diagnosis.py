"""Which trap of batch normalization a model is in: the evidence is gathered, then each rule looks at it.

A rule stands beside the name and the cure of its trap, in one of three families: preconditions, stored statistics,
composition of batches. It takes the evidence, gives findings, and measures nothing itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from jaxtyping import Array

from flaxbn.data.progress import Progress, counting
from flaxbn.data.tables import as_html
from flaxbn.diagnostics.batch_composition import alike_batches, small_batches
from flaxbn.diagnostics.drift import Drift, drift_table
from flaxbn.diagnostics.evidence import NoiseByDomain, Subject, gather
from flaxbn.diagnostics.findings import Finding, to_be_pasted
from flaxbn.diagnostics.loss_gap import Gap
from flaxbn.diagnostics.noise import BatchNoise, by_layer
from flaxbn.diagnostics.preconditions import PRECONDITIONS, not_finite_loss
from flaxbn.diagnostics.renormalization import not_begun, out_of_bounds
from flaxbn.diagnostics.stored_statistics import lagging_average, mixed_domains, never_estimated
from flaxbn.estimation.request import check_stored
from flaxbn.models.arguments import Model, is_opened_nnx, open_model, takes_model
from flaxbn.models.linen import Call
from flaxbn.models.unseen import one_warning

RULES = (
    not_finite_loss,
    never_estimated,
    mixed_domains,
    lagging_average,
    alike_batches,
    small_batches,
    not_begun,
    out_of_bounds,
)
"""`Evidence -> findings`, in the order in which they are reported: what hides other traps comes first."""


_NOTHING = "Nothing is wrong with batch normalization."


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found; printed, it is the findings in words; in a notebook a table of all layers comes with them.

    Examples:
        >>> from flaxbn import diagnostics
        >>> print(diagnostics.Diagnosis(findings=()))
        Nothing is wrong with batch normalization.

    Attributes:
        findings: the traps, those that hide others first; empty where nothing is wrong.
        drift: the stored statistics against those of all data.
        noise: of batches, by domain where batches hold one domain each, else under None.
        gap: what normalization adds to the loss, by domain, and under None for all.
        shuffled: as `noise`, where the examples of these batches, those of each domain by themselves, are shuffled.
    """

    findings: tuple[Finding, ...]
    drift: tuple[Drift, ...] = ()
    noise: NoiseByDomain | None = None
    gap: Mapping[Any, Gap] | None = None
    shuffled: NoiseByDomain | None = None

    def __str__(self) -> str:
        return "\n".join([*(map(str, self.findings) if self.findings else [_NOTHING]), *self._loss])

    def _repr_html_(self) -> str:
        findings = [finding._repr_html_() for finding in self.findings] or [f"<p>{_NOTHING}</p>"]
        table = [as_html(*drift_table(self.drift, noise_by_layer(self)))] if self.drift else []
        return "".join([*findings, *(f"<p>{escape(line)}</p>" for line in self._loss), *table])

    @property
    def _loss(self) -> list[str]:
        """A sentence on the loss, if it was looked at."""
        if self.gap is None:
            return []
        whole = self.gap[None]
        return [
            f"Stored statistics instead of the batch's add {whole.normalization:+.4f} (standard error "
            f"{whole.error:.4f}) to a training loss of {whole.batch:.4f}."
        ]


def noise_by_layer(found: Diagnosis) -> dict[str, BatchNoise]:
    """The noise of a batch in each layer, the largest of all domains."""
    return by_layer(record for group in (found.noise or {}).values() for record in group)


@takes_model
def diagnose(
    model: Model,
    variables: Mapping[str, Any],
    batches: Any,
    loss_fn: Callable[[Any, Any], Array],
    *,
    batch_size: int | None = None,
    call: Call | None = None,
    domain: Callable[[Any], Any] | None = None,
    only: Callable[[str], bool] | None = None,
    num_batches: int = 64,
    epsilon: float = 1e-5,
    progress: Progress | None = None,
) -> Diagnosis:
    """Names the traps that a model is in, with the number that shows each, and its cure. Nothing is changed.

    The weights are frozen, and up to `num_batches` batches of the training data are each normalized by themselves, as
    in training. From their moments come the population, the error of its estimate (from eight parts) and the noise of
    a batch.

    | trap | when |
    | --- | --- |
    | not finite | statistics, weights, data, outputs or losses hold NaN or infinities, or a stored variance is \
negative |
    | training mode at inference | `assert_batch_independent` fails |
    | never estimated | a layer's stored mean is all 0 and its variance all 1 |
    | mixed domains | nine batches in ten or more hold one domain, and the population of all is far from that of one: \
no shared statistics can be right |
    | lagging average | else, the stored statistics of a layer are far from the population's |
    | non-i.i.d. batches | `BatchNoise.typical_share` of a layer is more than twice that of the same examples \
shuffled, significantly: the examples of a batch are alike |
    | batches too small | `BatchNoise.typical_share` of a layer exceeds 0.1, of the examples shuffled too: a tenth of \
what half of its channels put out is noise of the batch; or it is twice that of the examples shuffled, but the batches \
are too few to say that their order did it |
    | renormalization not begun | a layer of `BatchRenorm` was updated, and its schedules are still at 1 and 0 |
    | batches too small to renormalize | a tenth of what half of the channels of a layer of `BatchRenorm` put out is \
noise of the batch that its bounds clip, of the examples shuffled |

    After one of the first two nothing else is looked at. *Far* is what changes a layer's output by more than the noise
    of a batch does, `Drift.share` against `BatchNoise.share`: training has shown the network that much in every step;
    by more than a thousandth of its variance; and by more than three standard errors of the estimate. The
    population is that of batches as in training or, of arrays, of batches as an estimate cuts them, where the stored
    statistics are much closer to that.

    The traps of batches are those of other layers than `BatchRenorm`, which puts out what the running average makes of
    its input; the last two are its own.

    Examples:
        >>> import flax.linen as nn, jax, numpy as np
        >>> from flaxbn import diagnostics
        >>> model = nn.BatchNorm(use_running_average=True)
        >>> x = np.random.default_rng(0).normal(3, 1, (256, 2)).astype("float32")
        >>> variables = model.init(jax.random.key(0), x)
        >>> found = diagnostics.diagnose(model, variables, x, lambda output, batch: output.sum(-1), batch_size=32)
        >>> [(finding.trap, finding.where) for finding in found.findings]
        [('never estimated', '(the model itself)')]

    Args:
        model: the model; for one of flax.nnx, `*nnx.split(model)` stands in the place of `model, variables`.
        variables: its variables with the statistics to be looked at; read only.
        batches: training data in the order of training. With `batch_size` a pytree of arrays, of which so many
            consecutive samples are normalized together; without, an iterable of batches of one size, each normalized
            by itself. It is read once, up to `num_batches` batches, which are held; a smaller last one is left out.
        loss_fn: `(output, batch) -> losses`, one for each example.
        batch_size: of the training, on one device where devices do not synchronize; where arrays are given.
        call: how the model is run for evaluation, `(module, batch) -> output`; by default `module(batch)`.
        domain: `batch -> labels`, one for each example.
        only: `path -> bool`, the layers that training normalizes by their batches; by default all. Leave
            out frozen ones.
        num_batches: at most so many batches, at least 16 for errors worth the name. Of arrays or of a list of batches
            they are drawn at random, always the same. Of another iterable they are the first: then the population is
            that of these, which is not that of all where the data are sorted, and an order that changes more slowly
            does not show.
        epsilon: what the layers add to the variance.
        progress: `(done, total)`, called after each batch of each pass over them; `total` is None until all are done,
            since what is found decides what is looked at. `flaxbn.progress_bar()` shows it.

    Raises:
        CallError: if the model does not run on a batch, or `loss_fn` or `domain` fails.
        ValueError: if the model has no batch-norm layer, which is seen before data are read if `batch_stats` tells; if
            there are fewer than two batches, or of several sizes; or an argument does not fit, as in `gap`.
        TypeError: if `model` is neither a `flax.linen.Module` nor split from an `nnx.Module`, or `batches`
            does not fit `batch_size`.

    Warns:
        UserWarning: if a layer of a class that flaxbn does not know takes part: nothing is found out about it.
    """
    model, variables = open_model(model, variables)
    check_stored(variables, model)
    with one_warning(), counting(progress) as counter:
        options: dict[str, Any] = {"call": call, "only": only, "batch_size": batch_size, "num_batches": num_batches}
        subject = Subject.of(model, variables, batches, **options, counter=counter)
        subject.note_unseen()
        meaningless = next((found for rule in PRECONDITIONS if (found := rule(subject))), None)
        words: dict[str, Any] = {"is_nnx": is_opened_nnx(model), "has_call": call is not None, "batch_size": batch_size}
        if meaningless:
            return Diagnosis(tuple(to_be_pasted(finding, **words) for finding in meaningless))
        evidence = gather(subject, loss_fn, domain, epsilon)
    findings = tuple(to_be_pasted(finding, **words) for rule in RULES for finding in rule(evidence))
    return Diagnosis(findings, evidence.drift, evidence.noise, evidence.losses, evidence.shuffled)
