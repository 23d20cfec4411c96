"""Whether the examples of a batch are independent of each other: statistics of parts must be those of the whole."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxbn.arithmetic.moments import Moments, merge, widen
from flaxbn.data.batches import count_samples
from flaxbn.data.samples import gather_names, hide, is_array, is_names
from flaxbn.models.arguments import Model, is_opened_nnx, open_model, takes_model
from flaxbn.models.batch_stats import with_wide_statistics
from flaxbn.models.linen import Call, evaluate, trace
from flaxbn.tracing.measure import measure_tap
from flaxbn.tracing.primitive import Tap

_TOLERANCE = 1e-3
"""Of a standard deviation or a variance: a thousand times what rounding in float32 comes to, at the highest precision.
What GPUs and TPUs round products to by default, which differs with the shape of a batch, comes to about as much."""
_UNITS = 4
"""Of rounding, where those exceed the tolerance: in half precision one unit is 1e-3 and more."""


class BatchDependenceError(ValueError):
    """What is computed for an example changes with the others of its batch.

    Examples:
        >>> import flaxbn
        >>> issubclass(flaxbn.BatchDependenceError, ValueError)
        True
    """


@takes_model
def assert_batch_independent(
    model: Model, variables: Mapping[str, Any], batch: Any, *, call: Call | None = None
) -> None:
    """Raises unless evaluating an example gives the same whatever else is in the batch.

    The batch is cut into two uneven parts, every third example and the others. With the stored statistics, the merged
    moments of what each batch-norm layer receives must be those of the whole batch: `|mean' - mean| <= 1e-3 std` and
    `|var' - var| <= 1e-3 var`, `var` being that of the channel, of an average channel, and of the rounding of large
    means (one unit of rounding times the mean square of the layer) together. Rounding comes to 1e-6 (in half precision
    four units of it take the place of 1e-3). What is reduced over the batch shows by about 1/B: give a small batch of
    unlike examples. Then each array that `call` returns with the examples along its leading axis must have the same
    rows, within 1e-3 of its root mean square. Products are computed at the highest precision of the device, but where
    the model itself asks for another one: TF32 on a GPU rounds batches of different sizes differently.

    Examples:
        >>> import flax.linen as nn, flaxbn, jax, numpy as np
        >>> model, x = nn.Dense(2), np.float32([[1.0], [2.0], [4.0]])
        >>> variables = model.init(jax.random.key(0), x)
        >>> flaxbn.assert_batch_independent(model, variables, x)
        >>> try:
        ...     flaxbn.assert_batch_independent(model, variables, x, call=lambda m, b: m(b - b.mean()))
        ... except flaxbn.BatchDependenceError as error:
        ...     print(str(error).partition(":")[0])
        Each example must be evaluated by itself

    Args:
        model: the model, with or without batch-norm layers; for one of flax.nnx, `*nnx.split(model)` stands in the
            place of `model, variables`. It runs in the mode that it is in: call `model.eval()` before.
        variables: its variables; read only.
        batch: a pytree of arrays with a common leading axis of at least two examples.
        call: how the model is run for evaluation, `(module, batch) -> output`; by default `module(batch)`.

    Raises:
        BatchDependenceError: a ValueError that names the first layer behind which examples are mixed, or the output.
        ValueError: if the batch is too small.
        TypeError: if `model` is neither a `flax.linen.Module` nor split from an `nnx.Module`.
    """
    model, variables = open_model(model, variables, evaluates=False)
    batch = gather_names(batch)
    if count_samples(batch) < 2:
        raise ValueError("`batch` must hold at least two examples, to be cut into parts: got one.")
    whole = jax.tree.map(lambda a: a if is_names(a) else jnp.asarray(a), batch)
    parts = [jax.tree.map(lambda a, rows=rows: a[rows], whole) for rows in split(count_samples(whole))]
    with jax.default_matmul_precision("highest"):
        layers, found = _stored_moments(model, variables, whole, call)
        measured = [_stored_moments(model, variables, part, call)[1] for part in parts]
        variances = [moments.var + jnp.mean(moments.var) for moments, _ in found]
        check_parts(layers, found, [_merge_all(pair) for pair in zip(*measured)], variances)
        evaluation = "`model.eval()` before `nnx.split`" if is_opened_nnx(model) else "`use_running_average=True`"
        _check_outputs(evaluation, *(outputs(model, variables, part, call) for part in (whole, *parts)))


def split(samples: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of two parts of a batch: every third example, and the others.

    They are uneven and interleaved, so that they are no blocks that a model might respect, halves or pairs say.
    """
    rows = np.arange(samples)
    return rows[::3], np.delete(rows, np.s_[::3])


