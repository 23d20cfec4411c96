"""Sets of TensorFlow Datasets, read without TensorFlow where they lie prepared."""

import importlib.util
import json
import os
import pathlib
import socket
from typing import Any


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
