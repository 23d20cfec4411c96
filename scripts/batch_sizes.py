"""Estimates population statistics with batches of several sizes, and compares what comes out.

A network with Flax's own batch normalization is trained, by default a CNN of four layers on scikit-learn's digits. Then
its weights are frozen, and the statistics of the training set are estimated with batches of B examples, the last time
with all of them as one batch:

| method  | statistics                                                                                     |
|---------|------------------------------------------------------------------------------------------------|
| running | Flax's running average, of so many random batches that what it began with has a weight of 1e-3 |
| precise | flaxbn.estimate_population_stats(..., method="precise", batch_size=B)                          |
| exact   | flaxbn.estimate_population_stats(..., method="exact", batch_size=B)                            |

The weights are the same for all B: `running` is what a training with batches of B leaves behind where the weights no
longer change, without the lag of one where they do. The reference is the whole training set as one batch in Flax's
training mode with momentum 0. Compare table 2 of Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm".

A variance that is too small makes the logits larger. That alone lowers the test loss of a network that is not sure
enough of itself, and raises that of one that is too sure: the sign of its change says little.

A training that diverges is told and left out; the exit status is 3 then.

    python scripts/batch_sizes.py
    python scripts/batch_sizes.py --batch-size 4 --seeds 5
    python scripts/batch_sizes.py --dataset cifar10 --data-dir DIR --network resnet20 --examples 2048
"""

import dataclasses
import functools
import itertools
import math
import pathlib
import sys
from typing import Any, NamedTuple

import batch_size_results
import data
import divergence
import flax.linen as nn
import jax
import networks
import numpy as np
import optax
import options
import processes
import training
import tyro
from batch_size_results import METHODS
from journal import Journal, keep_journal
from results import flag
from rich.console import Console

import flaxbn

LAYERS = ((16, 1), (32, 2), (32, 2), (64, 1))
FORGOTTEN = 1e-3


@dataclasses.dataclass(frozen=True)
class Config(options.Training):
    """Compares population statistics estimated with batches of several sizes."""

    batch_size: int = 32
    """Examples in a step of the training."""
    seeds: int = 3
    dataset: str = "digits"
    """digits (embedded), tfds:NAME, or the name of the IDX files in --data-dir: mnist, cifar10, svhn."""
    data_dir: pathlib.Path | None = None
    """The folder of the IDX files, or the data directory of TFDS."""
    network: networks.Name = "cnn"
    """cnn: four convolutions. resnet20: nineteen, in blocks."""
    examples: int | None = None
    """Training examples, the first; all by default. Of them as many are used as make every batch full."""
    out: pathlib.Path = pathlib.Path("runs/batch_sizes")
    resume: bool = False
    """Continue the run in --out after its last complete batch size; begin one where there is none."""
    estimation_sizes: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128)
    """Examples in a batch of the estimation, in ascending order; all of them as one batch come in addition."""
    momentum: float = 0.9
    """Of the running average."""

    def __post_init__(self) -> None:
        """Refuses what could only fail later."""
        super().__post_init__()
        if any(a >= b for a, b in itertools.pairwise((1, *self.estimation_sizes))):
            raise ValueError(f"--estimation-sizes must ascend, from 2: got {self.estimation_sizes}.")
        if self.examples is not None:
            self.check_at_least("examples", 2)
        if not 0 < self.momentum < 1:
            raise ValueError(f"--momentum must be between 0 and 1: got {self.momentum}.")

    def named_sizes(self, examples: int) -> dict[str, int]:
        """The batch sizes of the estimation as tables name them, given how many training examples there are."""
        return {**{str(size): size for size in self.estimation_sizes}, "all": examples}


class Trained(NamedTuple):
    """A network whose weights are frozen from now on."""

    variables: dict[str, Any]
    reference: Any
    """The `batch_stats` of the whole training set as one batch."""


@functools.cache
def make_model(network: networks.Name, num_classes: int, momentum: float) -> nn.Module:
    """The network; the same object for the same arguments, so that it compiles once."""
    norm = functools.partial(nn.BatchNorm, momentum=momentum)
    return networks.CNN(num_classes, norm, LAYERS) if network == "cnn" else networks.ResNet20(num_classes, norm)


