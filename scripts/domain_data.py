"""Data sets of the same classes as domains: read, blended into photographs, brought to one shape, cut into batches."""

import os
import pathlib
from collections.abc import Iterator, Sequence

import data
import jax
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from training import training_batches

BLENDED = "-blended"


def load(names: Sequence[str], data_dir: str | os.PathLike[str] | None = None) -> dict[str, data.Dataset]:
    """Loads the domains, all in the height and width of the first; grey is repeated where another has three channels.

    Args:
        names: `digits`, `tfds:NAME` or the name of a folder of IDX files, each with or without `-blended`.
        data_dir: holds a folder of IDX files for each name, and is the data directory of TFDS.

    Raises:
        ValueError: if the domains differ in their number of classes, or as `data.load` does.
    """
    loaded = {name: _load(name, data_dir) for name in names}
    classes = {name: dataset.num_classes for name, dataset in loaded.items()}
    if len(set(classes.values())) > 1:
        raise ValueError(f"--datasets must have the same classes: got {classes}.")
    shapes = [dataset.train.images.shape[1:] for dataset in loaded.values()]
    shape = (*shapes[0][:2], max(shape[2] for shape in shapes))
    return {name: data.Dataset(*(_reshaped(split, shape) for split in dataset)) for name, dataset in loaded.items()}


def sizes(domains: dict[str, data.Dataset]) -> list[int]:
    """The training examples of each domain."""
    return [len(dataset.train.labels) for dataset in domains.values()]


def domain_batches(
    sizes: Sequence[int], batch_size: int, *, mixed: bool, seed: int, epoch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The batches of an epoch: indices into the domains laid end to end, and their domains, one number if it is one.

    Every domain gives as many examples as the smallest one has.
    """
    part = batch_size // len(sizes) if mixed else batch_size
    steps = min(sizes) // batch_size * (batch_size // part)
    begins = np.cumsum([0, *sizes])
    orders = [
        begins[domain] + training_batches(size, part, seed=seed, epoch=epoch, domain=domain)[:steps]
        for domain, size in enumerate(sizes)
    ]
    numbers = np.arange(len(sizes), dtype=np.int32)
    for parts in zip(*orders):
        if mixed:
            yield np.concatenate(parts), np.repeat(numbers, part)
        else:
            yield from zip(parts, numbers)


def _load(name: str, data_dir: str | os.PathLike[str] | None) -> data.Dataset:
    plain = name.removesuffix(BLENDED)
    if plain == "digits":
        data_dir = None
    elif data_dir is not None and not plain.startswith("tfds:"):
        data_dir = pathlib.Path(data_dir) / plain
    dataset = data.load(plain, data_dir)
    if plain == name:
        return dataset
    photographs = sample_photographs()
    return data.Dataset(
        *(split._replace(images=blend(split.images, photographs, seed=i)) for i, split in enumerate(dataset))
    )


def sample_photographs() -> np.ndarray:
    """The two photographs of scikit-learn, uint8 [2, 427, 640, 3]."""
    from sklearn import datasets

    return np.stack(datasets.load_sample_images().images)


def blend(images: np.ndarray, photographs: np.ndarray, *, seed: int) -> np.ndarray:
    """The absolute difference of each image and a random patch of a photograph, in each colour (MNIST-M).

    Ganin et al. 2016, "Domain-Adversarial Training of Neural Networks", section 5.2.4.

    Args:
        images: uint8 [N, H, W, 1 or 3].
        photographs: uint8 [P, height, width, 3], no smaller than the images.
        seed: decides the patches.
    """
    patches = sliding_window_view(photographs, images.shape[1:3], axis=(1, 2))
    rng = np.random.default_rng(seed)
    which, top, left = (rng.integers(size, size=len(images)) for size in patches.shape[:3])
    patch = np.moveaxis(patches[which, top, left], 1, -1)
    return np.abs(patch.astype(np.int16) - images).astype(np.uint8)


def _reshaped(split: data.Split, shape: tuple[int, int, int]) -> data.Split:
    images = split.images
    if images.shape[1:3] != shape[:2]:
        resized = jax.image.resize(images.astype(np.float32), (len(images), *shape[:2], images.shape[3]), "linear")
        images = np.clip(np.round(resized), 0, 255).astype(np.uint8)
    return split._replace(images=np.broadcast_to(images, (len(images), *shape)))
