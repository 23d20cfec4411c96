"""The moments of a population: one pass over data with the weights frozen, merged over processes and jobs."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from flaxbn.arithmetic.moments import Moments, merge
from flaxbn.data.batches import Arrays, Stream, open_batches
from flaxbn.data.placement import own_mesh
from flaxbn.data.processes import gather, on_all
from flaxbn.data.progress import Counter, Progress, counting
from flaxbn.estimation.exact.estimate import exact_pass
from flaxbn.estimation.exact.plan import check_limit
from flaxbn.estimation.layer_moments import Result, checked, merged_by_layer, warn_called_twice
from flaxbn.estimation.precise import precise_pass
from flaxbn.estimation.request import Request, has_other_names, request
from flaxbn.models.arguments import Model, check_concrete, open_model, takes_model
from flaxbn.models.batch_stats import as_tree, moments_by_path
from flaxbn.models.linen import Call
from flaxbn.models.places import Path
from flaxbn.models.unseen import one_warning


@takes_model
def population_moments(
    model: Model,
    variables: Mapping[str, Any],
    batches: Any,
    *,
    call: Call | None = None,
    batch_size: int | None = None,
    num_samples: int | None = None,
    method: Literal["precise", "exact"] = "precise",
    sample_weight: Callable[[Any], Array] | None = None,
    only: Callable[[str], bool] | None = None,
    keep_unseen: bool = False,
    memory_limit: int | None = None,
    sharding: NamedSharding | None = None,
    normalization_batch: Literal["global", "device"] | int = "global",
    rngs: Mapping[str, Array] | None = None,
    check_independence: bool = True,
    progress: Progress | None = None,
    earlier: Any = None,
) -> Any:
    """The Moments behind `estimate_population_stats`, which takes the same arguments and finishes them.

    Args:
        earlier: moments of a precise pass over other data, a tree as this function returns, to go on from: the result
            is that of both. Passes in different jobs can also be merged afterwards.

    Returns:
        A tree like `batch_stats`, with one Moments in the place of each layer's variables; `to_batch_stats` turns it
        into statistics. Precise moments of different parts of the data merge by `flaxbn.merge` into those of one pass
        over all. Exact ones do not, but for the first layer: deeper ones depend on the statistics of the whole set.
        Its arrays are numpy ones in float64, so nothing is lost however many parts there are.

    Examples:
        >>> import flax.linen as nn, flaxbn, jax, numpy as np
        >>> model = nn.BatchNorm(use_running_average=True)
        >>> images = np.arange(12, dtype=np.float32).reshape(6, 2)
        >>> variables = model.init(jax.random.key(0), images)
        >>> first = flaxbn.population_moments(model, variables, images[:4], batch_size=2)
        >>> others = flaxbn.population_moments(model, variables, images[4:], batch_size=2)
        >>> merged = flaxbn.merge(first, others)
        >>> int(merged.count[0]), merged.mean.tolist()
        (6, [5.0, 6.0])
    """
    options: dict[str, Any] = {
        "call": call,
        "batch_size": batch_size,
        "num_samples": num_samples,
        "method": method,
        "sample_weight": sample_weight,
        "only": only,
        "keep_unseen": keep_unseen,
        "memory_limit": memory_limit,
        "sharding": sharding,
        "normalization_batch": normalization_batch,
        "rngs": rngs,
        "check_independence": check_independence,
        "progress": progress,
    }
    return as_tree(moments_of_layers(model, variables, batches, **options, earlier=earlier))


def moments_of_layers(
    model: Model,
    variables: Mapping[str, Any],
    batches: Any,
    *,
    batch_size: int | None,
    num_samples: int | None,
    method: str,
    keep_unseen: bool,
    memory_limit: int | None,
    check_independence: bool,
    progress: Progress | None,
    earlier: Any = None,
    **options: Any,
) -> dict[Path, Moments]:
    """What `population_moments` gives, by the paths of the layers.

    Args:
        model, variables, batches, batch_size, num_samples, method, keep_unseen, memory_limit, check_independence,
            progress: as there.
        earlier: moments of other data, a tree as `population_moments` gives it, which are merged with those found.
        **options: for `request`.
    """

    def prepare() -> tuple[Request, Arrays | Stream, dict[Path, Moments]]:
        data: Arrays | Stream | None = None
        first = None
        opened, held = open_model(model, variables)
        if has_other_names(held):
            first, data = open_batches(batches, batch_size, num_samples).peeked()
        asked = request(opened, held, first=first, **options)
        _check_method(method, memory_limit, options["normalization_batch"], earlier)
        if batch_size is not None or isinstance(batches, list):
            check_concrete("batches", None if isinstance(batches, Iterator) else batches)
        before = {} if earlier is None else moments_by_path(earlier, asked.wanted)
        return asked, data or open_batches(batches, batch_size, num_samples), before

    asked, data, before = on_all(prepare)
    by_device = asked.options.by_device
    with one_warning(), own_mesh(asked.options.sharding, by_device=by_device), counting(progress) as counter:
        if method == "exact":
            found = [exact_pass(asked, data, memory_limit, counter, check_independence=check_independence)]
            moments = merged_by_layer(found, asked.layers)
        else:
            found, moments = _precise_moments(asked, data, before, counter)
        moments = checked(moments, asked.wanted, keep_unseen=keep_unseen)
    warn_called_twice(found, asked.wanted)
    return moments


def _precise_moments(
    asked: Request, data: Arrays | Stream, before: dict[Path, Moments], counter: Counter
) -> tuple[list[Result], dict[Path, Moments]]:
    """What a precise pass found here, and the moments of each layer: of all processes, and of what was before."""

    def here() -> tuple[list[Result], dict[Path, Moments]]:
        found = precise_pass(asked, data, counter)
        return found, merged_by_layer(found, asked.layers)

    found, own = on_all(here)
    parts = gather(own) if jax.process_count() > 1 else [own]
    if jax.process_count() > 1 and not any(np.any(m.count > 0) for part in parts for m in part.values()):
        raise ValueError("The data must hold at least one sample: no process saw any.")
    if before:
        parts.append({path: before.get(path, _nothing(m)) for path, m in own.items()})
    return found, jax.device_get(merge(*parts)) if len(parts) > 1 else own


def _nothing(like: Moments) -> Moments:
    return Moments(*map(np.zeros_like, like))  # type: ignore[arg-type]


def _check_method(method: str, memory_limit: int | None, normalization_batch: str | int, earlier: Any) -> None:
    if method not in ("precise", "exact"):
        raise ValueError(f'`method` must be "precise" or "exact": got {method!r}.')
    check_limit(memory_limit, method)
    if earlier is not None and method != "precise":
        raise ValueError(
            '`earlier` moments can only be continued with `method="precise"`: exact moments of parts are not those of '
            "the whole, so give all data to one call."
        )
    if method == "exact" and normalization_batch != "global":
        raise ValueError(
            "Exact statistics are those of the whole set, whatever normalizes together: leave `normalization_batch` at "
            f'"global", got {normalization_batch!r}.'
        )
