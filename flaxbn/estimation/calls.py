"""The calls of the layers to estimate in a traced model, and the weights of samples there."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from flaxbn.data.batches import count_samples
from flaxbn.estimation.compiled import PassOptions, Shapes
from flaxbn.models.batch_stats import stored_layers
from flaxbn.models.entries import entries_read
from flaxbn.models.linen import check_layers, trace
from flaxbn.tracing.measure import check_values
from flaxbn.tracing.primitive import Tap
from flaxbn.tracing.program import Program


class LayerCalls(NamedTuple):
    """The taps of a program that belong to the wanted layers.

    Attributes:
        program: the traced evaluation; its arguments are the leaves of (variables, batch, rngs).
        entries: for each such tap, by its site, the numbers of the stored entries that it reads.
        batch_axes: the axis of the tap's input along which the samples lie, where weights are in use.
        present: how many samples are no padding, where there is padding.
    """

    program: Program
    entries: dict[int, np.ndarray]
    batch_axes: dict[int, int]
    present: int | None

    def check_values(self, tap: Tap) -> None:
        """A single value per channel, padding left out, is an error."""
        shape = list(tap.x.shape)
        if self.present is not None:
            shape[self.batch_axes[tap.site]] = self.present
        check_values(tap, tuple(shape))

    def weights(self, tap: Tap, weights: Array | None) -> Array | None:
        """The weights of samples, shaped to the rank of the tap's input."""
        if weights is None:
            return None
        axis = self.batch_axes[tap.site]
        return jnp.expand_dims(weights, [i for i in range(tap.x.ndim) if i != axis])


def find_calls(
    options: PassOptions, shapes: Shapes, form: Callable[[Program, Any], Program] = lambda program, args: program
) -> LayerCalls:
    """Traces the model; `form` may bring the program into another form, given its abstract arguments."""

    def traced(arguments: Any) -> Program:
        variables, batch, rngs = arguments
        program, _ = trace(options.key.model, variables, batch, options.call, rngs)
        check_layers(program, options.key.model)
        return form(program, jax.tree.leaves(arguments))

    arguments = variables, batch, rngs = shapes.abstract()
    program = traced(arguments)
    entries = entries_read(program, variables, len(jax.tree.leaves((batch, rngs))))
    layers = stored_layers(variables["batch_stats"])
    wanted = np.concatenate([np.ravel(layers.entries[path]) for path in options.wanted])
    found = {i: e for i, e in enumerate(entries) if e is not None and np.isin(e, wanted).all()}
    axes = {}
    if shapes.present is not None or options.sample_weight is not None:
        longer = traced(shapes.abstract(grow=1))
        axes = {i: _batch_axis(program, longer, i, count_samples(batch)) for i in found}
    return LayerCalls(program, found, axes, shapes.present)


def sample_weights(options: PassOptions, batch: Any, present: Any) -> Array | None:
    """The weights of a batch's samples, those of padding 0; None where there are none."""
    if options.sample_weight is None:
        return None if present is None else present.astype(jnp.float32)
    weights = jnp.asarray(options.sample_weight(batch))
    size = count_samples(batch)
    if weights.shape != (size,):
        raise ValueError(f"`sample_weight` must return one weight per sample, shape ({size},): got {weights.shape}.")
    return weights if present is None else jnp.where(present, weights, 0)


def _batch_axis(program: Program, longer: Program, site: int, size: int) -> int:
    before, after = program.tap_inputs(), longer.tap_inputs()
    if len(before) == len(after):
        changed = [i for i, (a, b) in enumerate(zip(before[site].shape, after[site].shape)) if a != b]
        if len(changed) == 1 and (before[site].shape[changed[0]], after[site].shape[changed[0]]) == (size, size + 1):
            return changed[0]
    raise ValueError(
        f"To weight samples, or pad them for `sharding`, the batch axis of each layer's input must be known: the input "
        f"of {program.layer_names()[site]} has shape {before[site].shape}, and no single axis of it has the length of "
        "the batch and grows with it. Leave the layer out by `only`, or repeat batches to give them weight."
    )
