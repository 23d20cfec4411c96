"""Small sets, whole in memory: uint8 images [N, H, W, C] and int32 labels [N], or a table of numbers by site.

`load` reads scikit-learn's digits, a folder of IDX files, or a set of TensorFlow Datasets (`tfds:NAME`). What it
returns depends on the data only: the validation examples are a fixed sixth of the training set. `load_sites` reads a
table in which a column names the site that a row comes from.
"""

import csv
import gzip
import math
import os
import pathlib
import struct
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tfds_sets

IDX_UINT8 = 0x08


class Split(NamedTuple):
    """Images, uint8 [N, H, W, C], and their labels, int32 [N]."""

    images: np.ndarray
    labels: np.ndarray


class Table(NamedTuple):
    """The rows of one site: values, float32 [N, F], NaN where one is missing, and labels, int32 [N]."""

    values: np.ndarray
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
            "train-images-idx3-ubyte (idx4 with channels) and the three other files (raw or .gz), or use --dataset "
            f"digits, which needs no files, or --dataset tfds:{name}."
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
            read_images(folder, part),
            read_idx(_find(folder, f"{part}-labels-idx1-ubyte"), rank=1).astype(np.int32),
            f"{part} of {folder}",
        )
        for part in ("train", "t10k")
    )
    return _with_validation(train, test)


def read_images(folder: pathlib.Path, part: str) -> np.ndarray:
    """The images of one part: [N, H, W] in an idx3 file, which are grey, or [N, H, W, C] in an idx4 file."""
    path = _find(folder, f"{part}-images-idx3-ubyte", f"{part}-images-idx4-ubyte")
    return read_idx(path, rank=4) if "idx4" in path.name else read_idx(path, rank=3)[..., None]


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
            f"{content[:4].hex() or 'an empty file'}. Grey images go in *-images-idx3-ubyte, those with channels in "
            "*-images-idx4-ubyte, labels in *-labels-idx1-ubyte."
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


def load_sites(
    path: str | os.PathLike[str], columns: Sequence[str], *, label: str, site: str = "site"
) -> dict[str, Table]:
    """A table with a row of names, as one `Table` for each site, in the order in which the sites come.

    Args:
        path: a file of comma-separated values; an empty cell is a missing value.
        columns: those to read, which hold numbers.
        label: the column of the labels, which are whole numbers.
        site: the column that names the site.

    Raises:
        ValueError: if a column is not there, or a cell is not what it must be; the message names the line.
    """
    with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets begin with a mark
        reader = csv.DictReader(file)
        if absent := [name for name in (*columns, label, site) if name not in (reader.fieldnames or ())]:
            raise ValueError(f"{path} must have the columns {absent}: got {reader.fieldnames}.")
        sites: dict[str, list[tuple[list[float], int]]] = {}
        for row in reader:
            try:
                _check_cells(row)
                read = [float(row[name] or "nan") for name in columns], int(row[label])
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"Line {reader.line_num} of {path} must hold numbers in {[*columns]}, or nothing where one is "
                    f"missing, and a whole number in {label}: {error}."
                ) from error
            sites.setdefault(row[site], []).append(read)
    return {
        name: Table(*(np.array(part, dtype) for part, dtype in zip(zip(*rows), (np.float32, np.int32))))
        for name, rows in sites.items()
    }


def _check_cells(row: dict[str | None, Any]) -> None:
    if None in row or None in row.values():
        raise ValueError("it has more cells or fewer than there are names")


def load_tfds(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """An image classification set of TFDS, `NAME[/CONFIG][:VERSION]`, prepared here if TensorFlow and a network are."""
    sources = tfds_sets.open_tfds(name, data_dir)
    if not {"train", "test"} <= sources.keys():
        raise ValueError(f"tfds:{name} must have the splits train and test: got {sorted(sources)}. Use another set.")
    features = sources["train"].dataset_info.features
    if not {"image", "label"} <= set(features):
        raise ValueError(
            f"tfds:{name} must have the features image and label: got {sorted(features)}. Use an image classification "
            "set."
        )
    return _with_validation(*(_read_source(sources[part], f"{part} of tfds:{name}") for part in ("train", "test")))


def _read_source(source, origin: str) -> Split:
    examples = [(example["image"], example["label"]) for example in source]
    shapes = {image.shape for image, _ in examples}
    if len(shapes) > 1:
        raise ValueError(
            f"The images of {origin} must have one shape: got {len(shapes)}, {sorted(shapes)[:3]} among them."
        )
    images, labels = zip(*examples)
    return _paired(np.stack(images), np.array(labels, np.int32), origin)


def _find(folder: pathlib.Path, *stems: str) -> pathlib.Path:
    for path in (folder / f"{stem}{ending}" for stem in stems for ending in ("", ".gz")):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"--data-dir must be a folder that holds {' or '.join(stems)} (raw or .gz): got {folder}. It needs images and "
        "labels of train and t10k, four files named as those of MNIST."
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
