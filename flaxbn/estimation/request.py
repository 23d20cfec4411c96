"""What a user asks to be estimated, checked and made ready for any method."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
from jax.sharding import NamedSharding
from jaxtyping import Array

from flaxbn.data.placement import on_accelerator, on_device, place, with_auto_axes
from flaxbn.estimation.compiled import PassOptions
from flaxbn.models.arguments import Model, check_concrete, model_class, open_model, random_keys
from flaxbn.models.batch_stats import StoredLayers, select, stored_layers, with_wide_statistics
from flaxbn.models.entries import candidates_in, pairs_read
from flaxbn.models.keys import fold_in
from flaxbn.models.linen import Call, trace
from flaxbn.models.places import Pair
from flaxbn.models.unseen import what_is_held


class Request(NamedTuple):
    """The checked arguments of an estimate, but for the data.

    Attributes:
        options: what the compiled pass depends on, besides shapes.
        variables: on the devices, the statistics in float32 or wider.
        rngs: on the devices.
        layers: all layers that have stored statistics.
        wanted: those to estimate.
    """

    options: PassOptions
    variables: dict[str, Any]
    rngs: dict[str, Any]
    layers: StoredLayers
    wanted: StoredLayers


def request(
    model: Model,
    variables: Mapping[str, Any],
    *,
    call: Call | None,
    sample_weight: Callable[[Any], Array] | None,
    only: Callable[[str], bool] | None,
    sharding: NamedSharding | None,
    rngs: Mapping[str, Array] | None,
    normalization_batch: str | int = "global",
    first: Any = None,
) -> Request:
    """Checks the arguments and brings the variables to where the batches will lie.

    Args:
        model, variables, call, sample_weight, only, sharding, rngs, normalization_batch: those of an estimate, as the
            user gave them.
        first: the first batch as shapes and dtypes, where `has_other_names` says that it matters.
    """
    model, variables = open_model(model, variables)
    _check_variables(variables, rngs)
    read = () if first is None else _read_under_other_names(model, variables, first, call, rngs)
    layers = stored_layers(variables["batch_stats"], read)
    if not layers.entries:
        _raise_without_layers(variables, model)
    wanted = select(layers, only)
    _check_normalization_batch(normalization_batch, sharding)
    sharding = sharding and with_auto_axes(sharding)
    arrays, keys = on_device((dict(variables), random_keys(model, variables, rngs)))
    options = PassOptions(
        model=model,
        call=call,
        sample_weight=sample_weight,
        wanted=frozenset(wanted.entries),
        read=read,
        sharding=sharding,
        by_device=normalization_batch == "device",
        group=None if isinstance(normalization_batch, str) else int(normalization_batch),
        on_accelerator=on_accelerator(arrays["batch_stats"]),
        tracing=tracing_options(),
    )
    if jax.process_count() > 1:
        keys = fold_in(keys, jax.process_index())
    arrays = dict(with_wide_statistics(arrays))
    if sharding is not None:
        arrays, keys = place((arrays, keys), sharding)
    return Request(options, arrays, keys, layers, wanted)


def _check_variables(variables: Mapping[str, Any], rngs: Mapping[str, Array] | None) -> None:
    _check_batch_stats(variables)
    check_concrete("variables", variables)
    check_concrete("rngs", rngs)


def _check_normalization_batch(normalization_batch: Any, sharding: NamedSharding | None) -> None:
    is_size = hasattr(normalization_batch, "__index__") and not isinstance(normalization_batch, bool)
    is_word = isinstance(normalization_batch, str) and normalization_batch in ("global", "device")
    if not is_word and not (is_size and normalization_batch >= 1):
        raise ValueError(
            f'`normalization_batch` must be "global", "device", or a positive integer: got {normalization_batch!r}. An '
            "integer stands for so many consecutive samples, each group of which normalizes by itself."
        )
    if normalization_batch == "device" and sharding is None:
        raise ValueError(
            'With `normalization_batch="device"` each device normalizes by its own part of a batch: say by `sharding` '
            "how batches are split, for example `sharding=flaxbn.data_sharding()`."
        )
    if sharding is not None and not sharding.is_fully_addressable:
        raise ValueError(
            "`sharding` must lie on devices of this process, each of which reads its own part of the data and merges "
            "at the end: use `flaxbn.data_sharding()`."
        )


def tracing_options() -> tuple[Any, ...]:
    """What decides how jax traces, besides shapes."""
    names = (
        "jax_enable_x64",
        "jax_default_matmul_precision",
        "jax_numpy_dtype_promotion",
        "jax_threefry_partitionable",
        "jax_default_prng_impl",
    )
    return tuple(getattr(jax.config, name) for name in names)


def has_other_names(variables: Any) -> bool:
    """Whether statistics may have names that nobody would know: only a traced model tells whether it reads them."""
    return isinstance(variables, Mapping) and bool(candidates_in(variables.get("batch_stats", {})))


def _read_under_other_names(
    model: Model, variables: Mapping[str, Any], batch: Any, call: Call | None, rngs: Mapping[str, Array] | None
) -> tuple[Pair, ...]:
    abstracted = dict(with_wide_statistics(jax.eval_shape(lambda tree: tree, dict(variables))))
    program = trace(model, abstracted, batch, call, dict(rngs or {})).program
    return tuple(pairs_read(program, abstracted, len(jax.tree.leaves((batch, rngs)))))


def check_stored(variables: Any, model: Model) -> None:
    """Without anything that could be a layer's statistics there is nothing to look at: an error."""
    _check_batch_stats(variables)
    if not stored_layers(variables["batch_stats"]).entries and not has_other_names(variables):
        _raise_without_layers(variables, model)


def _raise_without_layers(variables: Any, model: Model) -> NoReturn:
    raise ValueError(
        f"`batch_stats` must hold the 'mean' and 'var' of a batch-norm layer: that of {model_class(model).__name__} "
        f"has none. {what_is_held(variables)}"
    )


def _check_batch_stats(variables: Any) -> None:
    if not isinstance(variables, Mapping) or "batch_stats" not in variables:
        received = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(
            f"`variables` must hold the collection 'batch_stats': got {received}. Pass what `model.init` returned, or "
            '`{"params": params, "batch_stats": batch_stats}`; a model without batch normalization has none.'
        )
