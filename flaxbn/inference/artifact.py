"""The inference artifact: a zip archive of a serialized `jax.export` module and what is known about it, as JSON.

The members are stored as they are, so that the module can be read by `zipfile` alone, and nothing grows while it is
read. That a file is what was written the CRC-32 of each member tells, which zip keeps and `zipfile` checks. Whatever a
file holds, reading it takes no more memory than a few times its size; against a program that was changed on purpose
there is no protection here.
"""

import contextlib
import importlib.util
import io
import json
import os
import pathlib
import stat
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax import export

from flaxbn.inference.envelope import check_envelope

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
_LAST_FORMAT = 10**6
_MOST_METADATA = 4 << 20
"""Bytes, enough for counts that differ between 200 000 channels. As objects they can take 25 times as much memory."""
_ENCRYPTED = 1
"""The bit of zip's flags."""


def save(path: str | os.PathLike[str], exported: export.Exported, about: Mapping[str, Any]) -> None:
    """Writes an artifact; `path` is replaced only by a complete one.

    Args:
        path: the file.
        exported: the module, one array of symbolic length "batch" in the place of examples.
        about: what the metadata tells besides the module's own arrays and platforms: `versions` and `statistics`.

    Raises:
        ValueError: if it would be refused when it is read.
    """
    module = bytes(exported.serialize())
    check_envelope(module)
    fields = {"format_version": FORMAT_VERSION, **describe(exported), **about}
    metadata = (json.dumps(fields, indent=2, allow_nan=False) + "\n").encode()
    if len(metadata) > _MOST_METADATA:
        raise ValueError(f"{_too_long(len(metadata))}. Leave `moments` out, whose counts take most of it.")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        for name, content in ((METADATA, metadata), (MODULE, module)):
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
    path = pathlib.Path(path)
    if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe is to wait until somebody writes to it
        raise ValueError(
            f"An inference artifact must be a file: {path} is a folder, a pipe or a device. Name the file that "
            "`flaxbn.export_inference` wrote."
        )
    with _Sparing(path) as file:
        size = os.fstat(file.fileno()).st_size
        with _damage_named(path, size):
            archive = zipfile.ZipFile(file)
        _check_members(archive.infolist(), path, size)
        file.most_at_once = size
        with _damage_named(path, size):
            content = archive.read(METADATA)
        metadata = _parsed(content, path)
        with _damage_named(path, size):
            return archive.read(MODULE), metadata


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
            "`pip install flatbuffers`, or flaxbn with its extra, `export`.",
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


class _Sparing(io.FileIO):
    """A file of which little is read at once: zip's directory is as long as the file says, and each entry an object."""

    most_at_once = 1 << 17
    """Bytes. The directory of an artifact has some 200, and a comment of up to 64 KiB may stand behind it."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Reads as many bytes, or by default to the end, if these are not more than that."""
        wanted = self.most_at_once + 1 if size is None or size < 0 else size
        content = super().read(min(wanted, self.most_at_once + 1)) or b""
        if len(content) > self.most_at_once:
            raise ValueError(f"At most {self.most_at_once} bytes can be read at once: got more.")
        return content


@contextlib.contextmanager
def _damage_named(path: pathlib.Path, size: int) -> Iterator[None]:
    """Whatever zipfile raises, a dozen classes according to where a file is damaged, becomes one error."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"An inference artifact must be a zip archive with {MODULE} and {METADATA}, as `flaxbn.export_inference` "
            f"writes it: {path}, of {size} bytes, is none, or was damaged or cut off. Copy it again, or export it anew."
        ) from error


def _check_members(members: Sequence[zipfile.ZipInfo], path: pathlib.Path, size: int) -> None:
    """Refuses an archive whose members are others, or could be larger than the file when they are read."""
    stored = all(
        member.compress_type == zipfile.ZIP_STORED
        and not member.flag_bits & _ENCRYPTED
        and member.file_size == member.compress_size
        for member in members
    )
    lengths = {member.filename: member.file_size for member in members}
    if len(members) != 2 or lengths.keys() != {MODULE, METADATA} or not stored or sum(lengths.values()) > size:
        raise ValueError(
            f"An inference artifact must be a zip archive with {MODULE} and {METADATA}, each once, neither compressed "
            f"nor encrypted, and nothing else: {path} has {len(members)} members, which are others, or written "
            "otherwise. Do not pack it again; export it anew."
        )
    if lengths[METADATA] > _MOST_METADATA:
        raise ValueError(f"{_too_long(lengths[METADATA])} in {path}, so it was not written by flaxbn. Export it anew.")


def _too_long(length: int) -> str:
    return f"{METADATA} must have at most {_MOST_METADATA} bytes: got {length}"


def _parsed(content: bytes, path: pathlib.Path) -> dict[str, Any]:
    """The metadata, of a known format and with all its fields; more fields than these may be there."""
    try:
        metadata = json.loads(content)
        version = metadata["format_version"]
        valid = type(version) is int and 1 <= version <= _LAST_FORMAT
        later = valid and version > FORMAT_VERSION
        valid = later or (valid and all(isinstance(metadata[field], kind) for field, kind in _FIELDS.items()))
        valid = later or (valid and all(map(_is_name, (*metadata["versions"].values(), *metadata["platforms"]))))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(_not_metadata(path)) from error
    if later:
        raise ValueError(
            f"The format of an artifact must be {FORMAT_VERSION}, the newest that this flaxbn reads: that of {path} is "
            f"{version}. Read it with a newer flaxbn, or export it anew with this one."
        )
    if not valid:
        raise ValueError(_not_metadata(path))
    return metadata


def _is_name(value: Any) -> bool:
    """Whether a message may show it: of versions and platforms."""
    return isinstance(value, str) and len(value) <= 100 and value.isprintable()


def _not_metadata(path: pathlib.Path) -> str:
    fields = ", ".join(("format_version", *_FIELDS))
    return (
        f"{METADATA} must be a JSON object with {fields}: that of {path} is none, so the file is no artifact of "
        "`flaxbn.export_inference`, or was changed. Export it anew."
    )
