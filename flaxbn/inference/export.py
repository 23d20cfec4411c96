"""Models as artifacts for inference, which are refused where their predictions would be wrong.

A file outlives the session in which its mistakes could have been seen, so every mistake that can be proved is an error
here: a layer in training mode, statistics that were never estimated, predictions that depend on the batch.
"""

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxbn.data.batches import count_samples
from flaxbn.data.samples import check_numbers
from flaxbn.inference.artifact import require_flatbuffers, save
from flaxbn.layers.names import layer_name, layer_path
from flaxbn.models.arguments import Model, check_concrete, is_opened_nnx, open_model, takes_model
from flaxbn.models.batch_stats import by_path, replace_statistics, with_wide_statistics
from flaxbn.models.entries import read_layers
from flaxbn.models.evaluation_mode import check_evaluation
from flaxbn.models.independence import assert_batch_independent
from flaxbn.models.leaves import named_leaves
from flaxbn.models.linen import Call, evaluate, trace
from flaxbn.models.places import Path
from flaxbn.models.rows import RowsByLayer, never_estimated, rows_of
from flaxbn.models.unseen import WAYS_FORWARD, initial_holders, unseen

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_NAMED = 8
"""How many arrays a message names at most."""
_PUT = {
    False: 'variables["batch_stats"] = flaxbn.to_batch_stats(moments, variables["batch_stats"])',
    True: "nnx.update(model, flaxbn.to_batch_stats(moments, nnx.state(model, nnx.BatchStat)))",
}
_ESTIMATE = {
    False: 'variables["batch_stats"] = flaxbn.estimate_population_stats(model, variables, batches)',
    True: "nnx.update(model, flaxbn.estimate_population_stats(*nnx.split(model), batches))",
}
"""What messages tell to do, for models of Linen, and for those of nnx."""


