"""The statistics of a population: one pass over data with the weights frozen."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from flaxbn.arithmetic.moments import Moments, is_moments, merge
from flaxbn.data.progress import Progress
from flaxbn.estimation.population_moments import moments_of_layers
from flaxbn.models.arguments import Model, open_model, takes_model
from flaxbn.models.batch_stats import as_tree, by_path, replace_layers, replace_statistics
from flaxbn.models.leaves import named_leaves
from flaxbn.models.linen import Call
from flaxbn.models.places import Path, places_of


@takes_model
def estimate_population_stats(
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
) -> Any:
    """The population statistics of all batch-norm layers, from one pass over data with the weights frozen.

    With `method="precise"` each layer normalizes by the statistics of its own batch, and the moments of all batches
    are merged exactly, by the law of total variance (PreciseBN; Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm",
    section 3):

        mean = sum_k n_k mean_k / n        var = sum_k n_k (var_k + |mean_k - mean|^2) / n

    with `n_k` positions in batch k, the last and smaller one included. The first layer's statistics do not depend on
    the batch size; those of deeper layers do, by about 1/B for each level, since the layers above normalize by the
    batch.

    With `method="exact"` each layer normalizes by the merged statistics of all batches: the result is that of the whole
    set as one batch, whatever the batch size, the order and the devices. All batches are taken through one layer after
    the other, one forward pass in all; what later layers need of all batches is kept, as far as `memory_limit` allows,
    and computed again beyond (`flaxbn.plan` tells beforehand). Loops with layers inside are unrolled, up to 512 calls.
    Examples must not affect each other, but through batch normalization: the result is checked for it on one batch,
    unless `call` draws random numbers.

    With several processes (`jax.distributed`) each passes its own part of the data, of any length, even none. All call
    the function, and get the same statistics, those of all data: a precise pass merges once, at its end, an exact one
    once for each call of a layer. Where one process raises, all do.

    Works on any Flax model, of Linen or nnx: `BatchNorm` of Flax and its subclasses, that of flaxbn, and `BatchRenorm`,
    which counts as plain batch normalization. A model of flax.nnx is evaluated as after `model.eval()`, by a copy; it
    stays as it is, and takes the result over by `nnx.update(model, stats)`.

    What is compiled is used again where the model, `call`, `sample_weight`, the layers that `only` accepts and all
    shapes are the same by value: with lists and configuration objects in fields, partials, and lambdas written anew.
    What may change unseen (callable objects, bound methods, arrays of jax and large ones, iterators; everything while
    an interceptor of Flax is active) is traced in each call, and compiled only where the traced program is another one:
    with another Python number in a closure it is, with another array of the same shape it is not. Globals that
    functions at module level read, and attributes of classes, must not change, as for `jax.jit`.

    Args:
        model: the model; for one of flax.nnx, `*nnx.split(model)` stands in the place of `model, variables`.
        variables: its variables; read only.
        batches: with `batch_size`, a pytree of arrays with a common leading sample axis; otherwise an iterable of
            batches, which is read once; numpy arrays are copied as they come. Such a batch is a pytree of anything:
            graphs with arrays of nodes and of edges, keys, names. Only `num_samples`, `sample_weight` and `sharding`
            ask for a common sample axis. What is no array or number, a name say, is part of what is compiled, and
            traced for each value. (Exact statistics hold all batches, until they are kept in another form.)
        call: how the model is run for evaluation, `(module, batch) -> anything`; by default `module(batch)`.
            Dropout layers are off; dropout inside other layers, attention for example, is for `call` to turn off.
        batch_size: the largest number of samples in a batch, of which there are `K = ceil(n / batch_size)`; batch k
            is `x[k::K]`. The precise pass is a scan on the device; the exact one leaves arrays where they are.
        num_samples: use this many samples: of arrays evenly spaced ones, of an iterable the first.
        method: "precise" or "exact", as described above.
        sample_weight: `batch -> (B,)`, the weights of the samples, in statistics and normalization alike. A sample
            whose weight is not positive takes no part, whatever it holds. Layers must keep the samples in the order of
            the batch. With a `normalization_batch` other than "global" it is called with each group of samples that
            normalizes by itself: let the weight of a sample not depend on the others.
        only: `path -> bool`, the layers to estimate, by their paths in `batch_stats` joined by "/". The others keep
            and use their stored statistics.
        keep_unseen: leave what saw no data, a domain for example, with its stored statistics, where it is an error
            otherwise.
        memory_limit: for `method="exact"`, how many bytes of live values each device may keep; by default half of its
            free memory where it tells it, otherwise any number.
        sharding: how each batch lies on devices, for example `flaxbn.data_sharding()`; by default where the data is.
            What does not divide is padded with samples of weight 0, which models that mix the samples of a batch would
            see. Variables that lie on the same mesh stay as they are, split over model axes for example; others are
            held whole by each device. It must lie on devices of this process.
        normalization_batch: which samples normalize together in a precise pass: "global", the whole batch, over all
            devices; or "device", each device's part of it by itself, as in a training under `jax.pmap` without
            `axis_name`, for statistics that are to resemble those that the weights were trained with. There is then
            no communication between devices until the end of the pass. Or a number: so many consecutive samples of a
            batch by themselves, as in training with `virtual_batch_size`; what is left at its end is a smaller group.
        rngs: random keys that `call` needs; each batch gets its own.
        check_independence: for `method="exact"`, check on one batch that examples do not affect each other; it costs
            little, and without it a model that mixes them gets statistics that depend on the batch size after all.
            Batches without a sample axis cannot be checked, which is a warning.
        progress: `(done, total)`, called now and then, at first with 0 done and at last with all: batches of a precise
            pass, and of an exact one batches (of arrays pieces) times calls of layers; `total` is None while it is not
            known. `flaxbn.progress_bar()` shows it.

    Returns:
        A new `batch_stats`: `mean` and `var` of the layers replaced, all else, structure, container types, dtypes and
        metadata, as it was.

    Raises:
        CallError: if the model does not run on a batch, with the `call` that might.
        TypeError: if `model` is neither a `flax.linen.Module` nor split from an `nnx.Module`, or `batches`
            does not fit `batch_size`.
        ValueError: if there is no batch-norm layer; a layer saw no data; the data is empty or has fewer samples than
            `num_samples`; statistics are not finite; a layer has one value per channel in a batch of a precise pass,
            by its shape or by what masks, domains or weights leave; a layer lies inside a
            `while` loop or `shard_map`; or, with `sample_weight`, the batch axis of a layer's input is not known. With
            `method="exact"` also if a layer lies inside a `cond` that data or variables decide, or the model mixes the
            examples of a batch.

    Warns:
        UserWarning: if a layer is called more than once in a forward pass: its calls are merged, though no single
            pair of statistics can normalize each of them; or if batches without a sample axis cannot be checked. If
            a layer of a class that flaxbn does not know takes part with what it has stored, or is in training mode:
            it names what such layers keep in `batch_stats`. `flaxbn.mark` and `flaxbn.recognize` make them known.

    Examples:
        >>> import flax.linen as nn, flaxbn, jax, numpy as np
        >>> model = nn.BatchNorm(use_running_average=True)
        >>> images = np.arange(12, dtype=np.float32).reshape(6, 2)
        >>> variables = model.init(jax.random.key(0), images)
        >>> stats = flaxbn.estimate_population_stats(model, variables, images, batch_size=2)
        >>> stats["mean"].tolist()
        [5.0, 6.0]
        >>> predictions = model.apply({**variables, "batch_stats": stats}, images)
        >>> abs(float(predictions.mean())) < 1e-6
        True
    """
    model, variables = open_model(model, variables)
    moments = moments_of_layers(
        model,
        variables,
        batches,
        call=call,
        batch_size=batch_size,
        num_samples=num_samples,
        method=method,
        sample_weight=sample_weight,
        only=only,
        keep_unseen=keep_unseen,
        memory_limit=memory_limit,
        sharding=sharding,
        normalization_batch=normalization_batch,
        rngs=rngs,
        check_independence=check_independence,
        progress=progress,
    )
    return replace_layers(variables["batch_stats"], moments, keep_unseen=keep_unseen)


def to_batch_stats(moments: Any, batch_stats: Any, *, keep_unseen: bool = False) -> Any:
    """Statistics from moments: `batch_stats` with the `mean` and `var` of the layers in `moments` replaced.

    Args:
        moments: a tree as `population_moments` returns, or several merged by `flaxbn.merge`.
        batch_stats: the tree to take everything else from: structure, container types, dtypes, metadata, other layers.
        keep_unseen: keep the old statistics of channels whose count is 0, where it is an error otherwise.

    Raises:
        ValueError: if `moments` does not fit `batch_stats`, or a channel saw no data.
        TypeError: if a mean is complex and the stored one is real.

    Examples:
        >>> import flax.linen as nn, flaxbn, jax, numpy as np
        >>> model = nn.BatchNorm(use_running_average=True)
        >>> images = np.arange(12, dtype=np.float32).reshape(6, 2)
        >>> variables = model.init(jax.random.key(0), images)
        >>> moments = flaxbn.population_moments(model, variables, images, batch_size=2)
        >>> flaxbn.to_batch_stats(moments, variables["batch_stats"])["mean"].tolist()
        [5.0, 6.0]
    """
    return replace_statistics(batch_stats, moments, keep_unseen=keep_unseen)


def blend(
    batch_stats: Any,
    moments: Any,
    *,
    prior: float,
    samples: int,
    variance: Literal["average", "total"] = "average",
) -> Any:
    """Statistics between those of a model and those of a few examples of other data, to adapt it at test time.

    As if the stored statistics came from `prior` examples of the old data, beside `samples` of the new:

        w = samples / (prior + samples)
        mean = (1 - w) mean_old + w mean_new        var = (1 - w) var_old + w var_new

    (Schneider et al. 2020, "Improving robustness against common corruptions by covariate shift adaptation", section 3).
    With `variance="total"` the variance is that of both data together, `w (1 - w) |mean_new - mean_old|^2` more. The
    paper's is smaller where the data differ: it is between the two variances, and not that of a mixture.

    `prior=0` gives the statistics of the new data, a large one those of the model. The more examples there are, the
    less a prior is worth: the paper finds one of a few to a few dozen times the examples best for single batches.

    Args:
        batch_stats: the stored statistics.
        moments: those of the new examples, a tree as `population_moments` returns; layers that are not in it, and
            channels that saw nothing, stay as they are.
        prior: how many examples the stored statistics count as, 0 or more.
        samples: how many examples the moments come from (their `count` is of positions, not of examples).
        variance: "average", the paper's, or "total".

    Returns:
        A `batch_stats` tree like the old one.

    Raises:
        ValueError: if a number is negative or both are 0, or `moments` do not fit.

    Examples:
        >>> import flax.linen as nn, flaxbn, jax, numpy as np
        >>> model = nn.BatchNorm(use_running_average=True)
        >>> new = np.float32([[2], [6]])
        >>> variables = model.init(jax.random.key(0), new)  # mean 0, variance 1
        >>> moments = flaxbn.population_moments(model, variables, new, batch_size=2)  # mean 4, variance 4
        >>> blended = flaxbn.blend(variables["batch_stats"], moments, prior=6, samples=2)
        >>> blended["mean"].item(), blended["var"].item()
        (1.0, 1.75)
        >>> flaxbn.blend(variables["batch_stats"], moments, prior=6, samples=2, variance="total")["var"].item()
        4.75
    """
    if not (prior >= 0 and samples >= 0 and prior + samples > 0):
        raise ValueError(
            f"`prior` and `samples` must be 0 or more, and one of them positive: got {prior} and {samples}."
        )
    if variance not in ("average", "total"):
        raise ValueError(f'`variance` must be "average" or "total": got {variance!r}.')
    stored = named_leaves(batch_stats)

    def blended(path: Path, new: Moments) -> Moments:
        mean, var = (np.asarray(stored.get(place)) for place in places_of(path, stored) or ((), ()))
        if not is_moments(new) or mean.shape != np.shape(new.mean):
            return new  # it does not fit: an error, which names it
        weights = (np.full(var.shape, weight, np.float64) for weight in (prior, samples))
        parts = [Moments(*fields) for fields in zip(weights, (mean, new.mean), (var, new.var))]  # type: ignore[arg-type]
        merged = merge(*parts)
        within = sum(part.count * part.var for part in parts) / merged.count
        return Moments(new.count, merged.mean, merged.var if variance == "total" else within)

    found = {path: blended(path, new) for path, new in by_path(moments).items()}
    return replace_statistics(batch_stats, as_tree(found), keep_unseen=True)
