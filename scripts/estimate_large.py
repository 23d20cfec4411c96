"""Estimates the population statistics of a trained model on a set that does not fit in memory.

The images of a set of TensorFlow Datasets, prepared as array_record, are read by grain: in parallel, in random order,
cut to a square and resized. The model is one that train_mnist.py saved; replace `load_model` by your own. After each
part of the set the moments of all parts so far are saved, and --resume goes on from there. Under several processes each
reads images of its own.

    python scripts/estimate_large.py --model runs/mnist/checkpoints/population/seed0/model --data-dir DIR
    python scripts/estimate_large.py --model MODEL --dataset imagenet2012 --image-size 224 --part 100000 --workers 8
"""

import dataclasses
import functools
import hashlib
import itertools
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import divergence
import flax.linen as nn
import grain
import jax
import networks
import numpy as np
import options
import orbax.checkpoint as ocp
import processes
import tfds_sets
import training
import tyro
from absl import flags
from journal import Journal, keep_journal
from PIL import Image
from rich.console import Console

import flaxbn


@dataclasses.dataclass(frozen=True)
class Config(options.Distributed):
    """Estimates population statistics on a large set of TensorFlow Datasets."""

    model: pathlib.Path = pathlib.Path("runs/digits/checkpoints/population/seed0/model")
    """The folder of a model that train_mnist.py saved."""
    out: pathlib.Path = pathlib.Path("runs/estimate")
    dataset: str = "mnist"
    """The name of a set of TensorFlow Datasets that is prepared as array_record and has images."""
    data_dir: pathlib.Path | None = None
    """The data directory of TFDS."""
    split: str = "train"
    """The split of the set to read."""
    image_size: int = 28
    """Height and width to which images are brought, in pixels."""
    batch_size: int = 256
    """Images in a batch of one process; rounded up to a multiple of its devices."""
    samples: int | None = None
    """How many images to use, drawn at random; all by default."""
    part: int = 20_000
    """Images after which the moments are saved; rounded up to full batches of all processes."""
    workers: int = 0
    """Processes that read and decode for each process; 0: its own threads."""
    seed: int = 0
    """Decides the order of the images."""

    def __post_init__(self) -> None:
        """Refuses what could only fail later."""
        super().__post_init__()
        for name, least in (("image_size", 1), ("batch_size", 2), ("part", 1), ("workers", 0)):
            self.check_at_least(name, least)
        if self.samples is not None:
            self.check_at_least("samples", 2)


def load_model(folder: pathlib.Path) -> tuple[nn.Module, dict[str, Any]]:
    """A network of train_mnist.py, and its variables as numpy arrays."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"--model must be the folder of a saved model: got {folder}. scripts/train_mnist.py saves one in "
            "OUT/checkpoints/MODE/seedN/model."
        )
    variables = training.load_variables(folder)
    if "batch_stats" not in variables:
        raise ValueError(f"--model must have batch normalization: {folder} has {sorted(variables)}. Use another mode.")
    if not divergence.all_finite(variables):
        raise ValueError(
            f"--model must have weights that are finite: those in {folder} are of a training that diverged."
        )
    return network_of(variables["params"], folder), variables


def network_of(params: dict[str, Any], folder: pathlib.Path) -> nn.Module:
    """The network of train_mnist.py that has these parameters."""
    if {"Conv_0", "Dense_0"} <= params.keys():
        image = jax.ShapeDtypeStruct((1, 8, 8, params["Conv_0"]["kernel"].shape[2]), np.uint8)
        for network in networks.NETWORKS.values():
            model = network(len(params["Dense_0"]["bias"]), flaxbn.BatchNorm)
            made = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
            if jax.tree.map(np.shape, made) == jax.tree.map(np.shape, params):
                return model
    raise ValueError(
        f"--model must be a network of scripts/networks.py, {' or '.join(networks.NETWORKS)}: {folder} has the layers "
        f"{', '.join(sorted(params))}. For layers of other names or sizes replace `load_model` by your own."
    )


def prepared(example: dict[str, Any], *, size: int, channels: int) -> np.ndarray:
    """The middle square of an image, [size, size, channels]."""
    image = example["image"]
    height, width, found = image.shape
    if found not in (1, channels):
        raise ValueError(f"The model takes images of {channels} channels: got one of shape {image.shape}.")
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = image[top : top + side, left : left + side]
    if side != size:
        picture = Image.fromarray(image[..., 0] if found == 1 else image)
        image = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR)).reshape(size, size, found)
    return np.broadcast_to(image, (size, size, channels))


def batches(images: grain.MapDataset, batch_size: int, workers: int) -> Iterator[np.ndarray]:
    """This process's part of the images."""
    own = images[jax.process_index() :: jax.process_count()]
    read = own.batch(batch_size, drop_remainder=False).to_iter_dataset()
    if workers:
        read = read.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(read)


