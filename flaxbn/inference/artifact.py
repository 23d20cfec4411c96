"""The inference artifact: a zip archive of a serialized `jax.export` module and what is known about it, as JSON."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import io
import json
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax import dtypes, export

MODULE, METADATA = "model.jax_export", "metadata.json"
FORMAT_VERSION = 1

_FIELDS = {
    "module_sha256": str,
    "versions": dict,
    "platforms": list,
    "inputs": dict,
    "outputs": dict,
    "statistics": dict,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Inference:
    """A model that was read from an artifact: `inference(batch)` gives the predictions.

    Attributes:
        metadata: `versions` of the packages that wrote it; `platforms` that it runs on; `inputs` and `outputs`, the
            shape and dtype of each array by its path, "batch" standing for the axis of examples; `statistics`, the
            `count` of each batch-norm layer (the weight of the positions behind its mean and variance: a number, a
            list where it differs along leading axes, or None where it is not known); `module_sha256`,
            `format_version`.
        exported: the module itself.
    """

    metadata: dict[str, Any]
    exported: export.Exported

    def __call__(self, batch: Any) -> Any:
        """The predictions for a batch of any size, each as if it ran alone. A new size is compiled at its first call.

        Args:
            batch: arrays like the example that was exported: its structure, shapes and dtypes (after jax's conversion
                of 64 bits to 32), but for the number of examples, which is at least one.

        Raises:
            ValueError: if the batch is another one.
        """
        (expected,), _ = jax.tree.unflatten(self.exported.in_tree, self.exported.in_avals)
        _check_batch(batch, expected)
        return self._run(batch)

    @functools.cached_property
    def _run(self) -> Callable[[Any], Any]:
        return jax.jit(self.exported.call)


def load_inference(path: str | os.PathLike[str]) -> Inference:
    """Reads and validates an artifact of `flaxbn.export_inference`. Nothing in it is unpickled.

    Raises:
        ValueError: if the file is no such artifact, is damaged or cut off, is of a later format, cannot be read by this
            version of jax, does not run on the platform that jax uses, or needs 64 bits where they are off.
        OSError: if the file cannot be read.
        ModuleNotFoundError: if flatbuffers is not installed.
    """
    require_flatbuffers()
    module, content = _members(pathlib.Path(path))
    metadata = _parsed(content, path)
    if hashlib.sha256(module).hexdigest() != metadata["module_sha256"]:
        raise ValueError(
            f"The SHA-256 of {MODULE} must be the one in {METADATA}: in {os.fspath(path)} it is not, so the file was "
            "damaged or changed. Copy it again, or export it anew."
        )
    with _known_to_jax(metadata, path):
        exported = _deserialized(module)
        found = describe(exported)
    if found != {name: metadata[name] for name in found}:
        raise ValueError(
            f"{METADATA} must describe the module beside it: in {os.fspath(path)} platforms, inputs or outputs differ, "
            "so one of them was changed. Export it anew."
        )
    _check_platform(exported, path)
    _check_width(exported, path)
    with _known_to_jax(metadata, path):
        _lower(exported)
    return Inference(metadata, exported)


def save(path: str | os.PathLike[str], exported: export.Exported, about: Mapping[str, Any]) -> None:
    """Writes an artifact; `path` is replaced only by a complete one."""
    module = bytes(exported.serialize())
    metadata = {
        "format_version": FORMAT_VERSION,
        "module_sha256": hashlib.sha256(module).hexdigest(),
        **describe(exported),
        **about,
    }
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        for name, content in ((METADATA, json.dumps(metadata, indent=2, allow_nan=False) + "\n"), (MODULE, module)):
            member = zipfile.ZipInfo(name)  # of no date: what is exported twice is the same file
            member.external_attr = 0o644 << 16
            members.writestr(member, content)
    with replacing(pathlib.Path(path)) as partial:
        partial.write_bytes(archive.getvalue())


def describe(exported: export.Exported) -> dict[str, Any]:
    """What the metadata tells of the module itself: platforms, and the arrays that go in and come out."""
    (batch,), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    return {
        "platforms": list(exported.platforms),
        "inputs": _describe_arrays(batch),
        "outputs": _describe_arrays(outputs),
    }


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path to write a file to, which takes the place of `path` once it is complete, and goes where that fails."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def require_flatbuffers() -> None:
    """Without flatbuffers jax can neither write nor read modules."""
    if importlib.util.find_spec("flatbuffers") is None:
        raise ModuleNotFoundError(
            "jax.export needs the package flatbuffers to write and read modules, which is not installed: "
            "`pip install flatbuffers`, or `pip install 'flaxbn[export]'`.",
            name="flatbuffers",
        )


def _describe_arrays(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): {
            "shape": [dim if isinstance(dim, int) else str(dim) for dim in a.shape],
            "dtype": str(a.dtype),
        }
        for path, a in jax.tree_util.tree_leaves_with_path(tree)
    }


def _members(path: pathlib.Path) -> tuple[bytes, bytes]:
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


@contextlib.contextmanager
def _known_to_jax(metadata: dict[str, Any], path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # jax checks little: a module that it does not know fails anywhere
        raise ValueError(
            f"{MODULE} must be a module that this jax, {jax.__version__}, can read: that of {os.fspath(path)}, written "
            f"by jax {metadata['versions'].get('jax')}, is none. jax reads what a later version wrote for a few weeks "
            "and what an older one wrote for half a year: install a jax near that version, or export it anew."
        ) from error


def _deserialized(module: bytes) -> export.Exported:
    exported = export.deserialize(bytearray(module))
    oldest = export.minimum_supported_calling_convention_version
    newest = export.maximum_supported_calling_convention_version
    if not oldest <= exported.calling_convention_version <= newest:
        raise ValueError(
            f"The calling convention must be {oldest} to {newest}: got {exported.calling_convention_version}."
        )
    return exported


def _lower(exported: export.Exported) -> None:
    """Lowers the module for one example, since `deserialize` does not look at the program."""
    args, _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), args)
    jax.jit(exported.call).lower(*one)


def _check_platform(exported: export.Exported, path: str | os.PathLike[str]) -> None:
    backend = jax.default_backend()
    if not set(exported.platforms) & ({"cuda", "rocm"} if backend == "gpu" else {backend}):
        raise ValueError(
            f"An artifact must be exported for the platform that it runs on: {os.fspath(path)} is for "
            f"{', '.join(exported.platforms)}, and jax runs on {backend} here. Export it with that in `platforms`, or "
            "choose another backend, by the environment variable JAX_PLATFORMS."
        )


def _check_width(exported: export.Exported, path: str | os.PathLike[str]) -> None:
    arrays = (*exported.in_avals, *exported.out_avals)
    wide = sorted({str(a.dtype) for a in arrays if a.dtype != dtypes.canonicalize_dtype(a.dtype)})
    if wide:
        raise ValueError(
            f"An artifact with arrays of 64 bits needs them to be on in jax: {os.fspath(path)} has {', '.join(wide)}. "
            'Turn them on, by `jax.config.update("jax_enable_x64", True)` or the environment variable JAX_ENABLE_X64.'
        )


def _check_batch(batch: Any, expected: Any) -> None:
    given = jax.eval_shape(lambda tree: tree, batch)
    structures: list[Any] = [jax.tree.structure(tree) for tree in (expected, given)]
    if structures[0] != structures[1]:
        raise ValueError(
            "`batch` must have the structure of the example that was exported, "
            f"{structures[0]}: got {structures[1]}. Dictionaries, lists and tuples are told apart."
        )
    pairs = list(zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(given)))
    sizes = {a.shape[:1] for _, a in pairs}
    size = sizes.pop() if len(sizes) == 1 else ()
    if not size or size[0] < 1 or any((a.shape[1:], a.dtype) != (e.shape[1:], e.dtype) for (_, e), a in pairs):
        wanted, received = (_listed(tree) for tree in (expected, given))
        raise ValueError(
            f"`batch` must hold arrays of these shapes and dtypes, with one number of examples, at least 1, in the "
            f"place of `batch`: {wanted}; got {received}. Convert the dtype, or add the axis of examples by `x[None]`."
        )


def _listed(tree: Any) -> str:
    """The arrays of a tree, for messages."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
    return ", ".join(
        f"{name + ' ' if name else ''}{a.dtype}[{','.join(map(str, a.shape))}]" for name, (_, a) in zip(names, leaves)
    )
