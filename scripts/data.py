"""Small image classification sets, whole in memory: uint8 images [N, H, W, C] and int32 labels [N].

`load` reads scikit-learn's digits, a folder of IDX files, or a set of TensorFlow Datasets (`tfds:NAME`). What it
returns depends on the data only: the validation examples are a fixed sixth of the training set.
"""

import gzip
import importlib.util
import json
import math
import os
import pathlib
import socket
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np

IDX_UINT8 = 0x08


class Split(NamedTuple):
    """Images, uint8 [N, H, W, C], and their labels, int32 [N]."""

    images: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """The three splits of a data set."""

    train: Split
    validation: Split
    test: Split

    @property
    def num_classes(self) -> int:
        """One more than the largest label."""
        return 1 + max(int(split.labels.max()) for split in self)


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Loads a data set.

    Args:
        name: `digits` (embedded in scikit-learn), `tfds:NAME`, or any other name for the IDX files in `data_dir`.
        data_dir: the folder of the IDX files, or the TFDS data directory (default: TFDS's own).

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError, ConnectionError: if the data is not there or not sound; the
            message names what to do.
    """
    if name == "digits":
        if data_dir is not None:
            raise ValueError(
                f"digits comes with scikit-learn: got --data-dir {data_dir}. Leave it out, or name the set."
            )
        return load_digits()
    if name.startswith("tfds:"):
        return load_tfds(name.removeprefix("tfds:"), data_dir)
    if data_dir is None:
        raise ValueError(
            f"--dataset {name} is read from a folder of IDX files: got no --data-dir. Name the folder that holds "
            "train-images-idx3-ubyte and the three other files (raw or .gz), or use --dataset digits, which needs no "
            f"files, or --dataset tfds:{name}."
        )
    return load_idx(pathlib.Path(data_dir))


def load_digits() -> Dataset:
    """The 1 797 handwritten digits, 8x8 in 17 grey levels, of scikit-learn; a fixed sixth of them is the test set."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)
    return _with_validation(*_cut(Split(images, digits.target.astype(np.int32))))


def load_idx(folder: pathlib.Path) -> Dataset:
    """The IDX files of a folder, raw or gzip, named as those of MNIST."""
    train, test = (
        _paired(
            read_idx(_find(folder, f"{part}-images-idx3-ubyte"), rank=3)[..., None],
            read_idx(_find(folder, f"{part}-labels-idx1-ubyte"), rank=1).astype(np.int32),
            f"{part} of {folder}",
        )
        for part in ("train", "t10k")
    )
    return _with_validation(train, test)


def read_idx(path: pathlib.Path, *, rank: int) -> np.ndarray:
    """Reads an IDX file of uint8: two zero bytes, a type, a rank, the big-endian sizes, then the values."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} must be a whole gzip file: {error}. Fetch it again.") from error
    header = 4 + 4 * rank
    magic = bytes((0, 0, IDX_UINT8, rank))
    if content[:4] != magic:
        raise ValueError(
            f"{path} must be an IDX file of rank {rank} and type uint8, which begins with the bytes {magic.hex()}: got "
            f"{content[:4].hex() or 'an empty file'}. Images go in *-images-idx3-ubyte, labels in *-labels-idx1-ubyte."
        )
    if len(content) < header:
        raise ValueError(f"{path} is truncated: its header has {header} bytes, got {len(content)}. Fetch it again.")
    shape = struct.unpack(f">{rank}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise ValueError(
            f"{path} must hold {math.prod(shape)} values after its header, which says shape {shape}: got "
            f"{len(content) - header}. The file is truncated or damaged; fetch it again."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def load_tfds(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """An image classification set of TFDS, `NAME[/CONFIG][:VERSION]`, prepared here if TensorFlow and a network are."""
    sources = open_tfds(name, data_dir)
    if not {"train", "test"} <= sources.keys():
        raise ValueError(f"tfds:{name} must have the splits train and test: got {sorted(sources)}. Use another set.")
    features = sources["train"].dataset_info.features
    if not {"image", "label"} <= set(features):
        raise ValueError(
            f"tfds:{name} must have the features image and label: got {sorted(features)}. Use an image classification "
            "set."
        )
    return _with_validation(*(_read_source(sources[part], f"{part} of tfds:{name}") for part in ("train", "test")))


def open_tfds(name: str, data_dir: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """The splits of a TFDS set, each a sequence of examples that are read when asked for."""
    if importlib.util.find_spec("tensorflow_datasets") is None:
        raise ModuleNotFoundError(
            f"--dataset tfds:{name} needs the package tensorflow-datasets, which is not installed. Install it "
            "(pip install tensorflow-datasets array_record importlib_resources Pillow), or use --dataset digits, or "
            "IDX files with --data-dir."
        )
    root = pathlib.Path(data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    formats = _prepared_formats(root, name)
    if not formats:
        _prepare_tfds(name, root)
    elif "array_record" not in formats:
        raise ValueError(
            f"tfds:{name} must be prepared as array_record to be read without TensorFlow: got {sorted(formats)} in "
            f'{root}. Prepare it again in another --data-dir, with tfds.builder(..., file_format="array_record").'
        )
    import tensorflow_datasets as tfds

    return tfds.data_source(name, data_dir=root, download=False)


def _prepared_formats(root: pathlib.Path, name: str) -> set[str]:
    """The file formats in which a TFDS set lies prepared: for a name without configuration, in any configuration."""
    folder, _, version = name.partition(":")
    found = (root / folder).glob(f"**/{version or '*'}/dataset_info.json")
    return {json.loads(path.read_text()).get("fileFormat", "tfrecord") for path in found}


def _prepare_tfds(name: str, root: pathlib.Path) -> None:
    """Downloads and prepares a TFDS set; without TensorFlow or a network, an error at once: TFDS waits for minutes."""
    remedies = (
        f"Prepare it on a machine that has both, with tfds.builder({name!r}, "
        f'file_format="array_record").download_and_prepare(), and copy it to {root}; or name the folder where it is by '
        "--data-dir; or use --dataset digits, or IDX files with --data-dir."
    )
    if importlib.util.find_spec("tensorflow") is None:
        raise FileNotFoundError(
            f"tfds:{name} is not prepared in {root}, and preparing it needs TensorFlow, which is not installed, and a "
            f"network. {remedies}"
        )
    try:
        socket.create_connection(("storage.googleapis.com", 443), timeout=5).close()
    except OSError as error:
        raise ConnectionError(
            f"tfds:{name} is not prepared in {root}, and preparing it needs a network: {error}. {remedies}"
        ) from error
    import tensorflow_datasets as tfds

    tfds.builder(name, data_dir=root, file_format="array_record").download_and_prepare()


def _read_source(source, origin: str) -> Split:
    examples = [(example["image"], example["label"]) for example in source]
    shapes = {image.shape for image, _ in examples}
    if len(shapes) > 1:
        raise ValueError(
            f"The images of {origin} must have one shape: got {len(shapes)}, {sorted(shapes)[:3]} among them."
        )
    images, labels = zip(*examples)
    return _paired(np.stack(images), np.array(labels, np.int32), origin)


def _find(folder: pathlib.Path, stem: str) -> pathlib.Path:
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"--data-dir must be a folder that holds {stem} (raw or .gz): got {folder}. It needs images and labels of "
        "train and t10k, four files named as those of MNIST."
    )


def _paired(images: np.ndarray, labels: np.ndarray, origin: str) -> Split:
    if len(images) != len(labels) or not len(images):
        raise ValueError(
            f"Every image must have a label, and there must be some: got {len(images)} images and {len(labels)} labels "
            f"in {origin}."
        )
    return Split(images, labels)


def _cut(whole: Split) -> tuple[Split, Split]:
    """All but a sixth, and that sixth, chosen at random but always the same."""
    order = np.random.default_rng(0).permutation(len(whole.labels))
    size = len(order) // 6
    return tuple(Split(whole.images[index], whole.labels[index]) for index in (order[size:], order[:size]))


def _with_validation(train: Split, test: Split) -> Dataset:
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(
            "Training and test images must have one shape [height, width, channels]: got "
            f"{train.images.shape[1:]} and {test.images.shape[1:]}."
        )
    if len(train.labels) < 6:
        raise ValueError(
            f"The training set must have at least 6 examples, to cut validation from: got {len(train.labels)}."
        )
    return Dataset(*_cut(train), test)
