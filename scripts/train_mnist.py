"""Trains a small CNN in four ways that differ in batch normalization only, and compares what they predict.

| mode        | training                                  | validation         | test                      |
|-------------|-------------------------------------------|--------------------|---------------------------|
| none        | no normalization                          | same               | same                      |
| running     | batch statistics, running average updated | running average    | running average           |
| unestimated | batch statistics, nothing updated         | batch statistics   | what was stored initially |
| population  | batch statistics, nothing updated         | batch statistics   | population statistics     |

`unestimated` and `population` are trained alike, to the bit: only before the test does `population` estimate its
statistics, with the weights frozen. At the test every prediction is independent of the other examples of its batch.
Each model is exported for inference, to inference.zip beside its checkpoint, but for `unestimated`, which is refused.

    python scripts/train_mnist.py
    python scripts/train_mnist.py --dataset mnist --data-dir DIR --epochs 5
    python scripts/train_mnist.py --dataset mnist --data-dir DIR --preset article
"""

import dataclasses
import functools
import itertools
import pathlib
import time
from collections.abc import Callable
from typing import Any, Literal

import data
import flax.linen as nn
import jax
import numpy as np
import options
import orbax.checkpoint as ocp
import processes
import results
import training
import tyro
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import Progress
from training import CNN, accuracy, evaluation_batches, train_step, training_batches

import flaxbn

INDEPENDENCE_EXAMPLES = 64
INDEPENDENCE_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Mode:
    """Which statistics normalize: in training always the batch's."""

    normalize: bool
    update: bool
    validation: Literal["running", "batch"]
    estimate: bool


MODES = {
    "none": Mode(normalize=False, update=False, validation="running", estimate=False),
    "running": Mode(normalize=True, update=True, validation="running", estimate=False),
    "unestimated": Mode(normalize=True, update=False, validation="batch", estimate=False),
    "population": Mode(normalize=True, update=False, validation="batch", estimate=True),
}


@dataclasses.dataclass(frozen=True)
class Config(options.Distributed, training.Config):
    """Compares four ways to use batch normalization on a small image classification set."""

    preset: Literal["default", "article"] = "default"
    """article: few steps of a large learning rate, so that the running average lags. Other options win over it."""
    dataset: str = "digits"
    """digits (embedded), tfds:NAME, or the name of the IDX files in --data-dir, mnist say."""
    data_dir: pathlib.Path | None = None
    """The folder of the IDX files, or the data directory of TFDS."""
    norm: Literal["batch", "renorm"] = "batch"
    """renorm: batch renormalization, its ramp scaled to the run. Tied to the running average, it departs from batch
    normalization only where that is updated: in mode running."""
    modes: tuple[Literal["none", "running", "unestimated", "population"], ...] = tuple(MODES)
    """The modes to compare."""
    estimate_samples: int | None = None
    """Training examples from which population statistics are estimated; all by default."""

    def __post_init__(self) -> None:
        """Refuses what could only fail later."""
        super().__post_init__()
        self.check_names("modes", MODES)
        if self.estimate_samples is not None:
            self.check_at_least("estimate_samples", 2)


PRESETS = {
    "default": Config(),
    "article": Config(
        preset="article",
        learning_rate=0.1,
        schedule="constant",
        batch_size=256,
        epochs=5,
        out=pathlib.Path("runs/article"),
    ),
}


def batch_independence(variables, images: jax.Array, *, model: CNN) -> dict[str, Any]:
    """Compares the logits of a batch with those of its examples one at a time, relative to the largest logit."""
    predict = jax.jit(model.apply)
    together = np.asarray(predict(variables, images))
    alone = np.concatenate([predict(variables, image[None]) for image in images])
    difference = np.abs(alone - together).max() / max(np.abs(together).max(), np.finfo(np.float32).tiny)
    return {
        "independent": bool(difference <= INDEPENDENCE_TOLERANCE),
        "max_difference": float(difference) if np.isfinite(difference) else None,
        "tolerance": INDEPENDENCE_TOLERANCE,
        "examples": len(images),
    }


def export(path: pathlib.Path, variables, images: np.ndarray, *, model: CNN, moments: Any) -> str:
    """Writes the model for inference, and says why where that is refused."""
    try:
        flaxbn.export_inference(model, variables, images, path, moments=moments)
    except ValueError as error:
        return str(error)
    return ""


def make_norm(config: Config, num_steps: int) -> Callable[..., nn.Module]:
    """The layer; the ramp of renorm, 40 000 steps in the paper, is scaled to the run."""
    if config.norm == "batch":
        return flaxbn.BatchNorm
    scale = 40_000 / num_steps
    return functools.partial(
        flaxbn.BatchRenorm,
        r_max=lambda step: flaxbn.paper_r_max(step * scale),
        d_max=lambda step: flaxbn.paper_d_max(step * scale),
    )


def configure() -> Config:
    """The command line over the preset that it names."""
    preset = tyro.cli(Config, description=__doc__).preset
    return tyro.cli(Config, default=PRESETS[preset], description=__doc__)