def fingerprint(variables: dict[str, Any]) -> str:
    """Tells weights apart."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        digest.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def moments_like(batch_stats: Any) -> Any:
    """A tree like that of the moments, to restore them into: numpy arrays in float64, as they are merged."""
    return jax.tree.map(
        lambda layer: flaxbn.Moments(*(np.zeros(layer["mean"].shape) for _ in flaxbn.Moments._fields)),
        batch_stats,
        is_leaf=lambda tree: "mean" in tree,
    )


def open_images(config: Config, channels: int) -> grain.MapDataset:
    """The images of the set in random order, as the model takes them."""
    sources = processes.on_each(lambda: tfds_sets.open_tfds(config.dataset, config.data_dir))
    if config.split not in sources:
        raise ValueError(f"--split must be one of {sorted(sources)}: got {config.split}.")
    images = (
        grain.MapDataset.source(sources[config.split])
        .shuffle(seed=config.seed)
        .map(functools.partial(prepared, size=config.image_size, channels=channels))
    )
    size = config.samples or len(images)
    if size > len(images):
        raise ValueError(f"--samples must be at most {len(images)}, the images of {config.dataset}: got {size}.")
    return images[:size]


def estimate(
    config: Config, model: nn.Module, variables: dict[str, Any], images: grain.MapDataset, journal: Journal
) -> Any:
    """The moments of all images, saved and told after each part of them; goes on from the last part saved."""
    batch_size = options.whole_batches(config.batch_size, jax.local_device_count())
    part = options.whole_batches(config.part, batch_size * jax.process_count())
    moments, start = None, time.perf_counter()
    with training.checkpoint_manager((config.out / "checkpoints" / "moments").absolute()) as checkpoints:
        restored, done = training.restore(checkpoints, moments_like(variables["batch_stats"]))
        if done:
            moments = restored
        journal.lines = [line for line in journal.lines if line["images"] <= done]
        before = journal.lines[-1]["seconds"] if journal.lines else 0
        journal.advance(done)
        read = progress_of(batches(images[done:], batch_size, config.workers), journal)
        while done < len(images):
            moments = flaxbn.population_moments(
                model,
                variables,
                itertools.islice(read, part // (batch_size * jax.process_count())),
                sharding=flaxbn.data_sharding(),
                earlier=moments,
            )
            done = min(done + part, len(images))
            checkpoints.save(done, args=ocp.args.StandardSave(moments))
            seconds = before + time.perf_counter() - start
            journal.add({"images": done, "seconds": seconds})
            journal.console.print(f"{done:10} images {seconds:8.1f} s")
    return moments


def main(config: Config, console: Console) -> int:
    """Estimates the statistics of the model, and saves it with them."""
    console.print(config)
    model, variables = processes.on_each(lambda: load_model(config.model))
    images = open_images(config, channels=variables["params"]["Conv_0"]["kernel"].shape[2])
    with processes.alone(config.out):
        lines = processes.begin(config, weights=fingerprint(variables))
        with keep_journal(config.out, lines, console, total=len(images), description="images") as journal:
            moments = estimate(config, model, variables, images, journal)
        variables["batch_stats"] = flaxbn.to_batch_stats(moments, variables["batch_stats"])
        folder = (config.out / "checkpoints" / "model").absolute()
        training.save_model(folder, processes.place(variables, processes.everywhere()))
        if processes.is_first():
            config.report(images=len(images))
            config.tell_where(console, "checkpoints/model", "summary.json")
    return 0


def progress_of(read: Iterator[np.ndarray], journal: Journal) -> Iterator[np.ndarray]:
    """The batches as they are, counted in the journal."""
    for batch in read:
        journal.advance(len(batch) * jax.process_count())
        yield batch


if __name__ == "__main__":
    flags.FLAGS([__file__])  # grain's workers read them
    processes.start(main, tyro.cli(Config, description=__doc__))
