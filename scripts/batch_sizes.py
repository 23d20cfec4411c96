"""Estimates population statistics with batches of several sizes, and compares what comes out.

A CNN of four batch-norm layers, Flax's own, is trained on scikit-learn's digits. Then its weights are frozen, and the
statistics of the training set are estimated with batches of B examples, the last time with all of them as one batch:

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
import numpy as np
import optax
import options
import processes
import training
import tyro
from batch_size_results import METHODS
from domain_results import mean_and_spread
from journal import Journal, keep_journal
from rich.console import Console

import flaxbn

TRAINING_EXAMPLES = 1152  # of 1249: a multiple of 128, so that every batch is full
LAYERS = ((16, 1), (32, 2), (32, 2), (64, 1))
FORGOTTEN = 1e-3


@dataclasses.dataclass(frozen=True)
class Config(options.Training):
    """Compares population statistics estimated with batches of several sizes, on scikit-learn's digits."""

    batch_size: int = 32
    """Examples in a step of the training."""
    seeds: int = 3
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
        if self.batch_size > TRAINING_EXAMPLES:
            raise ValueError(f"--batch-size must be at most {TRAINING_EXAMPLES}: got {self.batch_size}.")
        sizes = (1, *self.estimation_sizes, TRAINING_EXAMPLES)
        if any(a >= b for a, b in itertools.pairwise(sizes)):
            raise ValueError(
                f"--estimation-sizes must ascend, from 2 to {TRAINING_EXAMPLES - 1} at most: got "
                f"{self.estimation_sizes}."
            )
        if not 0 < self.momentum < 1:
            raise ValueError(f"--momentum must be between 0 and 1: got {self.momentum}.")

    @property
    def named_sizes(self) -> dict[str, int]:
        """The batch sizes of the estimation as tables name them."""
        return {**{str(size): size for size in self.estimation_sizes}, "all": TRAINING_EXAMPLES}


class Trained(NamedTuple):
    """A network whose weights are frozen from now on."""

    variables: dict[str, Any]
    reference: Any
    """The `batch_stats` of the whole training set as one batch."""


class BatchNorm(nn.BatchNorm):
    """Flax's own layer, called as the CNN calls ours."""

    def __call__(self, x: jax.Array, *, update_running_average: bool, domain: None) -> jax.Array:
        return super().__call__(x)


@functools.cache
def make_model(momentum: float) -> training.CNN:
    """The network; the same object for the same momentum, so that it compiles once."""
    return training.CNN(10, functools.partial(BatchNorm, momentum=momentum), LAYERS)


def load() -> tuple[data.Split, data.Split]:
    """The training set and the test set."""
    digits = data.load("digits")
    return jax.device_put((data.Split(*(part[:TRAINING_EXAMPLES] for part in digits.train)), digits.test))


def train(config: Config, optimizer: optax.GradientTransformation, split: data.Split, seed: int) -> Trained:
    """Trains one network, and takes its reference.

    Raises:
        divergence.DivergenceError: if after an epoch the loss or the weights are not finite.
    """
    model = make_model(config.momentum)
    state = training.initial_state(jax.random.key(seed), split.images[:2], model=model, optimizer=optimizer)
    for epoch in range(1, config.epochs + 1):
        for index in training.training_batches(TRAINING_EXAMPLES, config.batch_size, seed=seed, epoch=epoch):
            state, _, loss = training.train_step(state, split, index, model=model, optimizer=optimizer, update=True)
        if not divergence.all_finite((loss, state.variables)):
            raise divergence.DivergenceError("training", seed, epoch)
    return Trained(state.variables, updated(state.variables, split.images, momentum=0.0))


@functools.partial(jax.jit, static_argnames="momentum")
def updated(variables: dict[str, Any], images: jax.Array, *, momentum: float) -> Any:
    """The `batch_stats` after one batch in Flax's training mode, with the weights frozen."""
    return make_model(momentum).apply(variables, images, train=True, mutable=["batch_stats"])[1]["batch_stats"]


