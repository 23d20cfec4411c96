"""What the training scripts share: one step, the loop over epochs, evaluation, checkpoints."""

import functools
import itertools
import pathlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import data
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import options
import orbax.checkpoint as ocp
import processes
from augmentation import augment
from divergence import DivergenceError, all_finite
from journal import Journal
from nnx_network import parts_of

import flaxbn

CHECKED = 100
"""Steps after which the loss is looked at: to look waits for the device."""


class Batch(NamedTuple):
    """The examples of a step, as indices into the training set."""

    index: jax.Array
    domain: jax.Array | None = None
    """The domains of the examples, one number if it is one; None where the network knows none."""
    augmentation: np.uint32 | None = None
    """The seed of its augmentation; None for none."""


class State(NamedTuple):
    """What changes from one step to the next."""

    params: Any
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What the network is applied with."""
        return {"params": self.params, "batch_stats": self.batch_stats}


@functools.partial(jax.jit, static_argnames=("model", "optimizer"))
def initial_state(
    key: jax.Array,
    images: jax.Array,
    domain: int | None = None,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
) -> State:
    """A network that was never trained."""
    variables = model.init(key, images, domain)
    return State(variables["params"], variables.get("batch_stats", {}), optimizer.init(variables["params"]))


@functools.partial(jax.jit, static_argnames=("model", "optimizer", "update"))
def train_step(
    state: State,
    split: data.Split,
    index: jax.Array,
    domain: jax.Array | None = None,
    augmentation: jax.Array | None = None,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    update: bool | None,
) -> tuple[State, jax.Array, jax.Array]:
    """One step of Adam on the examples of a `Batch`, how many of them were right, and their mean loss."""
    images, labels = split.images[index], split.labels[index]
    if augmentation is not None:
        images = augment(jax.random.key(augmentation), images)

    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updated = model.apply(variables, images, domain, train=True, update=update, mutable=["batch_stats"])
        correct = jnp.sum(logits.argmax(-1) == labels)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), (updated.get("batch_stats", {}), correct)

    (mean_loss, (batch_stats, correct)), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    return State(optax.apply_updates(state.params, updates), batch_stats, opt_state), correct, mean_loss


class Repetition(NamedTuple):
    """One training of a run that compares several: what it is called, and where it is kept."""

    kind: str
    """What the run compares, modes or variants, in the singular: the field of `name` in the metrics."""
    name: str
    seed: int
    out: pathlib.Path
    """The folder of the run."""
    width: int
    """Characters of the longest name that the run can have."""

    @property
    def record(self) -> dict[str, Any]:
        """What tells its metrics from those of the others."""
        return {self.kind: self.name, "seed": self.seed}

    @property
    def folder(self) -> pathlib.Path:
        """Where its checkpoints are kept."""
        return (self.out / "checkpoints" / self.name / f"seed{self.seed}").absolute()


def repetitions(config: options.Training, kind: str, names: Sequence[str], known: Iterable[str]) -> list[Repetition]:
    """Every training of some modes or variants, which are among the known ones."""
    width = max(map(len, known))
    runs = itertools.product(names, range(config.seeds))
    return [Repetition(kind, name, seed, config.out, width) for name, seed in runs]


def fit(
    state: State,
    split: data.Split,
    run: Repetition,
    journal: Journal,
    *,
    epochs: int,
    num_steps: int,
    batches: Callable[[int], Iterable[Batch]],
    step: Callable[..., tuple[State, jax.Array, jax.Array]],
    validate: Callable[[dict[str, Any]], float | dict[str, float]],
) -> State:
    """Trains to the last epoch, from the last checkpoint if there is one, and returns the state at the end.

    After each epoch its metrics go to the journal, and the state to a checkpoint.

    Args:
        state: that of a network which was never trained, on all devices.
        split: the training set, on all devices.
        run: what it is called, and where it is kept.
        journal: keeps the metrics of all trainings of the run.
        epochs: how many there are in all.
        num_steps: the steps of an epoch.
        batches: for the number of an epoch, from 1, its batches.
        step: `train_step` for the network.
        validate: takes the variables and gives the accuracy, or that of each domain.

    Raises:
        DivergenceError: as soon as it is seen that the loss or the weights are not finite; that epoch is not kept.
    """
    with checkpoint_manager(run.folder / "state") as checkpoints:
        state, done = restore(checkpoints, state)
        journal.forget(done, run.record)
        journal.advance(done * num_steps)
        for epoch in range(done + 1, epochs + 1):
            start, label = time.perf_counter(), f"{run.name}, seed {run.seed}, epoch {epoch}/{epochs}"
            state, train_accuracy = _train_epoch(state, split, journal, label, batches=batches(epoch), step=step)
            if train_accuracy is None:
                raise DivergenceError(run.name, run.seed, epoch)
            line = {
                **run.record,
                "epoch": epoch,
                "train_accuracy": train_accuracy,
                "validation_accuracy": validate(state.variables),
                "seconds": time.perf_counter() - start,
            }
            journal.add(line)
            checkpoints.save(epoch, args=ocp.args.StandardSave(state))
            journal.console.print(_told(run, line))
    return state


def _train_epoch(
    state: State, split: data.Split, journal: Journal, label: str, *, batches, step
) -> tuple[State, float | None]:
    """The state after an epoch, and the share of its examples that were right when their turn came.

    None if the training diverged: that stays so, so every hundredth loss tells, and the state in the end.
    """
    correct, size = [], 0
    for batch in batches:
        state, right, loss = step(state, split, *batch)
        correct.append(right)
        size += len(batch.index)
        journal.describe(label)  # not before: the first step is compiled
        journal.advance()
        if len(correct) % CHECKED == 0 and not np.isfinite(loss):
            return state, None
    if not all_finite((loss, state.variables)):
        return state, None
    return state, int(np.sum(jax.device_get(correct))) / size


def _told(run: Repetition, line: dict[str, Any]) -> str:
    """The metrics of an epoch as the terminal shows them."""
    validation = line["validation_accuracy"]
    by_domain = validation.values() if isinstance(validation, dict) else [validation]
    return (
        f"{run.name:{run.width}} seed {run.seed} epoch {line['epoch']:3} "
        f"train {line['train_accuracy']:.4f} validation {' '.join(f'{accuracy:.4f}' for accuracy in by_domain)} "
        f"{line['seconds']:6.1f} s"
    )


def evaluate(model: nn.Module, batch: dict[str, jax.Array | None]) -> jax.Array:
    """The logits of a batch that may name domains."""
    return model(batch["images"], batch.get("domain"))


@functools.partial(jax.jit, static_argnames=("model", "statistics"))
def count_correct(
    variables, split: data.Split, index, counted, domain, *, model: nn.Module, statistics: str
) -> jax.Array:
    """How many examples of a batch are right; those that are not `counted` only fill it up."""
    batch = {"images": split.images[index], "domain": domain}
    logits = flaxbn.apply(*parts_of(model, variables), batch, statistics=statistics, call=evaluate)
    return jnp.sum((logits.argmax(-1) == split.labels[index]) & counted)


def accuracy(
    variables, split: data.Split, batches, domain=None, *, model: nn.Module, statistics: str = "running"
) -> float:
    """The accuracy on a split, in its `evaluation_batches`."""
    correct = [count_correct(variables, split, *batch, domain, model=model, statistics=statistics) for batch in batches]
    return int(np.sum(jax.device_get(correct))) / len(split.labels)


def evaluation_batches(size: int, batch_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Indices and whether they count: full batches, the last filled up with examples that do not count again."""
    steps = -(-size // batch_size)
    index = np.arange(steps * batch_size).reshape(steps, batch_size)
    return list(zip(index % size, index < size))


def to_evaluate(split: data.Split, batch_size: int) -> tuple[data.Split, list[tuple[jax.Array, jax.Array]]]:
    """A split on every device, and its `evaluation_batches`, each divided among them."""
    batches = evaluation_batches(len(split.labels), batch_size)
    return processes.place(split, processes.everywhere()), processes.place(batches, processes.by_example())


def training_batches(size: int, batch_size: int, *, seed: int, epoch: int, domain: int = 0) -> np.ndarray:
    """The order of an epoch, [steps, batch_size], decided by the numbers. What fills no batch is left out."""
    order = np.random.default_rng((seed, epoch, domain)).permutation(size)
    return order[: size // batch_size * batch_size].reshape(-1, batch_size)


def augmentation_seeds(steps: int, *, seed: int, epoch: int) -> np.ndarray:
    """The seeds of the augmentation of an epoch's batches, decided by the numbers."""
    return np.random.SeedSequence((seed, epoch)).generate_state(steps)


def checkpoint_manager(folder: pathlib.Path) -> ocp.CheckpointManager:
    """Keeps the last complete epoch in `folder`."""
    options = ocp.CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(folder, options=options)


def restore(checkpoints: ocp.CheckpointManager, state: State) -> tuple[State, int]:
    """The last checkpoint and its epoch; `state` and 0 where there is none."""
    done = checkpoints.latest_step() or 0
    return (checkpoints.restore(done, args=ocp.args.StandardRestore(state)) if done else state), done


def save_model(folder: pathlib.Path, variables: dict[str, Any]) -> None:
    """Saves what was tested, unless a run that is resumed did so already."""
    if not folder.exists():
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder, variables)


def load_variables(folder: pathlib.Path) -> dict[str, Any]:
    """What `save_model` saved, as numpy arrays, on whatever devices it was; each process reads by itself."""
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}, barrier_sync_key_prefix="alone"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        saved = checkpointer.metadata(folder.absolute()).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        return checkpointer.restore(folder.absolute(), args=ocp.args.PyTreeRestore(restore_args=as_numpy))
