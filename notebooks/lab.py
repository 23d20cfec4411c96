"""What the notebooks share: the scale of a run, the data, one training loop, means over the seeds.

FULL=1 in the environment asks for the real data sets and five seeds, DATA_DIR names the folder that holds them as
folders of IDX files; TRIAL=1 besides takes the first few of them, one seed and little of everything. Without FULL it is
scikit-learn's digits and two seeds, which need no files.
"""

import collections
import functools
import json
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
import networks
import training

FULL = os.environ.get("FULL", "") not in ("", "0")
TRIAL = FULL and os.environ.get("TRIAL", "") not in ("", "0")
SEEDS = range(1) if TRIAL else range(5) if FULL else range(2)
DATA_DIR = pathlib.Path(os.environ.get("DATA_DIR", "data")).absolute()
LAYERS = ((8, 2), (16, 2), (32, 1))
BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#c8501e", "#2a8f5a", "0.55"

# GPUs otherwise round what convolutions multiply to ten bits, and statistics that are exact differ by it.
jax.config.update("jax_default_matmul_precision", "highest")
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
def load(name: str = "mnist") -> data.Dataset:
    """A data set, on the device: `train`, `validation` and `test`, each `images` and `labels`; digits unless FULL=1."""
    loaded = data.load(name, data_folder(name)) if FULL else data.load("digits")
    if TRIAL:
        loaded = data.Dataset(*(data.Split(*(part[:600] for part in split)) for split in loaded))
    return data.Dataset(*(jax.device_put(split) for split in loaded))


@functools.cache
def load_halved(name: str) -> data.Dataset:
    """The same with images of half the height and width, means of 2x2 pixels; digits as they are.

    Training costs a quarter, and a small group has few values per channel in the deeper layers: 4x4 positions in the
    last third of a ResNet-20, where 224x224 pixels have 7x7 in a ResNet-50.
    """
    return data.Dataset(*map(_halved, load(name))) if FULL else load(name)


@jax.jit
def _halved(split: data.Split) -> data.Split:
    n, height, width, channels = split.images.shape
    cells = split.images.astype(jnp.float32).reshape(n, height // 2, 2, width // 2, 2, channels)
    return split._replace(images=jnp.round(cells.mean((2, 4))).astype(jnp.uint8))


def data_folder(name: str) -> pathlib.Path:
    """Where the IDX files of a data set are."""
    folder = DATA_DIR / name
    if not folder.is_dir():
        raise FileNotFoundError(
            f"FULL=1 reads {name} from the folder {name} in DATA_DIR: there is none in {DATA_DIR}. Name the folder "
            "that holds mnist, usps, cifar10 and svhn, each with its four IDX files, and heart with heart.csv: make "
            "notebooks FULL=1 DATA_DIR=DIR. Without FULL=1 the notebooks need no files."
        )
    return folder


class Dense(nn.Module):
    """Dense layers of 64 units with `norm`: a batch has one value of a channel for each example, not for each pixel."""

    norm: Callable[..., nn.Module]
    layers: int

    @nn.compact
    def __call__(
        self, images: jax.Array, domain: None = None, *, train: bool = False, update: bool | None = None
    ) -> jax.Array:
        x = images.reshape(len(images), -1).astype(jnp.float32) / 255
        for _ in range(self.layers):
            x = nn.Dense(64, use_bias=False)(x)
            x = nn.relu(self.norm(use_running_average=not train)(x, update_running_average=update))
        return nn.Dense(10)(x)


def network(norm: Callable[..., nn.Module] | None) -> networks.CNN:
    """Three convolutions with `norm`."""
    return networks.CNN(10, norm, LAYERS)


def resnet(norm: Callable[..., nn.Module] | None) -> networks.ResNet20:
    """A narrow ResNet-20 with `norm`: half as wide as that of CIFAR-10, narrower still unless FULL=1."""
    return networks.ResNet20(10, norm, 8 if FULL else 2)


def epochs(number: int, size: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """The batches of some epochs as indices, in an order that the seed decides."""
    for epoch in range(number):
        yield from training.training_batches(size, batch_size, seed=seed, epoch=epoch)


def train(
    model: nn.Module,
    batches: Iterable[np.ndarray],
    *,
    seed: int,
    optimizer: optax.GradientTransformation,
    split: data.Split | None = None,
    augmented: bool = False,
) -> Iterator[training.State]:
    """Trains on batches of a set, by default that of `load()`, and yields the state after each step.

    The running average is kept. Batch normalization does not read it in training, so that its weights are those of a
    training without one; batch renormalization does. `augmented` images are shifted and mirrored at random.
    """
    split = split or load().train
    network = {"model": model, "optimizer": optimizer}
    state = training.initial_state(jax.random.key(seed), split.images[:2], **network)
    for step, index in enumerate(batches):
        augmentation = np.uint32(1_000_000 * seed + step) if augmented else None
        state, _, _ = training.train_step(state, split, index, None, augmentation, **network, update=True)
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


def keep(notebook: str, **figures: Any) -> None:
    """Writes the figures of a full run to notebooks/results, from where docs/evidence.md has them."""
    if FULL and not TRIAL:
        folder = pathlib.Path(__file__).parent / "results"
        folder.mkdir(exist_ok=True)
        content = {"seeds": len(SEEDS), "device": jax.devices()[0].device_kind, "jax": jax.__version__, **figures}
        text = json.dumps(content, indent=1, default=lambda value: np.asarray(value).tolist())
        (folder / f"{notebook}.json").write_text(text + "\n")


def scale(*names: str) -> Markdown:
    """What this run is: the data sets, by default that of `load()`, the seeds, and the machine."""
    sets = ", ".join(
        f"{name if FULL else 'digits'} ({len(load(name).train.labels)} training images)" for name in names or ("mnist",)
    )
    return Markdown(f"This run: {sets}; {len(SEEDS)} seeds; on {jax.devices()[0].device_kind}.")