@takes_model
def export_inference(
    model: Model,
    variables: Mapping[str, Any],
    example: Any,
    path: str | os.PathLike[str],
    *,
    call: Call | None = None,
    moments: Any = None,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> None:
    """Writes a model with its weights to a file that predicts with jax and flatbuffers alone, for any batch size.

    Before that it checks what makes predictions wrong without a word: that weights and statistics are finite, that
    every layer is in evaluation mode, that the statistics of every batch-norm layer that runs were estimated, and, with
    `assert_batch_independent` on `example`, that each prediction is independent of the rest of the batch.

    The file is a zip archive of a `jax.export` module and its metadata. `flaxbn.load_inference` reads it; without
    flaxbn and Flax it is

        module = zipfile.ZipFile(path).read("model.jax_export")
        predictions = jax.jit(jax.export.deserialize(bytearray(module)).call)(batch)

    The same model, written twice by the same versions, gives the same bytes. No source paths are in them.

    Examples:
        >>> import pathlib, tempfile
        >>> import flax.linen as nn, flaxbn, jax, numpy as np
        >>> model, x = nn.Dense(2), np.float32([[1, 2, 3], [4, 5, 6]])
        >>> path = pathlib.Path(tempfile.mkdtemp(), "model.zip")
        >>> flaxbn.export_inference(model, model.init(jax.random.key(0), x), x, path, platforms=("cpu",))
        >>> path.stat().st_size > 0
        True

    Args:
        model: the model, with or without batch-norm layers; for one of flax.nnx, `*nnx.split(model)` stands in the
            place of `model, variables`. It is written in the mode that it is in: call `model.eval()` before.
        variables: its variables, on this process; read only. What the model changes in them is dropped.
        example: a batch of at least two unlike examples: a pytree of arrays with a common leading axis, in
            dictionaries with string keys, lists and tuples. All other axes are as in the artifact.
        path: the file, which is replaced once a complete one is there, and left alone if anything fails.
        call: how the model is run for evaluation, `(module, batch) -> output`, the output in the same containers as
            `example`; by default `module(batch)`.
        moments: what `population_moments` returned, for the metadata to tell from how much data each layer's
            statistics are. They must be those in `variables`.
        platforms: what the artifact is to run on, of "cpu", "cuda", "rocm", "tpu". None of them need be present.

    Raises:
        ValueError: naming the layer, if one is in training mode or its statistics (those of one domain, say) are still
            the initial ones; naming the arrays, if weights or statistics are not finite; if predictions depend on the
            batch; if `moments` are not those of `variables`; if there are fewer than two examples, or a platform is
            unknown.
        TypeError: if `model` is neither a `flax.linen.Module` nor split from an `nnx.Module`, or arguments are traced.
        ModuleNotFoundError: if flatbuffers is not installed.
    """
    model, variables = open_model(model, variables, evaluates=False)
    check_concrete("variables", variables)
    check_concrete("example", example)
    check_numbers("example", example, "Leave it out: a file for inference takes numbers only.")
    _check_platforms(platforms)
    _check_containers("`example`", jax.tree.structure(example))
    require_flatbuffers()
    if count_samples(example) < 2:
        raise ValueError(
            "`example` must hold at least two examples, to see whether they affect each other: got "
            f"{count_samples(example)}."
        )
    variables, example = jax.device_get(dict(variables)), jax.tree.map(jnp.asarray, example)
    _check_finite(model, variables)
    check_evaluation(model, variables, example, call)
    counts = _counts(model, variables, moments)
    rows = rows_of(model, variables, example, call=call)
    _check_estimated(model, variables, rows, counts, _unknown_initial(model, variables, example, call))
    assert_batch_independent(model, variables, example, call=call)
    layers = {layer_path(path): {"count": _brief(counts.get(path))} for path in rows}
    about = {"versions": _versions(), "statistics": layers}
    exported = _exported(model, variables, example, call, platforms)
    _check_containers("What `call` returns", exported.out_tree)
    save(path, exported, about)


def _check_platforms(platforms: Sequence[str]) -> None:
    if isinstance(platforms, str) or not platforms or not set(platforms) <= set(_PLATFORMS):
        raise ValueError(
            f"`platforms` must be some of {', '.join(_PLATFORMS)}, in a tuple: got {platforms!r}. NVIDIA's GPUs are "
            '"cuda", those of AMD "rocm".'
        )


def _check_finite(model: Model, variables: Mapping[str, Any]) -> None:
    """Weights and statistics must be numbers; other variables may be infinite, masks of attention for example."""
    weights = model.parameters(variables) if is_opened_nnx(model) else variables.get("params", {})
    trained = {"params": weights, "batch_stats": variables.get("batch_stats", {})}
    leaves = jax.tree_util.tree_leaves_with_path(trained)
    broken = [path for path, a in leaves if jnp.issubdtype(a.dtype, jnp.inexact) and not np.all(np.isfinite(a))]
    if broken:
        paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path in broken[:_NAMED]]
        names = [f"'{path.removesuffix('/value')}'" for path in paths]  # in which nnx boxes arrays
        more = f" and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
        raise ValueError(
            f"Weights and statistics must be finite: {', '.join(names)}{more} hold NaN or infinity, as a training that "
            "diverged leaves them. Export an earlier checkpoint, or train with a smaller learning rate."
        )


def _check_containers(name: str, structure: Any) -> None:
    """Trees must be of containers that `jax.export` writes without a word about anybody's classes."""
    kind, keys = structure.node_data() or (None, ())
    if kind not in (None, type(None), dict, list, tuple) or (
        kind is dict and not all(isinstance(k, str) for k in keys)
    ):
        raise ValueError(
            f"{name} must be an array, or arrays in dictionaries with string keys, lists and tuples, which can be read "
            f"without other packages: got {kind.__name__}{f' with the keys {keys}' if kind is dict else ''}. Convert "
            "it, in `call` if need be."
        )
    for child in structure.children():
        _check_containers(name, child)


