"""The comparison of batch sizes as a table and as a figure."""

import pathlib
from typing import Any

import figures
import tables
from domain_results import mean_and_spread
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flaxbn.inference.artifact import replace_file

METHODS = {
    "running": ("running average", "o", "#c8501e"),
    "precise": ('method="precise"', "s", "#1f5fa8"),
    "exact": ('method="exact"', "D", "#2a8f5a"),
}
MEASURES = {
    "variance_ratio": ("variance ratio, last layer", ".3f"),
    "test_loss": ("test loss", ".4f"),
    "loss_change": ("change of test loss", "+z.4f"),
    "test_accuracy": ("test accuracy", ".3f"),
}


def summarize(lines: list[dict[str, Any]], references: list[dict[str, float]]) -> dict[str, Any]:
    """The outcomes by method and batch size: means over the seeds, and their standard deviations under `seed_spread`.

    Args:
        lines: one for each batch size, with `batch_size` and `outcomes`, a list by seed of the outcomes by method.
        references: the outcome of the reference, by seed.
    """
    return mean_and_spread(
        [
            {"reference": reference, **{m: {x["batch_size"]: x["outcomes"][seed][m] for x in lines} for m in METHODS}}
            for seed, reference in enumerate(references)
        ]
    )


def write_table(path: pathlib.Path, summary: dict[str, Any], sizes: list[str]) -> str:
    """One row for each measure and method, one column for each batch size, in Markdown."""
    rows = []
    for measure, (title, form) in MEASURES.items():
        for method, (label, *_) in METHODS.items():
            cells = [tuple(tree[method][size][measure] for tree in (summary, summary["seed_spread"])) for size in sizes]
            rows.append([title, label, *(tables.with_spread(*cell, summary["seeds"], form) for cell in cells)])
    text = tables.markdown(["", "statistics", *sizes], rows, labels=2) + "\n"
    replace_file(path, text.encode())
    return text


def write_figure(path: pathlib.Path, summary: dict[str, Any], sizes: dict[str, int], title: str) -> None:
    """The variance ratio and the change of the test loss against the batch size, a line for each method."""
    fig = Figure(figsize=(9, 3.8), layout="constrained")
    axes = fig.subplots(1, 2)
    panels = {
        "variance_ratio": ("Variance of the last layer", "variance / reference"),
        "loss_change": (
            f"Test loss (reference: {summary['reference']['test_loss']:.3f} nats)",
            "difference from the reference (nats)",
        ),
    }
    for ax, (measure, (panel, label)) in zip(axes, panels.items()):
        for method in METHODS:
            _draw_method(ax, summary, sizes, method, measure)
        ax.set_xscale("log", base=2)
        ax.set_xticks([*sizes.values()], [*sizes])
        ax.minorticks_off()
        ax.set(xlabel="batch size of the estimation (examples)", ylabel=label)
        ax.set_title(panel, fontsize="medium")
        figures.leave_open(ax)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS), frameon=False)
    fig.suptitle(title, fontsize="medium")
    figures.save(fig, path)


def _draw_method(ax: Axes, summary: dict[str, Any], sizes: dict[str, int], method: str, measure: str) -> None:
    label, marker, color = METHODS[method]
    mean, spread = ([tree[method][size][measure] for size in sizes] for tree in (summary, summary["seed_spread"]))
    figures.draw_band(ax, sizes.values(), mean, spread, label=label, color=color, marker=marker)
