"""What is known of layers that renormalize: where their bounds stand, and what noise these leave.

Such a layer puts out what the running average makes of its input, as far as its bounds go. Where they are closed, as
ramps are at first, it is batch normalization.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flaxbn.arithmetic.moments import Moments, merge
from flaxbn.arithmetic.renorm import correction
from flaxbn.data.samples import hide
from flaxbn.layers.linen import BatchRenorm
from flaxbn.models.arguments import Model, is_opened_nnx
from flaxbn.models.batch_stats import as_tree, by_path
from flaxbn.models.leaves import named_leaves
from flaxbn.models.linen import Call, trace
from flaxbn.models.places import Path
from flaxbn.models.rows import Row, RowsByLayer

_LATEST = 2**24
"""Later a ramp does not open: float32 steps stand still there."""


class Bounds(NamedTuple):
    """The bounds of one row of a layer that renormalizes.

    Attributes:
        steps: how many updates it has had; 0 where none are stored.
        r_max, d_max: the bounds after so many.
        is_scheduled: whether they change.
        opens: the update from which they let anything through, where they do not yet; infinite for never.
    """

    steps: float
    r_max: float
    d_max: float
    is_scheduled: bool
    opens: float

    @property
    def is_closed(self) -> bool:
        """Whether the layer is batch normalization at present."""
        return self.r_max <= 1 and self.d_max <= 0

    @property
    def is_known(self) -> bool:
        """Whether training has them, as far as what is stored tells: a ramp at 0 may be that of another training."""
        return self.steps > 0 or not self.is_scheduled


def bounds_of_rows(
    model: Model, variables: Mapping[str, Any], batch: Any, call: Call | None, rows: RowsByLayer
) -> dict[str, Bounds]:
    """The bounds of all rows of `BatchRenorm` layers, which are known only where they run: a trace looks at each call.

    Args:
        model, variables, batch, call: as in `diagnose`.
        rows: of all layers.
    """
    fields: dict[Path, tuple[Any, Any]] = {}

    def note(method: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, BatchRenorm):
            fields[context.module.path] = context.module.r_max, context.module.d_max
        return method(*args, **kwargs)

    if is_opened_nnx(model):
        fields = model.renormalizing(variables)
    else:
        with nn.intercept_methods(note):
            trace(model, variables, hide(batch), call, None)
    stored = named_leaves(variables["batch_stats"])
    return {
        row.name: _bounds(*bounds, _steps(stored.get((*path, "steps"), 0), row, np.size(stored[(*path, "mean")])))
        for path, bounds in fields.items()
        for row in rows.get(path, ())
    }


def _steps(steps: Any, row: Row, size: int) -> float:
    """Those of a row, of which there is one for each place of the leading axes of the statistics."""
    found = np.ravel(np.asarray(steps, np.float64))
    return float(found[row.channels[0] * len(found) // size])


def _bounds(r_max: Any, d_max: Any, steps: float) -> Bounds:
    def after(number: float) -> tuple[float, float]:
        r, d = (bound(jnp.float32(number)) if callable(bound) else bound for bound in (r_max, d_max))
        return float(r), float(d)

    def is_open(number: float) -> bool:
        r, d = after(number)
        return r > 1 or d > 0

    is_scheduled = callable(r_max) or callable(d_max)
    return Bounds(steps, *after(steps), is_scheduled, _first(is_open, steps) if is_scheduled else np.inf)


def _first(is_open: Callable[[float], bool], steps: float) -> float:
    """The first number from `steps` on at which a ramp is open, by bisection."""
    low, high = steps, steps
    while not is_open(high):
        if high >= _LATEST:
            return np.inf
        low, high = high, max(2 * high, 1.0)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_open(middle) else (middle, high)
    return high


def renormalized(moments: Sequence[Any], rows: RowsByLayer, bounds: Mapping[str, Bounds], epsilon: float) -> list[Any]:
    """The moments of batches as renormalization leaves them, were the running average that of all these batches.

    What `r` and `d` take to the running average has its mean and variance; what the bounds clip stays off by the rest.

    Args:
        moments: a tree for each batch.
        rows: of all layers.
        bounds: of the rows that renormalize.
        epsilon: what the layers add to the variance.

    Returns:
        A tree for each batch, of the layers that renormalize.
    """
    each = [by_path(jax.device_get(tree)) for tree in moments]
    whole = by_path(jax.device_get(merge(*moments)))
    paths = [path for path in whole if any(row.name in bounds for row in rows.get(path, ()))]
    limits = {path: _limits(rows[path], bounds, whole[path].mean.shape) for path in paths}
    return [as_tree({p: _renormalized(m[p], whole[p], *limits[p], epsilon) for p in paths}) for m in each]


def _limits(rows: Sequence[Row], bounds: Mapping[str, Bounds], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    r_max, d_max = np.ones(shape), np.zeros(shape)
    for row in rows:
        np.put(r_max, row.channels, bounds[row.name].r_max)
        np.put(d_max, row.channels, bounds[row.name].d_max)
    return r_max, d_max


def _renormalized(batch: Moments, whole: Moments, r_max: np.ndarray, d_max: np.ndarray, epsilon: float) -> Moments:
    r, d = map(np.asarray, correction(batch, whole, r_max=r_max, d_max=d_max, epsilon=epsilon))
    mean, var = batch.mean - d * np.sqrt(whole.var + epsilon), (batch.var + epsilon) / r**2 - epsilon
    return Moments(batch.count, mean, np.maximum(var, 0))  # type: ignore[arg-type]