def _counts(model: Model, variables: Mapping[str, Any], moments: Any) -> dict[Path, np.ndarray]:
    """The count of each layer in `moments`, which must be those that are stored.

    Otherwise the file would tell of data that its statistics are not from. They are compared as `to_batch_stats` stores
    them, rounded to the dtype.
    """
    if moments is None:
        return {}
    batch_stats = variables.get("batch_stats", {})
    again = named_leaves(replace_statistics(batch_stats, moments, keep_unseen=True))
    differing = {p[:-1] for p, leaf in named_leaves(batch_stats).items() if not np.array_equal(leaf, again[p])}
    if differing:
        names = ", ".join(f"'{layer_name(path)}'" for path in sorted(differing))
        raise ValueError(
            f"`moments` must be those behind the statistics in `variables`: they are not in {names}. Put them there: "
            f"`{_PUT[is_opened_nnx(model)]}`; or leave `moments` out."
        )
    return {path: np.asarray(value.count) for path, value in by_path(moments).items()}


def _check_estimated(
    model: Model, variables: Any, rows: RowsByLayer, counts: Mapping[Path, np.ndarray], unknown: Sequence[Path]
) -> None:
    """Rows of statistics that run must not be the initial ones; the error names their layers, and which rows.

    `unknown` are those of layers of classes that nobody made known.
    """
    initial: dict[Path, list[str]] = {}
    for row in never_estimated(variables.get("batch_stats", {}), rows, counts):
        initial.setdefault(row.path, []).append(f"[{row.label}]")
    if initial or unknown:
        places = [
            f"'{layer_name(path)}'" + (f" (at {', '.join(labels)})" if len(labels) < len(rows[path]) else "")
            for path, labels in initial.items()
        ]
        others = ", ".join(f"'{layer_name(path)}'" for path in unknown)
        raise ValueError(
            "Every batch-norm layer must have the statistics of data: those of "
            f"{', '.join([*places, *([others] if others else [])])} were never estimated, and are the initial ones, "
            f"mean 0 and variance 1. Estimate them, with data of every domain there is: "
            f"`{_ESTIMATE[is_opened_nnx(model)]}`."
            + (f" The class of {others} is not known to flaxbn. {WAYS_FORWARD}" if others else "")
        )


def _unknown_initial(model: Model, variables: Any, example: Any, call: Call | None) -> list[Path]:
    """What holds initial statistics that reach a prediction, and is no batch-norm layer that is known."""
    variables = with_wide_statistics(variables)
    traced = trace(model, variables, example, call, None)
    others = len(jax.tree.leaves(example))
    reading = read_layers(traced.program, variables, others)
    reached = unseen(traced.program, traced.written, variables, others, reading).reached
    return initial_holders(variables.get("batch_stats", {}), reached)


def _exported(
    model: Model, variables: Any, example: Any, call: Call | None, platforms: Sequence[str]
) -> jax.export.Exported:
    """The module of `call` with the weights inside, for any number of examples."""
    (size,) = jax.export.symbolic_shape("batch")
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype), example)

    def predict(batch: Any) -> Any:
        weights = jax.tree.map(jnp.asarray, variables)
        return evaluate(model, weights, batch, call)

    try:
        with _no_source_paths():
            return jax.export.export(jax.jit(predict), platforms=tuple(platforms))(batch)
    except Exception as error:
        error.add_note(
            f"raised while exporting for {', '.join(platforms)} with a batch of any size: the model must not need "
            "the number of examples as a Python integer, nor what one of these platforms lacks"
        )
        raise


@contextlib.contextmanager
def _no_source_paths() -> Iterator[None]:
    """Keeps the paths of source files, which differ between machines, out of what is lowered."""
    options = {"jax_include_full_tracebacks_in_locations": True, "jax_traceback_in_locations_limit": 0}
    before = {name: getattr(jax.config, name) for name in options}
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def _versions() -> dict[str, str]:
    packages = ("flaxbn", "jax", "jaxlib", "flax")
    return {**{name: installed_version(name) for name in packages}, "python": platform.python_version()}


def installed_version(package: str) -> str:
    """The version of a package for records, which must not fail where a package runs from its source."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _brief(count: np.ndarray | None) -> Any:
    """A count as JSON: axes along which it does not change are left out, from the last on.

    The channels of a layer nearly always saw the same data, and then one number says so.
    """
    if count is None:
        return None
    while count.ndim and np.all(count == count[..., :1]):
        count = count[..., 0]
    return count.tolist()
