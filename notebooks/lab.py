"""What the notebooks share: the scale of a run, the data, one training loop, means over the seeds.

FULL=1 in the environment asks for MNIST (and USPS) and five seeds, DATA_DIR names the folder that holds them as
folders of IDX files; otherwise it is scikit-learn's digits and two seeds.
"""

import collections
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from IPython.display import Markdown

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "scripts"))

import data
import figures
import training

FULL = os.environ.get("FULL", "") not in ("", "0")
DATASET, SEEDS = ("mnist", range(5)) if FULL else ("digits", range(2))
DATA_DIR = pathlib.Path(os.environ.get("DATA_DIR", "data")).absolute()
LAYERS = ((8, 2), (16, 2), (32, 1))
BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#c8501e", "#2a8f5a", "0.55"

plt.rcParams.update(
    {
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": "medium",
        "figure.constrained_layout.use": True,
        "legend.frameon": False,
    }
)


@functools.cache
def load() -> data.Dataset:
    """The data set of this scale, on the device: `train`, `validation` and `test`, each `images` and `labels`."""
    loaded = data.load(DATASET, data_folder(DATASET) if FULL else None)
    return data.Dataset(*(jax.device_put(split) for split in loaded))


def data_folder(name: str) -> pathlib.Path:
    """Where the IDX files of a data set are."""
    folder = DATA_DIR / name
    if not folder.is_dir():
        raise FileNotFoundError(
            f"FULL=1 reads {name} from the folder {name} in DATA_DIR: there is none in {DATA_DIR}. Name the folder "
            "that holds mnist and usps, each with its four IDX files: make notebooks FULL=1 DATA_DIR=DIR. Without "
            "FULL=1 the notebooks need no files."
        )
    return folder


class Dense(nn.Module):
    """Dense layers of 64 units with `norm`: a batch has one value of a channel for each example, not for each pixel."""

    norm: Callable[..., nn.Module]
    layers: int

    @nn.compact
    def __call__(
        self, images: jax.Array, domain: None = None, *, train: bool = False, update: bool = False
    ) -> jax.Array:
        x = images.reshape(len(images), -1).astype(jnp.float32) / 255
        for _ in range(self.layers):
            x = nn.Dense(64, use_bias=False)(x)
            x = nn.relu(self.norm(use_running_average=not train)(x, update_running_average=update))
        return nn.Dense(10)(x)


def network(norm: Callable[..., nn.Module] | None) -> training.CNN:
    """Three convolutions with `norm`."""
    return training.CNN(10, norm, LAYERS)


def epochs(number: int, size: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """The batches of some epochs as indices, in an order that the seed decides."""
    for epoch in range(number):
        yield from training.training_batches(size, batch_size, seed=seed, epoch=epoch)


def train(
    model: nn.Module, batches: Iterable[np.ndarray], *, seed: int, optimizer: optax.GradientTransformation
) -> Iterator[training.State]:
    """Trains on batches of the training set with batch statistics, and yields the state after each step.

    The running average is kept. Batch normalization does not read it in training, so that its weights are those of a
    training without one; batch renormalization does.
    """
    split = load().train
    state = training.initial_state(jax.random.key(seed), split.images[:2], model=model, optimizer=optimizer)
    for index in batches:
        state, _, _ = training.train_step(state, split, index, model=model, optimizer=optimizer, update=True)
        yield state


def last(states: Iterable[training.State]) -> training.State:
    """The state at the end."""
    (state,) = collections.deque(states, maxlen=1)
    return state


def accuracy(model: nn.Module, variables: dict[str, Any], split: data.Split, *, statistics: str = "running") -> float:
    """The accuracy in percent, in batches of at most 500 examples."""
    batches = training.evaluation_batches(len(split.labels), min(500, len(split.labels)))
    return 100 * training.accuracy(variables, split, batches, model=model, statistics=statistics)


def error(model: nn.Module, variables: dict[str, Any], split: data.Split) -> float:
    """The error in percent, with the stored statistics."""
    return 100 - accuracy(model, variables, split)


def over_seeds(values: Any, form: str = ".2f") -> str:
    """Mean and standard deviation over the seeds, the first axis."""
    return f"{np.mean(values):{form}} ± {np.std(values):{form.lstrip('+')}}"


def draw(ax: plt.Axes, x: Any, values: Any, *, color: str, label: str, marker: str = "o") -> None:
    """The mean over the seeds, the first axis of `values`, as a line, in a band of one standard deviation."""
    figures.draw_band(ax, x, np.mean(values, 0), np.std(values, 0), label=label, color=color, marker=marker)


def log_percent(ax: plt.Axes) -> None:
    """A logarithmic axis of percentages, with plain numbers."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ticks = [tick for tick in (0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100) if low <= tick <= high]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()


def say(*claims: str) -> Markdown:
    """Claims, each with what this run measured."""
    return Markdown("\n".join(f"- {claim}" for claim in claims))


def scale() -> Markdown:
    """What this run is."""
    return Markdown(f"This run: {DATASET}, {len(load().train.labels)} training images, {len(SEEDS)} seeds.")
