"""What the training scripts share: options, the network, one step, evaluation, the batches of an epoch, devices."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import data
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import options
import orbax.checkpoint as ocp

import flaxbn


@dataclasses.dataclass(frozen=True)
class Config(options.Run):
    """The options of every training."""

    epochs: int = 20
    """Passes over the training set."""
    batch_size: int = 64
    """Examples in a step, over all devices of all processes; rounded up to a multiple of their number."""
    learning_rate: float = 3e-3
    """Of Adam."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How the learning rate goes on: down to zero, or as it began."""
    seeds: int = 1
    """Repetitions with other initial weights and another order, 0 to N - 1; means and spreads are reported."""

    def __post_init__(self) -> None:
        """Refuses what could only fail later."""
        super().__post_init__()
        for name, least in (("epochs", 1), ("batch_size", 2), ("seeds", 1)):
            self.check_at_least(name, least)
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"--learning-rate must be positive and finite: got {self.learning_rate}.")

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        rate = self.learning_rate
        return optax.adam(optax.cosine_decay_schedule(rate, steps) if self.schedule == "cosine" else rate)


class CNN(nn.Module):
    """Convolution, norm, ReLU for each layer; global average pooling; dense. Takes uint8 images."""

    num_classes: int
    norm: Callable[..., nn.Module] | None
    layers: tuple[tuple[int, int], ...] = ((16, 2), (32, 2), (64, 1))
    """Features and stride of each convolution."""

    @nn.compact
    def __call__(
        self, images: jax.Array, domain: jax.Array | None = None, *, train: bool = False, update: bool = False
    ) -> jax.Array:
        x = images.astype(jnp.float32) / 255
        for features, stride in self.layers:
            x = nn.Conv(features, (5, 5), (stride, stride), use_bias=self.norm is None)(x)
            if self.norm is not None:
                x = self.norm(use_running_average=not train)(x, update_running_average=update, domain=domain)
            x = nn.relu(x)
        return nn.Dense(self.num_classes)(x.mean(axis=(1, 2)))


class State(NamedTuple):
    params: Any
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        return {"params": self.params, "batch_stats": self.batch_stats}


@functools.partial(jax.jit, static_argnames=("model", "optimizer"))
def initial_state(
    key: jax.Array,
    images: jax.Array,
    domain: int | None = None,
    *,
    model: CNN,
    optimizer: optax.GradientTransformation,
) -> State:
    variables = model.init(key, images, domain)
    return State(variables["params"], variables.get("batch_stats", {}), optimizer.init(variables["params"]))


@functools.partial(jax.jit, static_argnames=("model", "optimizer", "update"))
def train_step(
    state: State,
    split: data.Split,
    index: jax.Array,
    domain: jax.Array | None = None,
    *,
    model: CNN,
    optimizer: optax.GradientTransformation,
    update: bool,
) -> tuple[State, jax.Array]:
    """One step of Adam on the examples `index`, and how many of them were right."""
    images, labels = split.images[index], split.labels[index]

    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updated = model.apply(variables, images, domain, train=True, update=update, mutable=["batch_stats"])
        correct = jnp.sum(logits.argmax(-1) == labels)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), (updated.get("batch_stats", {}), correct)

    gradients, (batch_stats, correct) = jax.grad(loss, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    return State(optax.apply_updates(state.params, updates), batch_stats, opt_state), correct


def evaluate(model: CNN, batch: dict[str, jax.Array | None]) -> jax.Array:
    return model(batch["images"], batch.get("domain"))


@functools.partial(jax.jit, static_argnames=("model", "statistics"))
def count_correct(variables, split: data.Split, index, counted, domain, *, model: CNN, statistics: str) -> jax.Array:
    batch = {"images": split.images[index], "domain": domain}
    logits = flaxbn.apply(model, variables, batch, statistics=statistics, call=evaluate)
    return jnp.sum((logits.argmax(-1) == split.labels[index]) & counted)


def accuracy(variables, split: data.Split, batches, domain=None, *, model: CNN, statistics: str = "running") -> float:
    correct = [count_correct(variables, split, *batch, domain, model=model, statistics=statistics) for batch in batches]
    return int(np.sum(jax.device_get(correct))) / len(split.labels)


def evaluation_batches(size: int, batch_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Indices and whether they count: full batches, the last filled up with examples that do not count again."""
    steps = -(-size // batch_size)
    index = np.arange(steps * batch_size).reshape(steps, batch_size)
    return list(zip(index % size, index < size))


def training_batches(size: int, batch_size: int, *, seed: int, epoch: int, domain: int = 0) -> np.ndarray:
    """The order of an epoch, [steps, batch_size], decided by the numbers. What fills no batch is left out."""
    order = np.random.default_rng((seed, epoch, domain)).permutation(size)
    return order[: size // batch_size * batch_size].reshape(-1, batch_size)


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


def whole_batches(batch_size: int, parts: int) -> int:
    """`batch_size`, rounded up to a multiple of `parts`."""
    return -(-batch_size // parts) * parts
