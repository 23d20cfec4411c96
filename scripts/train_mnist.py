"""Trains a network in four ways that differ in batch normalization only, and compares what they predict.

| mode        | training                                  | validation         | test                      |
|-------------|-------------------------------------------|--------------------|---------------------------|
| none        | no normalization                          | same               | same                      |
| running     | batch statistics, running average updated | running average    | running average           |
| unestimated | batch statistics, nothing updated         | batch statistics   | what was stored initially |
| population  | batch statistics, nothing updated         | batch statistics   | population statistics     |

`unestimated` and `population` are trained alike, to the bit: only before the test does `population` estimate its
statistics, with the weights frozen. At the test every prediction is independent of the other examples of its batch.
Each model is exported for inference, to inference.zip beside its checkpoint, but for `unestimated`, which is refused.
A training that diverges is told and marked, and the others go on; the exit status is 3 then.

    python scripts/train_mnist.py
    python scripts/train_mnist.py --preset settled
    python scripts/train_mnist.py --dataset mnist --data-dir DIR --preset article
    python scripts/train_mnist.py --api nnx
    python scripts/train_mnist.py --dataset cifar10 --data-dir DIR --network resnet20 --augment
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import data
import divergence
import flax.linen as nn
import independence
import jax
import mode_results
import networks
import norms
import numpy as np
import optax
import options
import processes
import results
import training
import tyro
from journal import Journal, keep_journal
from nnx_network import NnxNetwork, parts_of
from rich.console import Console
from training import accuracy, train_step, training_batches

import flaxbn

Network = nn.Module | NnxNetwork
RUNS = pathlib.Path("runs")


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
class Config(options.Distributed, options.Training):
    """Compares four ways to use batch normalization on a small image classification set."""

    epochs: int = 8
    learning_rate: float = 0.03
    schedule: Literal["cosine", "constant"] = "constant"
    seeds: int = 3
    preset: Literal["default", "article", "settled"] = "default"
    """article: the running average lags, as by default, but for MNIST. settled: small steps, with which it keeps up."""
    dataset: str = "digits"
    """digits (embedded), tfds:NAME, or the name of the IDX files in --data-dir: mnist, cifar10, svhn."""
    data_dir: pathlib.Path | None = None
    """The folder of the IDX files, or the data directory of TFDS."""
    api: Literal["linen", "nnx"] = "linen"
    """Which of Flax's two APIs the network is written in."""
    network: networks.Name = "cnn"
    """cnn: three convolutions. resnet20: nineteen, in blocks, for CIFAR-10 and other images of that size."""
    augment: bool = False
    """Train on images that are shifted by up to four pixels, and half of them mirrored."""
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
        if (self.api, self.network) == ("nnx", "resnet20"):
            raise ValueError("--api nnx has --network cnn only: got resnet20. Leave one of the two out.")
        if self.estimate_samples is not None:
            self.check_at_least("estimate_samples", 2)


PRESETS = {
    "default": Config(),
    "article": Config(preset="article", learning_rate=0.1, batch_size=256, epochs=5, seeds=1, out=RUNS / "article"),
    "settled": Config(
        preset="settled", learning_rate=3e-3, schedule="cosine", epochs=20, seeds=1, out=RUNS / "settled"
    ),
}


def export(path: pathlib.Path, variables, images: np.ndarray, *, model: Network, moments: Any) -> str:
    """Writes the model for inference, and says why where that is refused."""
    try:
        flaxbn.export_inference(*parts_of(model, variables), images, path, moments=moments)
    except ValueError as error:
        return str(error)
    return ""


def configure() -> Config:
    """The command line over the preset that it names."""
    preset = tyro.cli(Config, description=__doc__).preset
    return tyro.cli(Config, default=PRESETS[preset], description=__doc__)


class Prepared(NamedTuple):
    """What all trainings of a run share."""

    dataset: data.Dataset
    """The data set, as numpy arrays."""
    train: data.Split
    """The training set on every device."""
    validation: tuple[data.Split, Any]
    """The validation set on every device, and its batches."""
    test: tuple[data.Split, Any]
    """The test set on every device, and its batches."""
    num_steps: int
    """The steps of an epoch."""
    optimizer: optax.GradientTransformation
    norm: Callable[..., Any]
    config: Config

    def model(self, mode: Mode) -> Network:
        """The network of a mode."""
        norm = self.norm if mode.normalize else None
        if self.config.api == "nnx":
            return NnxNetwork(self.dataset.num_classes, self.dataset.train.images.shape[-1], norm)
        return networks.NETWORKS[self.config.network](self.dataset.num_classes, norm)


def load(config: Config) -> data.Dataset:
    """The data set, on each process; refuses options that it is too small for."""
    loaded = processes.on_each(lambda: data.load(config.dataset, config.data_dir))
    size = len(loaded.train.labels)
    for name, limit in (("batch_size", size), ("estimate_samples", size)):
        if (value := getattr(config, name)) is not None and value > limit:
            raise ValueError(
                f"{results.flag(name)} must be at most {size}, the training examples of {config.dataset}: got {value}."
            )
    return loaded


