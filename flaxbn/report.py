"""Diagnostics as a table and as a figure, for people."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from flaxbn.diagnosis import Diagnosis, by_layer
from flaxbn.drift import Drift
from flaxbn.noise import BatchNoise


def table(found: Diagnosis | Sequence[Drift], *, file: TextIO | None = None) -> None:
    """Prints the drift of each layer, and what a diagnosis found; plain text where `file` is not a terminal.

    A distance is printed with the standard error of its estimate, and marked by `*` where it is more than three of
    these. Where there is a diagnosis, `batch` is the noise of a batch, which a drift must exceed to be a finding.

    Args:
        found: from `diagnose`, or records from `compare`.
        file: where to print; by default the standard output.

    Raises:
        ModuleNotFoundError: if the package `rich` is not installed.
    """
    rich = _imported("rich.console"), _imported("rich.table"), _imported("rich.box")
    console = rich[0].Console(file=file or sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = 160
    records, noise = _parts_of(found)
    rows = rich[1].Table(box=rich[2].ROUNDED if console.is_terminal else None, title=None, pad_edge=False)
    rows.add_column("layer", overflow="fold")
    for column in ("channels", "dead", "mean, std", "+/-", "worst", "batch", "log var", "+/-", "worst", "batch"):
        rows.add_column(column, justify="right")
    for record in records:
        rows.add_row(record.layer, str(record.channels), str(record.dead), *_numbers(record, noise.get(record.layer)))
    console.print(rows)
    if isinstance(found, Diagnosis):
        for line in str(found).splitlines():
            console.print(line, soft_wrap=True, markup=False)


def figure(found: Diagnosis | Sequence[Drift]) -> Any:
    """The drift of each layer as a matplotlib figure: of the mean on the left, of the variance on the right.

    For each layer a line from the median of the channels to the worst, with a mark at the root mean square; in grey
    three standard errors of the estimate, below which nothing is known; in orange the noise of a batch, if there is a
    diagnosis: what lies to its left has been harmless in training.

    Raises:
        ModuleNotFoundError: if the package `matplotlib` is not installed.
    """
    figures = _imported("matplotlib.figure")
    records, noise = _parts_of(found)
    drawn = figures.Figure(figsize=(9, 1.2 + 0.28 * max(len(records), 3)), layout="constrained")
    panels = drawn.subplots(1, 2, sharey=True)
    sides = (
        ("shift", "rms_shift", "shift_error", "mean", "drift of the mean, standard deviations"),
        ("log_ratio", "rms_log_ratio", "log_ratio_error", "var", "drift of the variance, |log ratio|"),
    )
    for panel, (channels, rms, error, batch, label) in zip(panels, sides):
        for y, record in enumerate(records):
            values = getattr(record, channels)
            low = max(values.median, 1e-6)
            panel.plot([low, max(values.worst, low)], [y, y], "-", color="#1f5fa8", linewidth=1.5)
            panel.plot(max(getattr(record, rms), 1e-6), y, "o", color="#1f5fa8", markersize=5)
            panel.barh(y, 3 * getattr(record, error), height=0.8, color="0.85", zorder=0)
            if record.layer in noise:
                panel.plot(
                    getattr(noise[record.layer], batch), y, "|", color="#c8501e", markersize=12, markeredgewidth=2
                )
        panel.set(xscale="log", xlabel=label)
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(records)), [record.layer for record in records])
    panels[0].invert_yaxis()
    return drawn


def _parts_of(found: Diagnosis | Sequence[Drift]) -> tuple[Sequence[Drift], Mapping[str, BatchNoise]]:
    if not isinstance(found, Diagnosis):
        return found, {}
    return found.drift, by_layer(record for group in (found.noise or {}).values() for record in group)


def _numbers(record: Drift, noise: BatchNoise | None) -> list[str]:
    sides = (
        (record.rms_shift, record.shift_error, record.shift.worst, noise and noise.mean),
        (record.rms_log_ratio, record.log_ratio_error, record.log_ratio.worst, noise and noise.var),
    )
    columns = []
    for rms, error, worst, batch in sides:
        mark = " " if rms <= 3 * error else "*"
        columns += [f"{rms:.3g}{mark}", f"{error:.2g}", f"{worst:.3g}", "-" if batch is None else f"{batch:.2g}"]
    return columns


def _imported(name: str) -> Any:
    try:
        return __import__(name, fromlist=["_"])
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise ModuleNotFoundError(
            f"Reports need the package {package}, which is not installed: pip install {package}."
        ) from error
