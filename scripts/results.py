"""What a run leaves in its folder: configuration, metrics by epoch, a summary, a figure; none of them half written."""

import json
import pathlib
import platform
import shutil
from typing import Any

import figures
import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from flaxbn.inference.artifact import replace_file
from flaxbn.inference.export import installed_version

PACKAGES = ("flaxbn", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
TRAINING, VALIDATION, TEST = "0.6", "#1f5fa8", "#c8501e"


def begin(out: pathlib.Path, configuration: dict[str, Any], *, resume: bool, overwrite: bool) -> list[dict[str, Any]]:
    """Makes the folder of a run ready, and returns the metrics that are there already.

    Raises:
        FileExistsError: if it holds a run and neither `resume` nor `overwrite` is asked for, or anything else.
        ValueError: if the run to be resumed has another configuration.
    """
    record = out / "config.json"
    if record.exists() and resume:
        _check_same(json.loads(record.read_text()), configuration, out)
        return read_lines(out / "metrics.jsonl")
    if record.exists() and not overwrite:
        raise FileExistsError(
            f"--out must be a new folder: {out} holds a run. Continue it with --resume, replace it with --overwrite, "
            "or name another --out."
        )
    out.mkdir(parents=True, exist_ok=True)
    if not record.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise FileExistsError(f"--out must be a new folder or hold a run: {out} holds something else. Name another.")
    _clear(out)
    write_json(record, configuration)
    return []


def _check_same(old: dict[str, Any], new: dict[str, Any], out: pathlib.Path) -> None:
    names = [name for name in old | new if old.get(name) != new.get(name)]
    if names:
        differing = "; ".join(f"{flag(name)} was {old.get(name)}, is {new.get(name)}" for name in names)
        raise ValueError(
            f"--resume continues a run with the configuration it began with: in {out}, {differing}. Give the same "
            "options, or name another --out, or --overwrite."
        )


def _clear(out: pathlib.Path) -> None:
    """Removes a run, checkpoints first and at one stroke, so that half of them are never taken for a run."""
    stale, checkpoints = out / ".stale", out / "checkpoints"
    shutil.rmtree(stale, ignore_errors=True)
    if checkpoints.exists():
        checkpoints.rename(stale)
        shutil.rmtree(stale)
    for name in ("metrics.jsonl", "summary.json", "accuracy.png", "results.json", "table.md", "batch_sizes.png"):
        (out / name).unlink(missing_ok=True)


def until(lines: list[dict[str, Any]], epoch: int, **run: Any) -> list[dict[str, Any]]:
    """`lines` without those of `run` after `epoch`, which has no checkpoint."""
    return [line for line in lines if not run.items() <= line.items() or line["epoch"] <= epoch]


def flag(name: str) -> str:
    """The option of the command line that sets this field."""
    return "--" + name.replace("_", "-")


def epoch_to_epoch_spread(accuracy: list[float]) -> float | None:
    """The root mean square of the change from one epoch to the next; None for a single epoch, which has no change."""
    return float(np.sqrt(np.mean(np.diff(accuracy) ** 2))) if len(accuracy) > 1 else None


def summarize(lines: list[dict[str, Any]], tests: list[dict[str, Any]]) -> dict[str, Any]:
    """The outcome of each mode: means over the seeds, and their standard deviations under `seed_spread`.

    Args:
        lines: one for each mode, seed and epoch, in this order, with `mode`, `train_accuracy`, `validation_accuracy`
            and `seconds`.
        tests: one for each mode and seed, in the same order, with `mode`, `test_accuracy`, `batch_independence`,
            `exported` and `seconds`.

    Returns:
        For each mode `test_accuracy`; the lists `validation_accuracy` and `train_accuracy`, by epoch;
        `epoch_to_epoch_spread` of validation; `seconds` of one seed (training, validation, estimation and test,
        compilation included); `batch_independence`, a list by seed; `exported`, whether all seeds were.
    """
    modes = dict.fromkeys(test["mode"] for test in tests)
    return {
        mode: _summarize_mode(*([x for x in part if x["mode"] == mode] for part in (lines, tests))) for mode in modes
    }


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
    }


def versions() -> dict[str, str | int]:
    """The versions of Python and of the packages that decide the numbers, and the devices."""
    found = {name: installed_version(name) for name in PACKAGES}
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return {"python": platform.python_version(), **found, "devices": devices, "processes": jax.process_count()}


def table(summary: dict[str, Any]) -> Table:
    """One row for each mode."""
    rows = Table(title="accuracy")
    rows.add_column("mode")
    for column in ("test", "last\nvalidation", "worst\nvalidation", "epoch-to-epoch\nspread", "seconds"):
        rows.add_column(column, justify="right")
    for mode, outcome in summary.items():
        validation, spread = outcome["validation_accuracy"], outcome["epoch_to_epoch_spread"]
        accuracies = (outcome["test_accuracy"], validation[-1], min(validation), spread)
        rows.add_row(mode, *("-" if a is None else f"{a:.4f}" for a in accuracies), f"{outcome['seconds']:.1f}")
    return rows


def write_figure(path: pathlib.Path, summary: dict[str, Any], title: str) -> None:
    """Training and validation accuracy by epoch and test accuracy at the end, a panel for each mode."""
    epochs = len(next(iter(summary.values()))["validation_accuracy"])
    fig = Figure(figsize=(0.6 + 2.6 * len(summary), 2.9), layout="constrained")
    axes = fig.subplots(1, len(summary), sharey=True, squeeze=False)
    for ax, (mode, outcome) in zip(axes[0], summary.items()):
        _draw_curve(ax, outcome, "train_accuracy", label="training", color=TRAINING)
        _draw_curve(ax, outcome, "validation_accuracy", label="validation", color=VALIDATION)
        ax.plot(epochs, outcome["test_accuracy"], "D", label="test", color=TEST, clip_on=False, zorder=3)
        ax.set(
            title=f"{mode}\ntest {outcome['test_accuracy']:.3f}",
            xlabel="epoch",
            xlim=(0.5, epochs + 0.5),
            ylim=(0, 1.03),
        )
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        figures.leave_open(ax)
    axes[0, 0].set_ylabel("accuracy")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    fig.suptitle(title, fontsize="medium")
    figures.save(fig, path)


def _draw_curve(ax: Axes, outcome: dict[str, Any], key: str, *, label: str, color: str) -> None:
    mean, spread = outcome[key], outcome["seed_spread"][key]
    figures.draw_band(ax, range(1, len(mean) + 1), mean, spread, label=label, color=color, size=3)


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes indented JSON."""
    replace_file(path, (json.dumps(content, indent=2) + "\n").encode())


def write_lines(path: pathlib.Path, lines: list[dict[str, Any]]) -> None:
    """Writes one JSON object a line."""
    replace_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads what `write_lines` wrote; nothing where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
