"""Diagnostics as a table and as a figure, for people.

Both need a package that the library does without (`rich`, `matplotlib`), and import it when they are called.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import numpy as np

from flaxbn.diagnostics.diagnosis import Diagnosis, noise_by_layer
from flaxbn.diagnostics.drift import SIGNIFICANT, Drift, drift_table
from flaxbn.diagnostics.noise import BatchNoise

DRIFT, BATCH = "#1f5fa8", "#c8501e"
_LEAST = 1e-6
"""What is less is drawn here, since a logarithmic axis has no 0: a millionth of these units concerns nobody."""
_SIDES = (
    ("shift", "rms_shift", "shift_error", "mean", "drift of the mean, standard deviations"),
    ("log_ratio", "rms_log_ratio", "log_ratio_error", "var", "drift of the variance, |log ratio|"),
)


def table(found: Diagnosis | Sequence[Drift], *, file: TextIO | None = None) -> None:
    """Prints the drift of each layer, and what a diagnosis found; plain text where `file` is not a terminal.

    For each layer the dead channels of all; of the mean, in standard deviations, and of the logarithm of the variance
    the distance with the standard error of its estimate, marked by `*` where it is more than three of these, and that
    of the worst channel; and where there is a diagnosis the noise of a batch, which a drift exceeds to be a finding.

    Examples:
        >>> import flaxbn, numpy as np
        >>> from flaxbn import diagnostics
        >>> stored = {"norm": {"mean": np.zeros(2), "var": np.ones(2)}}
        >>> moments = {"norm": flaxbn.Moments(count=np.full(2, 100.0), mean=np.full(2, 0.5), var=np.ones(2))}
        >>> diagnostics.table(diagnostics.compare(stored, moments))
        layer dead     mean worst batch log var worst batch
        norm   0/2 0.5±0.1*   0.5     -   0±0.1     0     -

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
    rows = rich[1].Table(
        box=rich[2].SIMPLE_HEAD if console.is_terminal else None, pad_edge=False, collapse_padding=True
    )
    (head, *cells), _ = drift_table(records, noise)
    rows.add_column(head[0], overflow="fold")
    for column in head[1:]:
        rows.add_column(column, justify="right", no_wrap=True)
    for row in cells:
        rows.add_row(*row)
    console.print(rows)
    if isinstance(found, Diagnosis):
        for line in str(found).splitlines():
            console.print(line, soft_wrap=True, markup=False)


def figure(found: Diagnosis | Sequence[Drift]) -> Any:
    """The drift of each layer as a matplotlib figure: of the mean on the left, of the variance on the right.

    For each layer a line from the median of the channels to the worst, with a mark at the root mean square; in grey
    three standard errors of the estimate, below which nothing is known; in orange the noise of a batch, if there is a
    diagnosis: what lies to its left has been harmless in training.

    Examples:
        >>> import flaxbn, numpy as np
        >>> from flaxbn import diagnostics
        >>> stored = {"norm": {"mean": np.zeros(2), "var": np.ones(2)}}
        >>> moments = {"norm": flaxbn.Moments(count=np.full(2, 100.0), mean=np.full(2, 0.5), var=np.ones(2))}
        >>> figure = diagnostics.figure(diagnostics.compare(stored, moments))  # figure.savefig("drift.png")
        >>> figure.axes[0].get_xlabel()
        'drift of the mean, standard deviations'

    Raises:
        ModuleNotFoundError: if the package `matplotlib` is not installed.
    """
    figures = _imported("matplotlib.figure")
    records, noise = _parts_of(found)
    drawn = figures.Figure(figsize=(9, 1.5 + 0.28 * max(len(records), 3)), layout="constrained")
    panels = drawn.subplots(1, 2, sharey=True)
    for panel, (channels, rms, error, batch, label) in zip(panels, _SIDES):
        places = range(len(records))
        ends = [(getattr(record, channels).median, getattr(record, channels).worst) for record in records]
        lows, highs = zip(*(np.maximum(pair, _LEAST) for pair in ends)) if ends else ((), ())
        panel.barh(
            places,
            [SIGNIFICANT * getattr(r, error) for r in records],
            color="0.85",
            zorder=0,
            label="3 standard errors",
        )
        panel.hlines(places, lows, highs, color=DRIFT, label="stored statistics: median to worst channel")
        marks = [max(getattr(record, rms), _LEAST) for record in records]
        panel.plot(marks, places, "o", color=DRIFT, markersize=5, label="root mean square")
        batches = [getattr(noise[r.layer], batch) if r.layer in noise else np.nan for r in records]
        if noise:
            panel.plot(batches, places, "|", color=BATCH, markersize=12, markeredgewidth=2, label="noise of a batch")
        panel.set(xscale="log", xlabel=label)
        low, high = panel.get_xlim()
        wider = max(1.0, (100 * low / high) ** 0.5)  # two decades at least, so that there are ticks to read
        panel.set_xlim(low / wider, high * wider)
        panel.xaxis.set_minor_formatter("")
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(records)), [record.layer for record in records])
    panels[0].invert_yaxis()
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return drawn


def _parts_of(found: Diagnosis | Sequence[Drift]) -> tuple[Sequence[Drift], Mapping[str, BatchNoise]]:
    """The records of drift, and the noise of each layer, which only a diagnosis knows."""
    if not isinstance(found, Diagnosis):
        return found, {}
    return found.drift, noise_by_layer(found)


def _imported(name: str) -> Any:
    """A module of an optional package; where that is missing, the error says how to install it."""
    try:
        return __import__(name, fromlist=["_"])
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise ModuleNotFoundError(
            f"Reports need the package {package}, which is not installed: pip install {package}."
        ) from error
