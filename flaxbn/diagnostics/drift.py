"""How far stored statistics lie from those of the data, layer by layer, beside the error of the estimate."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from flaxbn.arithmetic.moments import Moments, is_moments, merge
from flaxbn.data.tables import as_html, as_text
from flaxbn.diagnostics.noise import BatchNoise
from flaxbn.layers.names import layer_name
from flaxbn.models.batch_stats import by_path
from flaxbn.models.leaves import named_leaves
from flaxbn.models.places import places_of
from flaxbn.models.rows import RowsByLayer, seen_rows

SIGNIFICANT = 3.0
"""Standard errors from which a drift is told apart from the error of the estimate."""


@dataclass(frozen=True)
class Channels:
    """A quantity of every channel of a layer, not negative, by a few of its values.

    Examples:
        >>> from flaxbn import diagnostics
        >>> shift = diagnostics.Channels(median=0.1, p95=0.4, worst=2.0)
        >>> shift.worst / shift.median
        20.0

    Attributes:
        median: that of the channel in the middle.
        p95: that which one channel in twenty exceeds.
        worst: the largest.
    """

    median: float
    p95: float
    worst: float


@dataclass(frozen=True)
class Drift:
    """How the stored statistics of one layer differ from the population's.

    Examples:
        >>> from flaxbn import diagnostics
        >>> same = diagnostics.Channels(0.3, 0.3, 0.3)
        >>> drift = diagnostics.Drift(
        ...     "norm", channels=8, dead=0, count=1e4, shift=same, log_ratio=same,
        ...     rms_shift=0.3, rms_log_ratio=0.3, shift_error=0.01, log_ratio_error=0.2,
        ... )
        >>> drift.mean_is_significant, drift.var_is_significant, round(drift.share, 2)
        (True, False, 0.09)

    With `s^2 = var + epsilon` of the population, by which the layer divides:

    Attributes:
        layer: its path in `batch_stats`, joined by "/"; with the row in brackets where it has several, of domains say;
            "(the model itself)" for a model that is a single layer.
        channels: how many of its channels saw data.
        dead: channels whose variance is at most `epsilon`: what they say is lost in the division.
        count: the weight of the positions behind the estimate, in the channel that has least.
        shift: `|mean_stored - mean| / s`, in standard deviations; like all that follow, of the channels that are not
            dead, 0 if there is none.
        log_ratio: `|log((var_stored + epsilon) / s^2)|`; 0.1 is ten percent of the variance.
        rms_shift: the root mean square of `shift` over the channels.
        rms_log_ratio: that of `log_ratio`.
        shift_error: the standard error of the estimate in the unit of `shift`, root mean square over the channels.
        log_ratio_error: that in the unit of `log_ratio`.
    """

    layer: str
    channels: int
    dead: int
    count: float
    shift: Channels
    log_ratio: Channels
    rms_shift: float
    rms_log_ratio: float
    shift_error: float
    log_ratio_error: float

    @property
    def mean_is_significant(self) -> bool:
        """Whether the mean differs by more than three standard errors of the estimate, or is NaN."""
        return not self.rms_shift <= SIGNIFICANT * self.shift_error

    @property
    def var_is_significant(self) -> bool:
        """Whether the variance differs by more than three standard errors of the estimate, or is NaN."""
        return not self.rms_log_ratio <= SIGNIFICANT * self.log_ratio_error

    @property
    def is_significant(self) -> bool:
        """Whether the mean or the variance is."""
        return self.mean_is_significant or self.var_is_significant

    @property
    def share(self) -> float:
        """The mean square change of a normalized value, whose variance is 1.

        At first order it is `shift^2 + log_ratio^2 / 4`; of these the significant ones.
        """
        mean = self.rms_shift**2 if self.mean_is_significant else 0.0
        return mean + (self.rms_log_ratio**2 / 4 if self.var_is_significant else 0.0)


class Drifts(tuple[Drift, ...]):
    """The records of `compare`, a tuple, which `print` and notebooks show as a table.

    The columns are those of `table`, in standard deviations and in the logarithm of the variance: the root mean square
    over the channels with the standard error of the estimate, marked by `*` where it is more than three of these, and
    the worst channel.

    Examples:
        >>> from flaxbn import diagnostics
        >>> same = diagnostics.Channels(0.3, 0.3, 0.3)
        >>> drift = diagnostics.Drift(
        ...     "norm", channels=8, dead=0, count=1e4, shift=same, log_ratio=same,
        ...     rms_shift=0.3, rms_log_ratio=0.3, shift_error=0.01, log_ratio_error=0.2,
        ... )
        >>> print(diagnostics.Drifts([drift]))
        layer  dead       mean  worst  log var  worst
        norm    0/8  0.3±0.01*    0.3  0.3±0.2    0.3
    """

    def __str__(self) -> str:
        return as_text(*drift_table(self))

    def _repr_html_(self) -> str:
        return as_html(*drift_table(self))


def drift_table(
    records: Sequence[Drift], noise: Mapping[str, BatchNoise] | None = None
) -> tuple[list[list[str]], list[bool]]:
    """The rows of a table of records, with its head, and which columns are set to the left.

    Args:
        records: of `compare`.
        noise: that of a batch, by layer; there are columns for it then, with a dash where it is not known.

    Returns:
        The head, then a row of cells for each record; and of each column, whether it is set to the left.
    """
    sides = [["mean", "worst"], ["log var", "worst"]]
    head = ["layer", "dead"] + [name for side in sides for name in side + ["batch"] * (noise is not None)]
    table = [head]
    for record in records:
        cells = [record.layer, f"{record.dead}/{record.channels}"]
        pairs = (
            ("mean", record.mean_is_significant, record.rms_shift, record.shift_error, record.shift.worst),
            ("var", record.var_is_significant, record.rms_log_ratio, record.log_ratio_error, record.log_ratio.worst),
        )
        for side, marked, rms, error, worst in pairs:
            cells += [f"{rms:.2g}\u00b1{error:.1g}{'*' * marked}", f"{worst:.2g}"]
            if noise is not None:
                cells.append(f"{getattr(noise[record.layer], side):.2g}" if record.layer in noise else "-")
        table.append(cells)
    return table, [column == 0 for column in range(len(head))]


def compare(batch_stats: Any, population: Any, *, rows: RowsByLayer | None = None, epsilon: float = 1e-5) -> Drifts:
    """Stored statistics against those of data, a record for each layer.

    Examples:
        >>> import flaxbn, numpy as np
        >>> from flaxbn import diagnostics
        >>> stored = {"norm": {"mean": np.zeros(2), "var": np.ones(2)}}
        >>> moments = {"norm": flaxbn.Moments(count=np.full(2, 100.0), mean=np.full(2, 0.5), var=np.ones(2))}
        >>> drifts = diagnostics.compare(stored, moments)
        >>> [(drift.layer, round(drift.rms_shift, 2)) for drift in drifts]
        [('norm', 0.5)]
        >>> print(drifts)
        layer  dead      mean  worst  log var  worst
        norm    0/2  0.5±0.1*    0.5    0±0.1      0

    Args:
        batch_stats: the statistics that are stored, running averages say.
        population: moments from `population_moments`; better a list of them, of K independent parts of the data. The
            standard errors are those of their merged result, from the spread between the parts:

                e^2 = K / (K - 1) * sum_k (n_k / n)^2 (m_k - m)^2

            `n_k` being the counts, and `m_k` the mean or the variance of a part that saw the channel. With one such
            part alone they are `1 / sqrt(n)` of a standard deviation and `sqrt(2 / n)` of the variance, as if all
            positions were independent and normal: far too small where neighbouring pixels are alike.
        rows: from `rows_of`, which channels of a layer are normalized together. By default those along the last axis
            of its statistics, as with `num_domains`, and in `nn.scan` and `nn.vmap` that stack along axis 0; it must be
            given for layers with several feature axes, and for statistics that are stacked along another axis.
        epsilon: what the layers add to the variance.

    Returns:
        A record for each layer of `population`, in its order; for layers with several rows of statistics (domains,
        layers in a scan) one for each row that saw data. `print` and notebooks show them as a table.

    Raises:
        TypeError: if `population` is no tree of moments.
        ValueError: if `batch_stats` lacks a layer of `population`, or has it in another shape; or, without `rows`, a
            row saw data in some of its channels only.
    """
    if isinstance(population, list) and not population:
        raise ValueError("`population` must be moments, or a list of them: got an empty list.")
    parts = [population] if is_moments(population) or not isinstance(population, list | tuple) else list(population)
    if not all(is_moments(value) for part in parts for value in by_path(part).values()):
        raise TypeError(
            "`population` must be moments from `flaxbn.population_moments`, or a list of them: got other arrays. The "
            "statistics that are stored come first, `compare(batch_stats, population)`."
        )
    merged = jax.device_get(merge(*parts))
    leaves = named_leaves(batch_stats)
    each = [by_path(jax.device_get(part)) for part in parts]
    records: list[Drift] = []
    for path, moments in by_path(merged).items():
        kept = [leaves[place] for place in places_of(path, leaves) or ()]
        if not kept or any(np.shape(field) != np.shape(moments.mean) for field in kept):
            raise ValueError(
                f"`batch_stats` must hold the layers of `population` in their shapes: '{layer_name(path)}' has "
                f"moments of shape {np.shape(moments.mean)}, and stored is "
                f"{' and '.join(str(np.shape(field)) for field in kept) or 'nothing there'}."
            )
        everything = (*jax.device_get(kept), moments, *(part[path] for part in each))
        for row in seen_rows(rows, path, moments.count):
            mean, var, whole, *row_parts = row.of(everything)
            records.append(_drift(row.name, mean, var, whole, row_parts, epsilon))
    return Drifts(records)


def _drift(
    name: str, mean: np.ndarray, var: np.ndarray, merged: Moments, parts: Sequence[Moments], epsilon: float
) -> Drift:
    """The record of one row of channels: what is stored against `merged`, whose `parts` tell its error.

    In float64 on the host, so that the difference of a large stored mean and a large measured one is not rounded away.
    """
    alive = np.asarray(merged.var) > epsilon
    divisor = np.asarray(merged.var, np.float64) + epsilon
    shift = np.abs(mean - np.asarray(merged.mean, np.complex128)) / np.sqrt(divisor)
    with np.errstate(invalid="ignore", divide="ignore"):  # a variance that is negative or NaN shows as NaN
        log_ratio = np.abs(np.log((np.asarray(var, np.float64) + epsilon) / divisor))
    mean_error, var_error = _standard_errors(merged, parts)
    return Drift(
        layer=name,
        channels=len(divisor),
        dead=int(np.sum(~alive)),
        count=float(np.min(merged.count)),
        shift=_channels(shift[alive]),
        log_ratio=_channels(log_ratio[alive]),
        rms_shift=_rms(shift[alive]),
        rms_log_ratio=_rms(log_ratio[alive]),
        shift_error=_rms((mean_error / np.sqrt(divisor))[alive]),
        log_ratio_error=_rms((var_error / divisor)[alive]),
    )


def _standard_errors(merged: Moments, parts: Sequence[Moments]) -> tuple[np.ndarray, np.ndarray]:
    """Of the mean and of the variance, for each channel, in their own units: `e` of `compare`."""
    count, var = np.asarray(merged.count, np.float64), np.asarray(merged.var, np.float64)
    number = np.sum([part.count > 0 for part in parts], axis=0)
    factor = number / np.maximum(number - 1, 1)

    def error(field: str, of_one: np.ndarray) -> np.ndarray:
        whole = np.asarray(getattr(merged, field), np.complex128)
        squares = ((part.count / count) ** 2 * np.abs(getattr(part, field) - whole) ** 2 for part in parts)
        return np.where(number > 1, np.sqrt(factor * np.sum([*squares], axis=0)), of_one)

    return error("mean", np.sqrt(var / count)), error("var", var * np.sqrt(2 / count))


def _channels(values: np.ndarray) -> Channels:
    """The values of all channels in short; zeros where every channel is dead."""
    if not len(values):
        return Channels(0.0, 0.0, 0.0)
    return Channels(*(float(v) for v in (np.median(values), np.percentile(values, 95), np.max(values))))


def _rms(values: np.ndarray) -> float:
    """The root mean square; 0 where every channel is dead."""
    return math.sqrt(float(np.mean(np.square(values)))) if len(values) else 0.0
