"""Trains a small CNN in four ways that differ in batch normalization only, and compares what they predict.

| mode        | training                                  | validation         | test                      |
|-------------|-------------------------------------------|--------------------|---------------------------|
| none        | no normalization                          | same               | same                      |
| running     | batch statistics, running average updated | running average    | running average           |
| unestimated | batch statistics, nothing updated         | batch statistics   | what was stored initially |
| population  | batch statistics, nothing updated         | batch statistics   | population statistics     |

`unestimated` and `population` are trained alike, to the bit: only before the test does `population` estimate its
statistics, with the weights frozen. At the test every prediction is independent of the other examples of its batch.

    python scripts/train_mnist.py
    python scripts/train_mnist.py --dataset mnist --data-dir DIR --epochs 5
    python scripts/train_mnist.py --dataset mnist --data-dir DIR --preset article
"""

import dataclasses
import functools
import itertools
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import data
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import results
import tyro
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import Progress

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
class Config:
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
    epochs: int = 20
    """Passes over the training set."""
    batch_size: int = 64
    """Examples in a step, over all devices; rounded up to a multiple of their number."""
    learning_rate: float = 3e-3
    """Of Adam."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How the learning rate goes on: down to zero, or as it began."""
    seeds: int = 1
    """Repetitions with other initial weights and another order, 0 to N - 1; means and spreads are reported."""
    estimate_samples: int | None = None
    """Training examples from which population statistics are estimated; all by default."""
    out: pathlib.Path = pathlib.Path("runs/digits")
    """The folder of the results."""
    resume: bool = False
    """Continue the run in --out from its last complete epoch; begin one where there is none."""
    overwrite: bool = False
    """Replace the run in --out."""

    def __post_init__(self) -> None:
        """Refuses what could only fail later."""
        for name, least in (("epochs", 1), ("batch_size", 2), ("seeds", 1), ("estimate_samples", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{results.flag(name)} must be at least {least}: got {value}.")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"--learning-rate must be positive and finite: got {self.learning_rate}.")
        if not self.modes or len(set(self.modes)) < len(self.modes):
            raise ValueError(f"--modes must name at least one mode, each once: got {self.modes}. There are {[*MODES]}.")
        if self.resume and self.overwrite:
            raise ValueError("--resume continues a run and --overwrite replaces it: got both. Leave one out.")

    def record(self) -> dict[str, Any]:
        """What decides the outcome, for JSON."""
        fields = dataclasses.asdict(self) | {
            "data_dir": self.data_dir and str(self.data_dir),
            "modes": list(self.modes),
        }
        return {name: fields[name] for name in fields if name not in ("out", "resume", "overwrite")}


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


class CNN(nn.Module):
    """Three times convolution, norm, ReLU; global average pooling; dense. Takes uint8 images."""

    num_classes: int
    norm: Callable[..., nn.Module] | None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False, update: bool = False) -> jax.Array:
        x = images.astype(jnp.float32) / 255
        for features, stride in ((16, 2), (32, 2), (64, 1)):
            x = nn.Conv(features, (5, 5), (stride, stride), use_bias=self.norm is None)(x)
            if self.norm is not None:
                x = self.norm(use_running_average=not train)(x, update_running_average=update)
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
def initial_state(key: jax.Array, images: jax.Array, *, model: CNN, optimizer: optax.GradientTransformation) -> State:
    variables = model.init(key, images)
    return State(variables["params"], variables.get("batch_stats", {}), optimizer.init(variables["params"]))


@functools.partial(jax.jit, static_argnames=("model", "optimizer", "update"))
def train_step(
    state: State,
    split: data.Split,
    index: jax.Array,
    *,
    model: CNN,
    optimizer: optax.GradientTransformation,
    update: bool,
) -> tuple[State, jax.Array]:
    """One step of Adam on the examples `index`, and how many of them were right."""
    images, labels = split.images[index], split.labels[index]

    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updated = model.apply(variables, images, train=True, update=update, mutable=["batch_stats"])
        correct = jnp.sum(logits.argmax(-1) == labels)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), (updated.get("batch_stats", {}), correct)

    gradients, (batch_stats, correct) = jax.grad(loss, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    return State(optax.apply_updates(state.params, updates), batch_stats, opt_state), correct


@functools.partial(jax.jit, static_argnames=("model", "statistics"))
def count_correct(variables, split: data.Split, index, counted, *, model: CNN, statistics: str) -> jax.Array:
    images = split.images[index]
    logits = flaxbn.apply(model, variables, images, statistics=statistics)
    return jnp.sum((logits.argmax(-1) == split.labels[index]) & counted)


def accuracy(variables, split: data.Split, batches, *, model: CNN, statistics: str) -> float:
    correct = [count_correct(variables, split, *batch, model=model, statistics=statistics) for batch in batches]
    return int(np.sum(jax.device_get(correct))) / len(split.labels)


def evaluation_batches(size: int, batch_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Indices and whether they count: full batches, the last filled up with examples that do not count again."""
    steps = -(-size // batch_size)
    index = np.arange(steps * batch_size).reshape(steps, batch_size)
    return list(zip(index % size, index < size))


def training_batches(size: int, batch_size: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch, [steps, batch_size], a matter of seed and epoch only. What fills no batch is left out."""
    order = np.random.default_rng((seed, epoch)).permutation(size)
    return order[: size // batch_size * batch_size].reshape(-1, batch_size)


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


def use_cores_as_devices() -> None:
    """Makes every CPU core a device, unless the environment says how many devices there are."""
    cores = os.cpu_count() or 1
    # XLA's CPU thread pool has $NPROC threads, by default one for each core. A thread that waits in an all-reduce does
    # nothing else, and a gradient is many independent all-reduces: soon all threads wait, for ever.
    os.environ["NPROC"] = str(16 * cores)
    if jax.config.jax_num_cpu_devices < 0 and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", cores)


def configure() -> Config:
    """The command line over the preset that it names."""
    preset = tyro.cli(Config, description=__doc__).preset
    return tyro.cli(Config, default=PRESETS[preset], description=__doc__)


def main(config: Config, console: Console) -> None:
    console.print(config)
    devices = jax.local_devices()
    batch_size = -(-config.batch_size // len(devices)) * len(devices)
    if batch_size != config.batch_size:
        console.print(f"batch size {config.batch_size} -> {batch_size}, a multiple of the {len(devices)} devices")
        config = dataclasses.replace(config, batch_size=batch_size)
    by_example = flaxbn.data_sharding()
    replicated = NamedSharding(by_example.mesh, PartitionSpec())

    loaded = data.load(config.dataset, config.data_dir)
    size = len(loaded.train.labels)
    for name, limit in (("batch_size", size), ("estimate_samples", size)):
        if (value := getattr(config, name)) is not None and value > limit:
            raise ValueError(
                f"{results.flag(name)} must be at most {size}, the training examples of {config.dataset}: got {value}."
            )
    lines = results.begin(config.out, config.record(), resume=config.resume, overwrite=config.overwrite)
    train, validation, test = jax.device_put(loaded, replicated)
    validation_batches, test_batches = (
        jax.device_put(evaluation_batches(len(split.labels), batch_size), by_example) for split in (validation, test)
    )

    num_steps = size // batch_size
    total_steps = config.epochs * num_steps
    decay = config.schedule == "cosine"
    optimizer = optax.adam(
        optax.cosine_decay_schedule(config.learning_rate, total_steps) if decay else config.learning_rate
    )
    norm = make_norm(config, total_steps)
    tests = []
    with Progress(console=console, disable=not console.is_terminal) as progress:
        runs = list(itertools.product(config.modes, range(config.seeds)))
        task = progress.add_task("", total=len(runs) * total_steps)
        for name, seed in runs:
            mode = MODES[name]
            model = CNN(loaded.num_classes, norm if mode.normalize else None)
            state = initial_state(jax.random.key(seed), train.images[:2], model=model, optimizer=optimizer)
            state = jax.device_put(state, replicated)
            folder = (config.out / "checkpoints" / name / f"seed{seed}").absolute()
            options = ocp.CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=True)
            with ocp.CheckpointManager(folder / "state", options=options) as checkpoints:
                done = checkpoints.latest_step() or 0
                if done:
                    state = checkpoints.restore(done, args=ocp.args.StandardRestore(state))
                lines = [
                    line for line in lines if (line["mode"], line["seed"]) != (name, seed) or line["epoch"] <= done
                ]
                progress.update(task, advance=done * num_steps)

                for epoch in range(done + 1, config.epochs + 1):
                    progress.update(task, description=f"{name}, seed {seed}, epoch {epoch}/{config.epochs}")
                    start, correct = time.perf_counter(), []
                    for batch in training_batches(size, batch_size, seed=seed, epoch=epoch):
                        index = jax.device_put(batch, by_example)
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
                    results.write_lines(config.out / "metrics.jsonl", lines)
                    checkpoints.save(epoch, args=ocp.args.StandardSave(state))
                    console.print(
                        f"{name:11} seed {seed} epoch {epoch:3} train {line['train_accuracy']:.4f} "
                        f"validation {line['validation_accuracy']:.4f} {line['seconds']:6.1f} s"
                    )

            start, variables = time.perf_counter(), state.variables
            if mode.estimate:
                batch_stats = flaxbn.estimate_population_stats(
                    model,
                    variables,
                    train.images,
                    batch_size=batch_size,
                    num_samples=config.estimate_samples,
                    sharding=by_example,
                )
                variables = {**variables, "batch_stats": batch_stats}
            test_accuracy = accuracy(variables, test, test_batches, model=model, statistics="running")
            seconds = time.perf_counter() - start
            independence = batch_independence(variables, test.images[:INDEPENDENCE_EXAMPLES], model=model)
            tests.append(
                {"mode": name, "test_accuracy": test_accuracy, "seconds": seconds, "batch_independence": independence}
            )
            if not (folder / "model").exists():
                with ocp.StandardCheckpointer() as checkpointer:
                    checkpointer.save(folder / "model", variables)

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
    use_cores_as_devices()
    main(configure(), Console())