class Experiment(NamedTuple):
    """What all networks of a run share."""

    train: data.Split
    """The training examples that are used, on the device."""
    test: data.Split
    """The test set, on the device."""
    model: nn.Module
    """The network with the running average of the options."""
    forgetful: nn.Module
    """The same with momentum 0."""

    @property
    def examples(self) -> int:
        """How many training examples are used."""
        return len(self.train.labels)


def load(config: Config) -> Experiment:
    """The data sets, of the training set as many examples as make every batch full, and the network."""
    loaded = data.load(config.dataset, config.data_dir)
    multiple, there = math.lcm(*config.estimation_sizes), len(loaded.train.labels)
    most = min(config.examples or there, there)
    examples = most // multiple * multiple
    if not examples:
        raise ValueError(
            f"--estimation-sizes must have a common multiple of at most {most}, the training examples, since every "
            f"batch is full: that of {config.estimation_sizes} is {multiple}. Take sizes that divide each other, or "
            "more --examples."
        )
    for name, limit in (("estimation_sizes", examples - 1), ("batch_size", examples), ("examples", there)):
        largest = np.max(value) if (value := getattr(config, name)) is not None else 0
        if largest > limit:
            raise ValueError(
                f"{flag(name)} must be at most {limit}, given the training examples of {config.dataset} of which every "
                f"batch is full: got {value}."
            )
    train, test = jax.device_put((data.Split(*(part[:examples] for part in loaded.train)), loaded.test))
    model, forgetful = (make_model(config.network, loaded.num_classes, m) for m in (config.momentum, 0.0))
    return Experiment(train, test, model, forgetful)


def train(config: Config, optimizer: optax.GradientTransformation, given: Experiment, seed: int) -> Trained:
    """Trains one network, and takes its reference.

    Raises:
        divergence.DivergenceError: if after an epoch the loss or the weights are not finite.
    """
    network = {"model": given.model, "optimizer": optimizer}
    state = training.initial_state(jax.random.key(seed), given.train.images[:2], **network)
    for epoch in range(1, config.epochs + 1):
        for index in training.training_batches(given.examples, config.batch_size, seed=seed, epoch=epoch):
            state, _, loss = training.train_step(state, given.train, index, **network, update=None)
        if not divergence.all_finite((loss, state.variables)):
            raise divergence.DivergenceError("training", seed, epoch)
    return Trained(state.variables, updated(state.variables, given.train.images, model=given.forgetful))


@functools.partial(jax.jit, static_argnames="model")
def updated(variables: dict[str, Any], images: jax.Array, *, model: nn.Module) -> Any:
    """The `batch_stats` after one batch in Flax's training mode, with the weights frozen."""
    return model.apply(variables, images, train=True, mutable=["batch_stats"])[1]["batch_stats"]