def main(config: Config, console: Console) -> None:
    console.print(config)
    devices = jax.devices()
    batch_size = training.whole_batches(config.batch_size, len(devices))
    if batch_size != config.batch_size:
        console.print(f"batch size {config.batch_size} -> {batch_size}, a multiple of the {len(devices)} devices")
        config = dataclasses.replace(config, batch_size=batch_size)
    by_example = processes.by_example()
    replicated = NamedSharding(by_example.mesh, PartitionSpec())

    loaded = processes.on_each(lambda: data.load(config.dataset, config.data_dir))
    size = len(loaded.train.labels)
    for name, limit in (("batch_size", size), ("estimate_samples", size)):
        if (value := getattr(config, name)) is not None and value > limit:
            raise ValueError(
                f"{results.flag(name)} must be at most {size}, the training examples of {config.dataset}: got {value}."
            )
    lines = processes.begin(config)
    train, validation, test = processes.place(loaded, replicated)
    validation_batches, test_batches = (
        processes.place(evaluation_batches(len(split.labels), batch_size), by_example) for split in (validation, test)
    )

    num_steps = size // batch_size
    total_steps = config.epochs * num_steps
    optimizer = config.optimizer(total_steps)
    norm = make_norm(config, total_steps)
    tests = []
    with Progress(console=console, disable=not console.is_terminal) as progress:
        runs = list(itertools.product(config.modes, range(config.seeds)))
        task = progress.add_task("", total=len(runs) * total_steps)
        for name, seed in runs:
            mode = MODES[name]
            model = CNN(loaded.num_classes, norm if mode.normalize else None)
            state = training.initial_state(jax.random.key(seed), train.images[:2], model=model, optimizer=optimizer)
            state = jax.device_put(state, replicated)
            folder = (config.out / "checkpoints" / name / f"seed{seed}").absolute()
            with training.checkpoint_manager(folder / "state") as checkpoints:
                state, done = training.restore(checkpoints, state)
                lines = results.until(lines, done, mode=name, seed=seed)
                progress.update(task, advance=done * num_steps)

                for epoch in range(done + 1, config.epochs + 1):
                    progress.update(task, description=f"{name}, seed {seed}, epoch {epoch}/{config.epochs}")
                    start, correct = time.perf_counter(), []
                    for batch in training_batches(size, batch_size, seed=seed, epoch=epoch):
                        index = processes.place(batch, by_example)
                        state, right = train_step(
                            state, train, index, model=model, optimizer=optimizer, update=mode.update
                        )
                        correct.append(right)
                        progress.advance(task)
                    line = {
                        "mode": name,
                        "seed": seed,
                        "epoch": epoch,
                        "train_accuracy": int(np.sum(jax.device_get(correct))) / (num_steps * batch_size),
                        "validation_accuracy": accuracy(
                            state.variables, validation, validation_batches, model=model, statistics=mode.validation
                        ),
                        "seconds": time.perf_counter() - start,
                    }
                    lines.append(line)
                    if processes.is_first():
                        results.write_lines(config.out / "metrics.jsonl", lines)
                    checkpoints.save(epoch, args=ocp.args.StandardSave(state))
                    console.print(
                        f"{name:11} seed {seed} epoch {epoch:3} train {line['train_accuracy']:.4f} "
                        f"validation {line['validation_accuracy']:.4f} {line['seconds']:6.1f} s"
                    )

            start, variables, moments = time.perf_counter(), state.variables, None
            if mode.estimate:
                moments = flaxbn.population_moments(
                    model,
                    jax.device_get(variables),
                    loaded.train.images[processes.own_rows(size, config.estimate_samples)],
                    batch_size=batch_size // jax.process_count(),
                    sharding=flaxbn.data_sharding(),
                )
                batch_stats = flaxbn.to_batch_stats(moments, jax.device_get(variables["batch_stats"]))
                variables = {**variables, "batch_stats": processes.place(batch_stats, replicated)}
            test_accuracy = accuracy(variables, test, test_batches, model=model, statistics="running")
            seconds = time.perf_counter() - start
            some = loaded.test.images[:INDEPENDENCE_EXAMPLES]
            independence = batch_independence(jax.device_get(variables), some, model=model)
            training.save_model(folder / "model", variables)
            exporting = (folder / "inference.zip", jax.device_get(variables), some)
            refused = processes.on_first(functools.partial(export, *exporting, model=model, moments=moments))
            if refused:
                console.print(f"{name}, seed {seed}: not exported. {refused}", markup=False, soft_wrap=True)
            tests.append(
                {
                    "mode": name,
                    "test_accuracy": test_accuracy,
                    "seconds": seconds,
                    "batch_independence": independence,
                    "exported": not refused,
                }
            )

    if not processes.is_first():
        return
    summary = results.summarize(lines, tests)
    top = {"configuration": config.record(), "versions": results.versions(), "modes": summary}
    results.write_json(config.out / "summary.json", top)
    results.write_figure(
        config.out / "accuracy.png", summary, f"{config.dataset}, learning rate {config.learning_rate:g}"
    )
    console.print(results.table(summary))
    for name, outcome in summary.items():
        for check in outcome["batch_independence"]:
            if not check["independent"]:
                console.print(f"{name}: predictions are not shown to be independent of the rest of the batch: {check}")


if __name__ == "__main__":
    processes.start(main, configure())
