"""The comparison of domains as a summary, as tables and as a figure."""

import functools
import operator
import pathlib
from collections.abc import Sequence
from typing import Any

import figures
import jax
import numpy as np
import tables
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

TESTS = {"running": "running average", "shared": "shared population", "domain": "per-domain population"}
AS_IN_TRAINING = ("o", "#1f5fa8", "normalized as in training")
NOT_AS_IN_TRAINING = ("s", "#c8501e", "not as in training")


def summarize(
    lines: Sequence[dict[str, Any]], tests: Sequence[dict[str, Any]], diverged: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """The outcome of each variant: means over the seeds, and their standard deviations under `seed_spread`.

    Args:
        lines: one for each variant, seed and epoch, in this order, with `variant`, `seed`, `train_accuracy`,
            `validation_accuracy` by domain, and `seconds`.
        tests: one for each variant and seed that was tested, in the same order, with `variant`, `test_accuracy` by
            statistics and domain, `consistent` by statistics, `layers`, the `distances` between the domains, and
            `seconds`.
        diverged: one for each variant and seed that diverged, with `variant`, `seed` and `epoch`; they count for no
            mean.

    Returns:
        For each variant `test_accuracy`, by statistics and domain; the lists `validation_accuracy`, by domain, and
        `train_accuracy`, by epoch; `consistent`, by statistics; `layers`, how far apart the domains are; `seconds` of
        one seed; `seeds`, how many; `diverged`, by seed the epoch. Where all seeds diverged, only the last.
    """
    outcomes = {}
    for variant in dict.fromkeys(x["variant"] for x in (*tests, *diverged)):
        left_out = {x["seed"]: x["epoch"] for x in diverged if x["variant"] == variant}
        tested = [x for x in tests if x["variant"] == variant]
        kept = [x for x in lines if x["variant"] == variant and x.get("seed") not in left_out]
        outcomes[variant] = (_summarize_variant(kept, tested) if tested else {}) | {"diverged": left_out}
    return outcomes


def finished(summary: dict[str, Any]) -> dict[str, Any]:
    """The variants that at least one seed was tested in."""
    return {variant: outcome for variant, outcome in summary.items() if "test_accuracy" in outcome}


def _summarize_variant(lines: list[dict[str, Any]], tests: list[dict[str, Any]]) -> dict[str, Any]:
    epochs = len(lines) // len(tests)
    trained = [{key: line[key] for key in ("validation_accuracy", "train_accuracy")} for line in lines]
    by_epoch = jax.tree.map(lambda *a: list(a), *(mean_and_spread(trained[i::epochs]) for i in range(epochs)))
    tested = mean_and_spread([{key: test[key] for key in ("test_accuracy", "layers")} for test in tests])
    seconds = (sum(line["seconds"] for line in lines) + sum(test["seconds"] for test in tests)) / len(tests)
    return {
        **by_epoch,
        **tested,
        "consistent": tests[0]["consistent"],
        "seconds": seconds,
        "seed_spread": tested["seed_spread"] | by_epoch["seed_spread"],
    }


def mean_and_spread(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of trees of numbers, one for each of the `seeds`, and their standard deviation under `seed_spread`."""
    mean, spread = (jax.tree.map(lambda *a, of=of: float(of(a)), *outcomes) for of in (np.mean, np.std))
    return {**mean, "seed_spread": spread, "seeds": len(outcomes)}


def distances(batch_stats: dict[str, Any], reference: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How far the statistics of each layer are from those of `reference`, averaged over its channels.

    Returns:
        For each layer `mean_shift`, the mean of |mean - mean'| / std', and `var_factor`, the geometric mean of
        var / var' or its inverse, whichever is larger: 0 and 1 where nothing differs.
    """
    return {layer: _distance(batch_stats[layer], reference[layer]) for layer in batch_stats}


def _distance(stats: dict[str, jax.Array], reference: dict[str, jax.Array]) -> dict[str, float]:
    shift = np.abs(stats["mean"] - reference["mean"]) / np.sqrt(reference["var"])
    return {
        "mean_shift": float(shift.mean()),
        "var_factor": float(np.exp(np.abs(np.log(stats["var"] / reference["var"])).mean())),
    }


def table(summary: dict[str, Any], names: Sequence[str]) -> Table:
    """One row for each variant and the statistics it is tested with."""
    rows = Table(title="test accuracy, mean ± standard deviation over seeds", caption=tables.diverged(summary))
    for column in ("variant", "statistics at the test", "as in\ntraining"):
        rows.add_column(column)
    for name in names:
        rows.add_column(name, justify="right")
    for variant, outcome in finished(summary).items():
        for kind in tested_with(outcome):
            rows.add_row(
                variant,
                TESTS[kind],
                "yes" if outcome["consistent"][kind] else "no",
                *(_with_spread(outcome, "test_accuracy", kind, name) for name in names),
                end_section=kind == "domain",
            )
    for variant in [variant for variant in summary if variant not in finished(summary)]:
        rows.add_row(variant, "diverged")
    return rows


def distance_table(summary: dict[str, Any], names: Sequence[str]) -> Table:
    """How far apart the domains are, for each variant."""
    shown = finished(summary)
    rows = _layer_table(f"population statistics of {names[1]} against those of {names[0]}", "variant", shown)
    for variant, outcome in shown.items():
        rows.add_row(variant, *_layer_cells(outcome))
    return rows


def weighting_table(weighting: dict[str, Any], name: str) -> Table:
    """One row for each estimate: how far it is from the balanced one, and the accuracy that goes with it."""
    kinds = {kind: weighting[kind] for kind in ("balanced", "weighted", "unweighted")}
    rows = _layer_table(f"population statistics of {name} from a class-imbalanced sample", "estimate", kinds)
    rows.add_column("test accuracy", justify="right")
    for kind in kinds:
        rows.add_row(kind, *_layer_cells(weighting[kind]), _with_spread(weighting, kind, "test_accuracy"))
    return rows


def tested_with(outcome: dict[str, Any]) -> list[str]:
    """The statistics that a variant was tested with, in the order of tables."""
    return [kind for kind in TESTS if kind in outcome["test_accuracy"]]


def _with_spread(outcome: dict[str, Any], *keys: str) -> str:
    mean, spread = (functools.reduce(operator.getitem, keys, tree) for tree in (outcome, outcome["seed_spread"]))
    return tables.with_spread(mean, spread, outcome["seeds"])


def _layer_table(title: str, first: str, outcomes: dict[str, Any]) -> Table:
    rows = Table(title=title, caption="|Δmean| / std, and the factor between variances, averaged over channels")
    rows.add_column(first)
    for layer in next(iter(outcomes.values()))["layers"]:
        rows.add_column(layer, justify="right")
    return rows


def _layer_cells(outcome: dict[str, Any]) -> list[str]:
    return [f"{layer['mean_shift']:.3f}  x{layer['var_factor']:.3f}" for layer in outcome["layers"].values()]


def write_figure(path: pathlib.Path, summary: dict[str, Any], names: Sequence[str]) -> None:
    """Test accuracy with its spread, a panel for each domain and a row for each test."""
    rows = [(variant, kind) for variant, outcome in finished(summary).items() for kind in tested_with(outcome)]
    fig = Figure(figsize=(9, 1.2 + 0.23 * len(rows)), layout="constrained")
    axes = fig.subplots(1, len(names), sharey=True)
    for ax, name in zip(axes, names):
        for y, (variant, kind) in enumerate(rows):
            _draw_test(ax, y, summary[variant], kind, name)
        ax.set(title=name, xlabel="test accuracy", ylim=(len(rows) - 0.4, -0.6))
        ax.grid(axis="x", alpha=0.3)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
    labels = [TESTS[kind] for _, kind in rows]
    for y, (variant, kind) in enumerate(rows):
        if kind == "running":
            labels[y] = f"{variant}:   {labels[y]}"
            for ax in axes:
                ax.axhline(y - 0.5, color="0.8", linewidth=0.8)
    axes[0].set_yticks(range(len(rows)), labels)
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())}
    fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False)
    if left_out := tables.diverged(summary):
        fig.suptitle(left_out, fontsize="medium")
    figures.save(fig, path)


def _draw_test(ax: Axes, y: int, outcome: dict[str, Any], kind: str, name: str) -> None:
    marker, color, label = AS_IN_TRAINING if outcome["consistent"][kind] else NOT_AS_IN_TRAINING
    mean, spread = (tree["test_accuracy"][kind][name] for tree in (outcome, outcome["seed_spread"]))
    ax.errorbar(mean, y, xerr=spread, fmt=marker, color=color, label=label, capsize=3, markersize=5)