def running_average(config: Config, variables: dict[str, Any], images: jax.Array, *, batch_size: int, seed: int) -> Any:
    """The running average of random batches, after as many as make it forget where it began."""
    steps = math.ceil(math.log(FORGOTTEN) / math.log(config.momentum))
    epochs = range(1, 1 + math.ceil(steps / (len(images) // batch_size)))
    order = [
        training.training_batches(len(images), batch_size, seed=seed, epoch=config.epochs + epoch) for epoch in epochs
    ]
    for index in np.concatenate(order)[:steps]:
        variables = {**variables, "batch_stats": updated(variables, images[index], momentum=config.momentum)}
    return variables["batch_stats"]


def estimates(config: Config, variables: dict[str, Any], images: jax.Array, *, batch_size: int, seed: int) -> Any:
    """The `batch_stats` of each method."""
    estimate = functools.partial(
        flaxbn.estimate_population_stats, make_model(config.momentum), variables, images, batch_size=batch_size
    )
    return {
        "running": running_average(config, variables, images, batch_size=batch_size, seed=seed),
        "precise": estimate(method="precise"),
        "exact": estimate(method="exact"),
    }


@jax.jit
def score(variables: dict[str, Any], split: data.Split) -> tuple[jax.Array, jax.Array]:
    """The loss and the accuracy."""
    logits = make_model(0.0).apply(variables, split.images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, split.labels)
    return losses.mean(), (logits.argmax(-1) == split.labels).mean()


def outcome(trained: Trained, batch_stats: Any, test: data.Split) -> dict[str, float]:
    """What the statistics are worth, against those of the reference."""
    (loss, accuracy), (reference_loss, _) = (
        score({**trained.variables, "batch_stats": stats}, test) for stats in (batch_stats, trained.reference)
    )
    var, reference_var = (stats[f"BatchNorm_{len(LAYERS) - 1}"]["var"] for stats in (batch_stats, trained.reference))
    return {
        "variance_ratio": float((var / reference_var).mean()),
        "test_loss": float(loss),
        "loss_change": float(loss - reference_loss),
        "test_accuracy": float(accuracy),
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


def configure() -> Config:
    """The command line."""
    return tyro.cli(Config, description=__doc__)


def train_all(config: Config, split: data.Split, journal: Journal) -> dict[int, Trained]:
    """The networks by their seeds, without those that diverged."""
    networks = {}
    optimizer = config.optimizer(config.epochs * (TRAINING_EXAMPLES // config.batch_size))
    for seed in range(config.seeds):
        journal.describe(f"training, seed {seed}")
        try:
            networks[seed] = train(config, optimizer, split, seed)
        except divergence.DivergenceError as error:
            divergence.note(journal, error, seed=seed)
        journal.advance()
    return networks


def experiment(config: Config, train_split: data.Split, test_split: data.Split, journal: Journal) -> list[Trained]:
    """Trains a network for each seed, then estimates with each batch size that the journal does not have yet."""
    networks = train_all(config, train_split, journal)
    # All seeds for one batch size, then the next, since compiled passes are not kept for ever.
    for name, size in [*config.named_sizes.items()][len(journal.lines) :] if networks else ():
        outcomes = []
        for seed, trained in networks.items():
            journal.describe(f"batch size {name}, seed {seed}")
            found = estimates(config, trained.variables, train_split.images, batch_size=size, seed=seed)
            outcomes.append({m: outcome(trained, found[m], test_split) for m in METHODS})
            journal.advance()
        journal.add({"batch_size": name, "outcomes": outcomes})
    return [*networks.values()]


def report(config: Config, journal: Journal, references: list[dict[str, float]], console: Console) -> None:
    """Compares the methods: in the folder of the run, and on the terminal."""
    summary, sizes = summarize(journal.lines, references), config.named_sizes
    config.report("results.json", methods=summary, diverged=journal.diverged)
    over = f"mean ± standard deviation of {len(references)} seeds; " if len(references) > 1 else ""
    left_out = "".join(f"; seed {x['seed']} diverged" for x in journal.diverged)
    title = (
        f"digits, trained with batches of {config.batch_size}; {over}reference: all training examples as one batch"
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
    train_split, test_split = load()
    with processes.alone(config.out):
        lines = config.begin()
        total, completed = config.seeds * (1 + len(config.named_sizes)), config.seeds * len(lines)
        with keep_journal(config.out, lines, console, total=total, completed=completed) as journal:
            networks = experiment(config, train_split, test_split, journal)
        references = [outcome(trained, trained.reference, test_split) for trained in networks]
        if references:
            report(config, journal, references, console)
        else:
            config.report("results.json", methods={}, diverged=journal.diverged)
            config.tell_where(console, "results.json")
    return divergence.DIVERGED if journal.diverged else 0


if __name__ == "__main__":
    sys.exit(main(configure(), Console()))