def prepare(config: Config, dataset: data.Dataset) -> Prepared:
    """Brings the data to the devices."""
    num_steps = len(dataset.train.labels) // config.batch_size
    return Prepared(
        dataset,
        processes.place(dataset.train, processes.everywhere()),
        training.to_evaluate(dataset.validation, config.batch_size),
        training.to_evaluate(dataset.test, config.batch_size),
        num_steps,
        config.optimizer(config.epochs * num_steps),
        norms.make_norm(config.api, config.norm, config.epochs * num_steps),
        config,
    )


def train(config: Config, prepared: Prepared, run: training.Repetition, journal: Journal) -> training.State:
    """Trains one network in its mode."""
    mode = MODES[run.name]
    network = {"model": prepared.model(mode), "optimizer": prepared.optimizer}
    state = training.initial_state(jax.random.key(run.seed), prepared.train.images[:2], **network)

    def batches(epoch: int) -> Iterator[training.Batch]:
        order = training_batches(len(prepared.train.labels), config.batch_size, seed=run.seed, epoch=epoch)
        seeds = training.augmentation_seeds(len(order), seed=run.seed, epoch=epoch)
        for index, seed in zip(order, seeds):
            augmentation = processes.place(seed, processes.everywhere()) if config.augment else None
            yield training.Batch(processes.place(index, processes.by_example()), augmentation=augmentation)

    def validate(variables: dict[str, Any]) -> float:
        return accuracy(variables, *prepared.validation, model=network["model"], statistics=mode.validation)

    return training.fit(
        jax.device_put(state, processes.everywhere()),
        prepared.train,
        run,
        journal,
        epochs=config.epochs,
        num_steps=prepared.num_steps,
        batches=batches,
        step=functools.partial(train_step, **network, update=mode.update),
        validate=validate,
    )


def estimate(
    config: Config, prepared: Prepared, model: Network, variables: dict[str, Any]
) -> tuple[dict[str, Any], Any]:
    """The variables with population statistics, and the moments that these come from."""
    images = prepared.dataset.train.images
    on_host = jax.device_get(variables)
    moments = flaxbn.population_moments(
        *parts_of(model, on_host),
        images[processes.own_rows(len(images), config.estimate_samples)],
        batch_size=config.batch_size // jax.process_count(),
        sharding=flaxbn.data_sharding(),
    )
    batch_stats = flaxbn.to_batch_stats(moments, on_host["batch_stats"])
    return {**variables, "batch_stats": processes.place(batch_stats, processes.everywhere())}, moments


def test(
    config: Config, prepared: Prepared, run: training.Repetition, variables: dict[str, Any], console: Console
) -> dict[str, Any]:
    """Tests a trained network with the statistics of its mode, saves it, and exports it for inference."""
    start, moments = time.perf_counter(), None
    mode = MODES[run.name]
    model = prepared.model(mode)
    if mode.estimate:
        variables, moments = estimate(config, prepared, model, variables)
    test_accuracy = accuracy(variables, *prepared.test, model=model, statistics="running")
    seconds = time.perf_counter() - start
    some, on_host = prepared.dataset.test.images[: independence.EXAMPLES], jax.device_get(variables)
    check = independence.compare(on_host, some, model=model)
    training.save_model(run.folder / "model", variables)
    exporting = functools.partial(export, run.folder / "inference.zip", on_host, some, model=model, moments=moments)
    refused = processes.on_first(exporting)
    if refused:
        console.print(f"{run.name}, seed {run.seed}: not exported. {refused}", markup=False, soft_wrap=True)
    return {
        "mode": run.name,
        "test_accuracy": test_accuracy,
        "seconds": seconds,
        "batch_independence": check,
        "exported": not refused,
    }


def report(config: Config, journal: Journal, tests: list[dict[str, Any]], console: Console) -> None:
    """Compares the modes: in the folder of the run, and on the terminal."""
    summary = mode_results.summarize(journal.lines, tests, journal.diverged)
    config.report(modes=summary)
    over = f", mean ± standard deviation of {config.seeds} seeds" if config.seeds > 1 else ""
    title = f"{config.dataset}, learning rate {config.learning_rate:g}{over}"
    mode_results.write_figure(config.out / "accuracy.png", summary, title)
    console.print(mode_results.table(summary))
    for name, outcome in mode_results.finished(summary).items():
        for check in outcome["batch_independence"]:
            if not check["independent"]:
                console.print(f"{name}: predictions are not shown to be independent of the rest of the batch: {check}")
    config.tell_where(console, "accuracy.png", "summary.json", "metrics.jsonl", "checkpoints")


def main(config: Config, console: Console) -> int:
    """Trains, tests and compares the modes."""
    console.print(config)
    config = config.with_whole_batches(jax.device_count(), f"the {jax.device_count()} devices", console)
    loaded = load(config)
    with processes.alone(config.out):
        lines = processes.begin(config)
        prepared = prepare(config, loaded)
        runs, tests = training.repetitions(config, "mode", config.modes, MODES), []
        total = len(runs) * config.epochs * prepared.num_steps
        with keep_journal(config.out, lines, console, total=total) as journal:
            for run, state in divergence.trained(runs, lambda run: train(config, prepared, run, journal), journal):
                tests.append(test(config, prepared, run, state.variables, console))
        if processes.is_first():
            report(config, journal, tests, console)
    return divergence.DIVERGED if journal.diverged else 0


if __name__ == "__main__":
    processes.start(main, configure())