def running_average(config: Config, given: Experiment, variables: Any, *, batch_size: int, seed: int) -> Any:
    """The running average of random batches, after as many as make it forget where it began."""
    steps = math.ceil(math.log(FORGOTTEN) / math.log(config.momentum))
    epochs = range(1, 1 + math.ceil(steps / (given.examples // batch_size)))
    order = [
        training.training_batches(given.examples, batch_size, seed=seed, epoch=config.epochs + epoch)
        for epoch in epochs
    ]
    for index in np.concatenate(order)[:steps]:
        batch_stats = updated(variables, given.train.images[index], model=given.model)
        variables = {**variables, "batch_stats": batch_stats}
    return variables["batch_stats"]


def estimates(config: Config, given: Experiment, variables: Any, *, batch_size: int, seed: int) -> Any:
    """The `batch_stats` of each method."""
    estimate = functools.partial(
        flaxbn.estimate_population_stats, given.model, variables, given.train.images, batch_size=batch_size
    )
    return {
        "running": running_average(config, given, variables, batch_size=batch_size, seed=seed),
        "precise": estimate(method="precise"),
        "exact": estimate(method="exact"),
    }


@functools.partial(jax.jit, static_argnames="model")
def score(variables: dict[str, Any], split: data.Split, *, model: nn.Module) -> tuple[jax.Array, jax.Array]:
    """The loss and the accuracy."""
    logits = model.apply(variables, split.images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, split.labels)
    return losses.mean(), (logits.argmax(-1) == split.labels).mean()


def outcome(trained: Trained, batch_stats: Any, given: Experiment) -> dict[str, float]:
    """What the statistics are worth, against those of the reference."""
    (loss, accuracy), (reference_loss, _) = (
        score({**trained.variables, "batch_stats": stats}, given.test, model=given.model)
        for stats in (batch_stats, trained.reference)
    )
    last = max(batch_stats, key=lambda name: int(name.rpartition("_")[2]))
    var, reference_var = (stats[last]["var"] for stats in (batch_stats, trained.reference))
    return {
        "variance_ratio": float((var / reference_var).mean()),
        "test_loss": float(loss),
        "loss_change": float(loss - reference_loss),
        "test_accuracy": float(accuracy),
    }


def configure() -> Config:
    """The command line."""
    return tyro.cli(Config, description=__doc__)


def train_all(config: Config, given: Experiment, journal: Journal) -> dict[int, Trained]:
    """The networks by their seeds, without those that diverged."""
    found = {}
    optimizer = config.optimizer(config.epochs * (given.examples // config.batch_size))
    for seed in range(config.seeds):
        journal.describe(f"training, seed {seed}")
        try:
            found[seed] = train(config, optimizer, given, seed)
        except divergence.DivergenceError as error:
            divergence.note(journal, error, seed=seed)
        journal.advance()
    return found


def experiment(config: Config, given: Experiment, journal: Journal) -> list[Trained]:
    """Trains a network for each seed, then estimates with each batch size that the journal does not have yet."""
    found = train_all(config, given, journal)
    # All seeds for one batch size, then the next, since compiled passes are not kept for ever.
    for name, size in [*config.named_sizes(given.examples).items()][len(journal.lines) :] if found else ():
        outcomes = []
        for seed, trained in found.items():
            journal.describe(f"batch size {name}, seed {seed}")
            statistics = estimates(config, given, trained.variables, batch_size=size, seed=seed)
            outcomes.append({m: outcome(trained, statistics[m], given) for m in METHODS})
            journal.advance()
        journal.add({"batch_size": name, "outcomes": outcomes})
    return [*found.values()]


def report(
    config: Config, journal: Journal, references: list[dict[str, float]], examples: int, console: Console
) -> None:
    """Compares the methods: in the folder of the run, and on the terminal."""
    summary, sizes = batch_size_results.summarize(journal.lines, references), config.named_sizes(examples)
    config.report("results.json", methods=summary, diverged=journal.diverged)
    over = f"mean ± standard deviation of {len(references)} seeds; " if len(references) > 1 else ""
    left_out = "".join(f"; seed {x['seed']} diverged" for x in journal.diverged)
    title = (
        f"{config.dataset}, {config.network}, trained with batches of {config.batch_size}; {over}reference: all "
        f"{examples} training examples as one batch"
        f"{left_out}"
    )
    batch_size_results.write_figure(config.out / "batch_sizes.png", summary, sizes, title)
    console.print(
        batch_size_results.write_table(config.out / "table.md", summary, [*sizes]), soft_wrap=True, highlight=False
    )
    config.tell_where(console, "batch_sizes.png", "table.md", "results.json")


def main(config: Config, console: Console) -> int:
    """Trains, estimates with each batch size, and compares."""
    console.print(config)
    given = load(config)
    with processes.alone(config.out):
        lines = config.begin()
        total, completed = config.seeds * (2 + len(config.estimation_sizes)), config.seeds * len(lines)
        with keep_journal(config.out, lines, console, total=total, completed=completed) as journal:
            trained = experiment(config, given, journal)
        references = [outcome(one, one.reference, given) for one in trained]
        if references:
            report(config, journal, references, given.examples, console)
        else:
            config.report("results.json", methods={}, diverged=journal.diverged)
            config.tell_where(console, "results.json")
    return divergence.DIVERGED if journal.diverged else 0


if __name__ == "__main__":
    sys.exit(main(configure(), Console()))
