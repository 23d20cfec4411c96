"""Evaluation of a model with the statistics that the caller chooses."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array

from flaxbn.data.samples import hide
from flaxbn.models.arguments import Model, dropout_keys, open_model, takes_model
from flaxbn.models.batch_stats import select, with_wide_statistics
from flaxbn.models.entries import Reading, check_own_layers, read_layers
from flaxbn.models.linen import Call, Traced, check_layers, trace
from flaxbn.models.unseen import note, one_warning, unseen
from flaxbn.tracing.jaxpr import is_variable
from flaxbn.tracing.measure import batch_statistics, check_values, measure_tap, stored_statistics
from flaxbn.tracing.primitive import Tap


@takes_model
def apply(
    model: Model,
    variables: Mapping[str, Any],
    batch: Any,
    *,
    statistics: Literal["running", "batch"] = "running",
    call: Call | None = None,
    only: Callable[[str], bool] | None = None,
    rngs: Mapping[str, Array] | None = None,
) -> Any:
    """Evaluates any Flax model with the batch-norm statistics of your choice.

    With `statistics="batch"` every batch-norm layer, `flax.linen.BatchNorm` included, normalizes by the mean and
    variance of its own input, as in training, while all else is evaluation: dropout layers are off, nothing is mutable
    and nothing is updated. This validates a model whose running average lags, or was never updated. Works under
    `jax.jit`, `jax.grad` and `jax.vmap`.

    With `rngs={"dropout": key}` the dropout layers that draw from this collection run as `call` runs them. So
    `apply(model, variables, batch, statistics="running", call=train_call, rngs={"dropout": key})` trains with frozen
    statistics and with dropout, even a model whose one `train` flag turns both on: exactly what its own code computes
    with `use_running_average=True` in its batch-norm layers, gradients included.

    Examples:
        >>> import flax.linen as nn, flaxbn, jax, numpy as np
        >>> model = nn.BatchNorm(use_running_average=True)
        >>> x = np.float32([[1.0], [3.0]])
        >>> variables = model.init(jax.random.key(0), x)  # mean 0 and variance 1, never updated
        >>> flaxbn.apply(model, variables, x, statistics="batch").round(2).tolist()
        [[-1.0], [1.0]]
        >>> flaxbn.apply(model, variables, x).round(2).tolist()
        [[1.0], [3.0]]

    Args:
        model: the model; for one of flax.nnx, `*nnx.split(model)` stands in the place of `model, variables`.
        variables: its variables, `batch_stats` included; read only.
        batch: what `call` takes.
        statistics: "running" for the stored statistics, "batch" for those of the batch.
        call: how the model is run, `(module, batch) -> output`; by default `module(batch)`. Batch-norm layers follow
            `statistics`, whatever they are told here.
        only: `path -> bool`, the layers that take the statistics of the batch, by their paths in `batch_stats` joined
            by "/"; the others take the stored ones.
        rngs: random keys by collection, as for `model.apply`. A dropout layer runs as `call` runs it if its collection
            is among them, and is off otherwise; what else draws random numbers, attention with dropout of its own for
            example, is for `call` to turn on or off. An nnx model draws from its own streams, into which these keys are
            folded, so that each key gives other draws; it then runs in the mode in which it was split, so that
            `model.train()` turns dropout on.

    Returns:
        What `call` returns.

    Raises:
        ValueError: if `statistics` is another one; with "batch", if the model has no batch-norm layer, or a layer
            would normalize by the statistics of a single value per channel; if `only` accepts no layer, or is given
            without "batch"; if `rngs` name what nothing draws from, while dropout layers draw from another collection.
        CallError: if the model does not run on the batch, with the `call` that might.
        TypeError: if `model` is neither a `flax.linen.Module` nor split from an `nnx.Module`.

    Warns:
        UserWarning: if a layer of a class that flaxbn does not know takes part, naming what it keeps in `batch_stats`:
            one that is in training mode or, with "batch", uses what it has stored. `flaxbn.mark` and `flaxbn.recognize`
            make it known.
    """
    if statistics not in ("running", "batch"):
        raise ValueError(
            f'`statistics` must be "running" or "batch": got {statistics!r}. Those of the population are computed by '
            '`flaxbn.estimate_population_stats`: store them in the variables, where "running" reads them.'
        )
    if only is not None and statistics != "batch":
        raise ValueError(f'`only` names the layers that take the statistics of the batch: got "{statistics}" for them.')
    model, variables = open_model(model, variables, evaluates=not rngs)
    variables, keys = with_wide_statistics(variables), dropout_keys(model, variables, rngs)
    arguments = variables, hide(batch, numbers=True), keys
    traced = trace(model, *arguments[:2], call, keys, dropout=frozenset(rngs or ()))
    if rngs and isinstance(model, nn.Module):
        _check_names(traced, rngs)
    switched: set[int] = set()
    with one_warning():
        if statistics == "batch" or traced.written:
            count = len(jax.tree.leaves(arguments[1:]))
            reading = read_layers(traced.program, variables, count)
            found = unseen(traced.program, traced.written, variables, count, reading)
            note(found.written)
        if statistics == "batch":
            check_layers(traced.program, model, variables)
            check_own_layers(model, traced.program, reading.entries)
            note(found.reached)
            switched = _sites(reading, only)

    def on_tap(tap: Tap) -> Any:
        if tap.site not in switched:
            return stored_statistics(tap)
        check_values(tap, tap.x.shape)
        return *batch_statistics(tap, measure_tap(tap, None)), None

    return traced.finish(traced.program.run(jax.tree.leaves(arguments), on_tap)[0])


def _check_names(traced: Traced, rngs: Mapping[str, Array]) -> None:
    """A misspelled collection would turn dropout off without a word: an error, where nothing draws from it."""
    jaxpr = traced.program.jaxpr
    used = {v for eqn in jaxpr.eqns for v in eqn.invars if is_variable(v)} | {*filter(is_variable, jaxpr.outvars)}
    leaves = jax.tree.leaves({name: name for name in rngs})  # in the order in which keys are arguments, the last ones
    idle = [name for name, v in zip(leaves, jaxpr.invars[-len(leaves) :]) if v not in used]
    if idle and traced.silenced:
        raise ValueError(
            f"`rngs` must name what the model draws from: nothing draws from {idle}, and dropout layers that draw from "
            f"{sorted(traced.silenced)} are off without a key for that. Give them one, or leave `rngs` out."
        )


def _sites(reading: Reading, only: Callable[[str], bool] | None) -> set[int]:
    """The taps of the layers that `only` accepts."""
    wanted = [np.ravel(entries) for entries in select(reading.layers, only).entries.values()]
    accepted = np.concatenate([np.zeros(0, int), *wanted])
    return {site for site, e in enumerate(reading.entries) if e is not None and np.isin(e, accepted).all()}
