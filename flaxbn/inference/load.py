"""Reading an artifact, and predicting with it: what does not fit is an error that says what to do, never a guess."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import dtypes, export

from flaxbn.inference.artifact import METADATA, MODULE, describe, read, require_flatbuffers
from flaxbn.inference.envelope import check_envelope


@dataclasses.dataclass(frozen=True, eq=False)
class Inference:
    """A model that was read from an artifact: `inference(batch)` gives the predictions.

    Examples:
        >>> import pathlib, tempfile
        >>> import flax.linen as nn, flaxbn, jax, numpy as np
        >>> model, x = nn.Dense(2), np.float32([[1, 2, 3], [4, 5, 6]])
        >>> path = pathlib.Path(tempfile.mkdtemp(), "model.zip")
        >>> flaxbn.export_inference(model, model.init(jax.random.key(0), x), x, path, platforms=("cpu",))
        >>> inference = flaxbn.load_inference(path)
        >>> inference.metadata["inputs"], inference.metadata["platforms"]
        ({'': {'shape': ['batch', 3], 'dtype': 'float32'}}, ['cpu'])

    Attributes:
        metadata: `versions` of the packages that wrote it; `platforms` that it runs on; `inputs` and `outputs`, the
            shape and dtype of each array by its path, "batch" standing for the axis of examples; `statistics`, the
            `count` of each batch-norm layer (the weight of the positions behind its mean and variance: a number, a
            list where it differs along leading axes, or None where it is not known); `format_version`.
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
    """Reads and validates an artifact of `flaxbn.export_inference`.

    Nothing in it is unpickled or run, and whatever the file holds, its archive, its metadata and what surrounds its
    program take no more memory than 100 MB and a few times its size. But it is a program: jax compiles what it says as
    it stands, so load what comes from people whom you trust.

    Examples:
        >>> import pathlib, tempfile
        >>> import flax.linen as nn, flaxbn, jax, numpy as np
        >>> model, x = nn.Dense(2), np.float32([[1, 2, 3], [4, 5, 6]])
        >>> path = pathlib.Path(tempfile.mkdtemp(), "model.zip")
        >>> flaxbn.export_inference(model, model.init(jax.random.key(0), x), x, path, platforms=("cpu",))
        >>> inference = flaxbn.load_inference(path)
        >>> inference(x[:1]).shape  # any number of examples
        (1, 2)

    Args:
        path: the file.

    Raises:
        ValueError: if the path is no file, or the file is no such artifact, is damaged or cut off, is of a later
            format, cannot be read by this version of jax, does not run on the platform that jax uses, or needs 64 bits
            where they are off.
        OSError: if the file cannot be read.
        ModuleNotFoundError: if flatbuffers is not installed.
    """
    require_flatbuffers()
    module, metadata = read(path)
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


@contextlib.contextmanager
def _known_to_jax(metadata: dict[str, Any], path: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever jax raises at a module of another version becomes an error that says so, and which jax wrote it."""
    try:
        yield
    except Exception as error:  # jax checks little: a module that it does not know fails anywhere
        raise ValueError(
            f"{MODULE} must be a module that this jax, {jax.__version__}, can read: that of {os.fspath(path)}, written "
            f"by jax {metadata['versions'].get('jax')}, is none. jax reads what a later version wrote for a few weeks "
            "and what an older one wrote for half a year: install a jax near that version, or export it anew."
        ) from error


def _deserialized(module: bytes) -> export.Exported:
    """The module, of a calling convention that this jax knows: `deserialize` looks at it only when it is called."""
    check_envelope(module)
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
    """Where 64 bits are off, jax would convert what goes in without a word, and then refuse it."""
    arrays = (*exported.in_avals, *exported.out_avals)
    wide = sorted({str(a.dtype) for a in arrays if a.dtype != dtypes.canonicalize_dtype(a.dtype)})
    if wide:
        raise ValueError(
            f"An artifact with arrays of 64 bits needs them to be on in jax: {os.fspath(path)} has {', '.join(wide)}. "
            'Turn them on, by `jax.config.update("jax_enable_x64", True)` or the environment variable JAX_ENABLE_X64.'
        )


def _check_batch(batch: Any, expected: Any) -> None:
    """A batch must be like the example, but for the number of examples; `batch` may be traced."""
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
    """The arrays of a tree for messages: path, dtype and shape of each."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
    return ", ".join(
        f"{name + ' ' if name else ''}{a.dtype}[{','.join(map(str, a.shape))}]" for name, (_, a) in zip(names, leaves)
    )