def check_parts(layers: Sequence[str], whole: Sequence[Any], parts: Sequence[Any], variances: Sequence[Any]) -> None:
    """The moments of the whole, `(Moments, dtype of the values)` for each call, against those of its parts, merged.

    Differences are measured by `variances`: those of many samples, since a few can have next to none.

    Args:
        layers: what each call is named in a message.
        whole: for each call the moments of the whole batch, in the order of execution: the first that differs is next
            behind what mixes.
        parts: for each call those of the parts, merged.
        variances: for each call what counts as one standard deviation, squared, of each channel.

    Raises:
        BatchDependenceError: naming the first call whose moments differ.
    """
    fetched = jax.device_get([(moments, again, var) for (moments, _), (again, _), var in zip(whole, parts, variances)])
    for layer, (_, dtype), (moments, again, var) in zip(layers, whole, fetched, strict=True):
        if _differ(moments, again, var, dtype):
            raise BatchDependenceError(
                f"Each example must be evaluated by itself: what {layer} receives changes with the other examples of "
                "the batch, so something before it mixes them (a mean over the batch, a layer in training mode that "
                "is not batch normalization, an order of examples, pairs). Its statistics would depend on the batch "
                'size. Mend the model or `call`; where mixing is meant, method="precise" with the batches of training '
                "is the estimate to use."
            )


def _differ(whole: Moments, parts: Moments, var: np.ndarray, dtype: Any) -> bool:
    """Whether moments of values of `dtype` differ by more than rounding does, in any channel that both have seen.

    A channel far from 0 loses of its variance what rounding costs its mean, which the power of the layer stands for.
    """
    seen = (whole.count > 0) & (parts.count > 0)
    rounding = float(jnp.finfo(dtype if jnp.issubdtype(dtype, jnp.inexact) else widen(dtype)).eps)
    tolerance = max(_TOLERANCE, _UNITS * rounding)
    power = np.mean(np.abs(whole.mean) ** 2 + whole.var, where=seen) if seen.any() else 0.0
    var = var.astype(np.float64) + rounding * power + np.finfo(np.float64).tiny
    with np.errstate(invalid="ignore"):  # infinite moments differ
        wrong = ~(np.abs(parts.mean - whole.mean) <= tolerance * np.sqrt(var))
        wrong |= ~(np.abs(parts.var - whole.var) <= tolerance * var)
    return bool(np.any(wrong & seen))


def _merge_all(parts: Sequence[Any]) -> Any:
    """Of one call: the merged moments of all parts, and the dtype, which is that of each."""
    return merge(*(moments for moments, _ in parts)), parts[0][1]


def _stored_moments(
    model: Model, variables: Mapping[str, Any], batch: Any, call: Call | None
) -> tuple[list[str], list[Any]]:
    """The layer of each call, and the moments and dtype of its input, with the stored statistics."""
    variables, batch = with_wide_statistics(variables), hide(batch)
    program = trace(model, variables, batch, call, None).program

    def on_tap(tap: Tap) -> Any:
        return tap.mean, tap.var, measure_tap(tap, None).moments

    _, records = jax.jit(partial(program.run, on_tap=on_tap))(jax.tree.leaves((variables, batch)))
    return program.layer_names(), list(zip(records, (x.dtype for x in program.tap_inputs())))


def outputs(model: Model, variables: Mapping[str, Any], batch: Any, call: Call | None) -> list[np.ndarray]:
    """The arrays that `call` returns, but for scalars, in host memory; the model runs once, compiled."""

    @jax.jit
    def run(variables: Any, batch: Any) -> list[Any]:
        output = evaluate(model, variables, batch, call)
        return [leaf for leaf in jax.tree.leaves(output) if is_array(leaf) and leaf.ndim]

    return [np.asarray(leaf) for leaf in run(variables, hide(batch))]


def _check_outputs(evaluation: str, whole: Sequence[np.ndarray], *parts: Sequence[np.ndarray]) -> None:
    """Outputs with a row for each example must have the same rows, whether all run together or in parts.

    Args:
        evaluation: how the model is evaluated, for the message.
        whole: the outputs of the whole batch.
        parts: those of its parts.
    """
    for i, (expected, *found) in enumerate(zip(whole, *parts, strict=True)):
        samples = len(expected)
        rows = split(samples)
        if [len(part) for part in found] != [len(part) for part in rows]:
            continue
        again = np.empty_like(expected)
        same_shapes = all(values.shape[1:] == expected.shape[1:] for values in found)
        for part, values in zip(rows, found if same_shapes else ()):
            again[part] = values
        if not same_shapes or _rows_differ(expected, again):
            raise BatchDependenceError(
                f"Each example must be evaluated by itself: output {i} of `call`, of shape {expected.shape}, changes "
                "with the other examples of the batch. A batch-norm layer in training mode does that, and whatever "
                f"else reduces over the batch: evaluate with {evaluation}, and mend what mixes examples."
            )


def _rows_differ(expected: np.ndarray, found: np.ndarray) -> bool:
    """Whether outputs differ by more than rounding does; NaN equals NaN, and integers must be equal."""
    if not jnp.issubdtype(expected.dtype, jnp.inexact):
        return not np.array_equal(expected, found)
    tolerance = max(_TOLERANCE, _UNITS * float(jnp.finfo(expected.dtype).eps))
    wide = np.complex128 if np.iscomplexobj(expected) else np.float64
    expected, found = expected.astype(wide), found.astype(wide)
    finite = np.isfinite(expected) & np.isfinite(found)
    scale = np.sqrt(np.mean(np.abs(expected) ** 2, where=finite)) if finite.any() else 0.0
    wrong = np.abs(np.where(finite, found, 0) - np.where(finite, expected, 0)) > tolerance * scale
    same = (expected == found) | (np.isnan(expected) & np.isnan(found))
    return bool(np.any(np.where(finite, wrong, ~same)))
