"""The inference artifact: a zip archive of a serialized `jax.export` module and what is known about it, as JSON.

The members are stored as they are, so that the module can be read by `zipfile` alone. That a file is what was written
the CRC-32 of each member tells, which zip keeps and `zipfile` checks; against people who change files on purpose there
is no protection here.
"""

import importlib.util
import io
import json
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
from jax import export

MODULE, METADATA = "model.jax_export", "metadata.json"
"""The names of the two members."""
FORMAT_VERSION = 1
"""It grows when readers of the old format could no longer read the new one; a field more does not do that."""
_FIELDS = {
    "versions": dict,
    "platforms": list,
    "inputs": dict,
    "outputs": dict,
    "statistics": dict,
}


def save(path: str | os.PathLike[str], exported: export.Exported, about: Mapping[str, Any]) -> None:
    """Writes an artifact; `path` is replaced only by a complete one.

    Args:
        path: the file.
        exported: the module, one array of symbolic length "batch" in the place of examples.
        about: what the metadata tells besides the module's own arrays and platforms: `versions` and `statistics`.
    """
    module = bytes(exported.serialize())
    metadata = {"format_version": FORMAT_VERSION, **describe(exported), **about}
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        for name, content in ((METADATA, json.dumps(metadata, indent=2, allow_nan=False) + "\n"), (MODULE, module)):
            member = zipfile.ZipInfo(name)  # of no date: what is exported twice is the same file
            member.external_attr = 0o644 << 16
            members.writestr(member, content)
    replace_file(pathlib.Path(path), archive.getvalue())


def read(path: str | os.PathLike[str]) -> tuple[bytes, dict[str, Any]]:
    """The module and the metadata of an artifact; jax has not seen the module yet.

    Raises:
        ValueError: if the file is no such archive, is damaged or cut off, or its metadata are none, or of a later
            format.
        OSError: if it cannot be read.
    """
    module, metadata = _members(pathlib.Path(path))
    return module, _parsed(metadata, path)


def describe(exported: export.Exported) -> dict[str, Any]:
    """What the metadata tells of the module itself: platforms, and the arrays that go in and come out.

    Reading computes it again, so that metadata cannot tell of another module than the one beside them.
    """
    (batch,), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    return {
        "platforms": list(exported.platforms),
        "inputs": _describe_arrays(batch),
        "outputs": _describe_arrays(outputs),
    }


def require_flatbuffers() -> None:
    """Without flatbuffers, in whose format they are, jax can neither write nor read modules.

    Raises:
        ModuleNotFoundError: if it is not installed; jax itself would fail later, and name no remedy.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise ModuleNotFoundError(
            "jax.export needs the package flatbuffers to write and read modules, which is not installed: "
            "`pip install flatbuffers`, or `pip install 'flaxbn[export]'`.",
            name="flatbuffers",
        )


def _describe_arrays(tree: Any) -> dict[str, Any]:
    """The shape and dtype of each array by its path, as JSON; a symbolic dimension by its name."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): {
            "shape": [dim if isinstance(dim, int) else str(dim) for dim in a.shape],
            "dtype": str(a.dtype),
        }
        for path, a in jax.tree_util.tree_leaves_with_path(tree)
    }


def replace_file(path: pathlib.Path, content: bytes) -> None:
    """Writes a file as a whole: whoever reads it finds the old one or the new one, never a part.

    It is written beside `path`, brought to the disk, and then renamed, which a file system does in one step; what was
    written is removed if anything fails. The number of the process is in its name, so that two writers do not meet.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _members(path: pathlib.Path) -> tuple[bytes, bytes]:
    """The module and the metadata, whose checksums are right."""
    content = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as members:
            return members.read(MODULE), members.read(METADATA)
    except Exception as error:  # zipfile raises a dozen classes, according to where a file is damaged
        raise ValueError(
            f"An inference artifact must be a zip archive with {MODULE} and {METADATA}, as `flaxbn.export_inference` "
            f"writes it: {path}, of {len(content)} bytes, is none, or was damaged or cut off. Copy it again, or export "
            "it anew."
        ) from error


def _parsed(content: bytes, path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata, of a known format and with all its fields; more fields than these may be there."""
    try:
        metadata = json.loads(content)
        version = metadata["format_version"]
        valid = type(version) is int and version >= 1
        later = valid and version > FORMAT_VERSION
        valid &= later or all(isinstance(metadata[field], kind) for field, kind in _FIELDS.items())
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(_not_metadata(path)) from error
    if later:
        raise ValueError(
            f"The format of an artifact must be {FORMAT_VERSION}, the newest that this flaxbn reads: that of "
            f"{os.fspath(path)} is {version}. Read it with a newer flaxbn, or export it anew with this one."
        )
    if not valid:
        raise ValueError(_not_metadata(path))
    return metadata


def _not_metadata(path: str | os.PathLike[str]) -> str:
    fields = ", ".join(("format_version", *_FIELDS))
    return (
        f"{METADATA} must be a JSON object with {fields}: that of {os.fspath(path)} is none, so the file is no "
        "artifact of `flaxbn.export_inference`, or was changed. Export it anew."
    )
