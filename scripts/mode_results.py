"""What the comparison of modes comes to: a summary over the seeds, a table, and one figure."""

import pathlib
from collections.abc import Sequence
from typing import Any

import figures
import numpy as np
import tables
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

STYLES = {
    "none": ("#767676", "s", ":", 4),
    "running": ("#D55E00", "o", "-", 4),
    "unestimated": ("#009E73", "X", "--", 8),
    "population": ("#0072B2", "D", "-", 4),
}
"""Color, marker, line, and size of markers of each mode: colors of Okabe and Ito, which the color-blind tell apart, and
markers that show from behind those of `population`, whose validation is the same."""


def epoch_to_epoch_spread(accuracy: list[float]) -> float | None:
    """The root mean square of the change from one epoch to the next; None for a single epoch, which has no change."""
    return float(np.sqrt(np.mean(np.diff(accuracy) ** 2))) if len(accuracy) > 1 else None


def summarize(
    lines: Sequence[dict[str, Any]], tests: Sequence[dict[str, Any]], diverged: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """The outcome of each mode: means over the seeds, and their standard deviations under `seed_spread`.

    Args:
        lines: one for each mode, seed and epoch, in this order, with `mode`, `seed`, `train_accuracy`,
            `validation_accuracy` and `seconds`.
        tests: one for each mode and seed that was tested, in the same order, with `mode`, `test_accuracy`,
            `batch_independence`, `exported` and `seconds`.
        diverged: one for each mode and seed that diverged, with `mode`, `seed` and `epoch`; they count for no mean.

    Returns:
        For each mode `test_accuracy`; the lists `validation_accuracy` and `train_accuracy`, by epoch;
        `epoch_to_epoch_spread` of validation; `seconds` of one seed (training, validation, estimation and test,
        compilation included); `batch_independence`, a list by seed; `exported`, whether all seeds were; `seeds`, how
        many that is; `diverged`, by seed the epoch. Where all seeds diverged, only the last.
    """
    outcomes = {}
    for mode in dict.fromkeys(x["mode"] for x in (*tests, *diverged)):
        left_out = {x["seed"]: x["epoch"] for x in diverged if x["mode"] == mode}
        tested = [x for x in tests if x["mode"] == mode]
        kept = [x for x in lines if x["mode"] == mode and x["seed"] not in left_out]
        outcomes[mode] = (_summarize_mode(kept, tested) if tested else {}) | {"diverged": left_out}
    return outcomes


def _summarize_mode(lines: list[dict[str, Any]], tests: list[dict[str, Any]]) -> dict[str, Any]:
    def by_seed(key: str) -> np.ndarray:
        return np.array([line[key] for line in lines]).reshape(len(tests), -1)

    test = np.array([test["test_accuracy"] for test in tests])
    validation, train = by_seed("validation_accuracy"), by_seed("train_accuracy")
    spreads = [epoch_to_epoch_spread(list(row)) for row in validation]
    seconds = by_seed("seconds").sum(1) + [test["seconds"] for test in tests]
    return {
        "test_accuracy": float(test.mean()),
        "validation_accuracy": validation.mean(0).tolist(),
        "train_accuracy": train.mean(0).tolist(),
        "epoch_to_epoch_spread": None if None in spreads else float(np.mean(spreads)),
        "seconds": float(seconds.mean()),
        "seed_spread": {
            "test_accuracy": float(test.std()),
            "validation_accuracy": validation.std(0).tolist(),
            "train_accuracy": train.std(0).tolist(),
        },
        "batch_independence": [test["batch_independence"] for test in tests],
        "exported": all(test["exported"] for test in tests),
        "seeds": len(tests),
    }


def finished(summary: dict[str, Any]) -> dict[str, Any]:
    """The modes that at least one seed was tested in."""
    return {mode: outcome for mode, outcome in summary.items() if "test_accuracy" in outcome}


def table(summary: dict[str, Any]) -> Table:
    """One row for each mode."""
    rows = Table(title="accuracy", caption=tables.diverged(summary))
    rows.add_column("mode")
    for column in ("test", "last\nvalidation", "worst\nvalidation", "epoch to\nepoch", "seconds"):
        rows.add_column(column, justify="right", no_wrap=True)
    for mode, outcome in finished(summary).items():
        validation, spread = outcome["validation_accuracy"], outcome["epoch_to_epoch_spread"]
        test = tables.with_spread(outcome["test_accuracy"], outcome["seed_spread"]["test_accuracy"], outcome["seeds"])
        cells = (validation[-1], min(validation), spread)
        rows.add_row(mode, test, *("-" if a is None else f"{a:.4f}" for a in cells), f"{outcome['seconds']:.1f}")
    for mode in [mode for mode in summary if mode not in finished(summary)]:
        rows.add_row(mode, "diverged")
    return rows


def write_figure(path: pathlib.Path, summary: dict[str, Any], title: str) -> None:
    """Validation accuracy by epoch in all modes, with its spread over the seeds, and beside it the test accuracies."""
    shown = finished(summary)
    fig = Figure(figsize=(5.6, 4.4), layout="constrained")
    curves, marks = fig.subplots(1, 2, sharey=True, width_ratios=(3.4, 1))
    for x, (mode, outcome) in enumerate(shown.items()):
        _draw_mode(curves, marks, x, mode, outcome)
    curves.set(title="validation", xlabel="epoch", ylabel="accuracy")
    curves.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    marks.set(title="test", xlim=(-0.6, len(shown) - 0.4), xticks=[])
    for ax in (curves, marks):
        figures.leave_open(ax)
    fig.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    fig.suptitle(f"{title}\n{tables.diverged(summary)}".strip(), fontsize="medium")
    figures.save(fig, path)


def _draw_mode(curves: Axes, marks: Axes, x: int, mode: str, outcome: dict[str, Any]) -> None:
    """The curve of a mode, and its test accuracy at `x`; the legend has the number."""
    color, marker, line, size = STYLES[mode]
    mean, spread, seeds = outcome["validation_accuracy"], outcome["seed_spread"], outcome["seeds"]
    test = outcome["test_accuracy"]
    told = tables.with_spread(test, spread["test_accuracy"], seeds, ".3f")
    epochs = range(1, 1 + len(mean))
    style = {"label": f"{mode}: test {told}", "color": color, "marker": marker, "line": line, "size": size}
    figures.draw_band(curves, epochs, mean, spread["validation_accuracy"], **style)
    bars = spread["test_accuracy"] if seeds > 1 else None
    marks.errorbar(x, test, yerr=bars, fmt=marker, color=color, markersize=9, capsize=4)
