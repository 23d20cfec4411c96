"""The calls of the layers to estimate in a traced model, and the weights of samples there."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from flaxbn.data.placement import place
from flaxbn.data.samples import common_length, count_samples, show
from flaxbn.estimation.compiled import PassOptions, Shapes
from flaxbn.models.batch_stats import stored_layers
from flaxbn.models.entries import Reading, check_own_layers, entries_read
from flaxbn.models.linen import Traced, check_layers, trace
from flaxbn.models.places import Path
from flaxbn.models.unseen import leaves_unseen
from flaxbn.models.user_functions import run_explained
from flaxbn.tracing.closed import as_arguments, with_own_constants
from flaxbn.tracing.jaxpr import structure
from flaxbn.tracing.kinds import asks_host
from flaxbn.tracing.measure import check_values, stored_statistics
from flaxbn.tracing.primitive import Tap
from flaxbn.tracing.program import Program

Form = Callable[[Program, Sequence[Any]], Program]
"""Brings a traced model into another form, given its abstract arguments."""


class Closed(NamedTuple):
    """The arrays that functions of the user close over: arguments of what is compiled, which does not hold them.

    Attributes:
        model: those of the model and `call`.
        weights: those of `sample_weight`.
        ahead: what a pass has computed of the model's variables before its loop over batches.
    """

    model: list[Array]
    weights: list[Array]
    ahead: Sequence[Array] = ()


class LayerCalls(NamedTuple):
    """The taps of a program that belong to the wanted layers: all that a pass is made from, without the model.

    Attributes:
        program: the traced evaluation; its arguments are the arrays that it closes over, then the leaves of
            (variables, batch, rngs).
        arguments: how many of each of these four there are.
        entries: for each such tap, by its site, the numbers of the stored entries that it reads.
        is_complex: for each of them, whether its input is complex, and its mean so, too.
        batch_axes: the axis of the tap's input along which the samples lie, where weights are in use.
        samples: how many a batch has, padding included; None where its arrays share no axis of samples.
        present: how many samples are no padding, where there is padding.
        weigh: the traced `sample_weight`; its arguments are the arrays that it closes over, then the batch's leaves.
        unseen: the leaves of `batch_stats` that take part, and for which no tap stands.
    """

    program: Program
    arguments: tuple[int, ...]
    entries: dict[int, np.ndarray]
    is_complex: list[bool]
    batch_axes: dict[int, int]
    samples: int | None
    present: int | None
    weigh: Program | None
    unseen: tuple[Path, ...]

    def key(self) -> Hashable:
        """Equal for calls from which equal passes are made."""
        programs = [self.program.jaxpr, *([] if self.weigh is None else [self.weigh.jaxpr])]
        entries = tuple([(site, e.shape, e.tobytes()) for site, e in self.entries.items()])
        traced = tuple([structure(jaxpr.invars, jaxpr.eqns, jaxpr.outvars) for jaxpr in programs])
        others = self.arguments, tuple(self.batch_axes.items()), self.samples, self.present, self.unseen
        return traced, entries, others

    @property
    def asks_host(self) -> bool:
        """Whether a function of the host is called: two such programs at once may wait for each other for ever."""
        return any(asks_host(program.jaxpr) for program in (self.program, self.weigh) if program is not None)

    def check_values(self, tap: Tap) -> None:
        """A single value per channel, padding left out, is an error."""
        shape = list(tap.x.shape)
        if self.present is not None:
            shape[self.batch_axes[tap.site]] = self.present
        check_values(tap, tuple(shape))

    def sample_weights(self, closed: Closed, batch: Any, present: Any) -> Array | None:
        """The weights of a batch's samples, those of padding 0; None where there are none."""
        if self.weigh is None:
            return None if present is None else present.astype(jnp.float32)
        (weights,), _ = self.weigh.run([*closed.weights, *jax.tree.leaves(batch)], stored_statistics)
        return weights if present is None else jnp.where(present, weights, 0)

    def weights(self, tap: Tap, weights: Array | None) -> Array | None:
        """The weights of samples, shaped to the rank of the tap's input."""
        if weights is None:
            return None
        axis = self.batch_axes[tap.site]
        return jnp.expand_dims(weights, [i for i in range(tap.x.ndim) if i != axis])


def as_traced(program: Program, args: Sequence[Any]) -> Program:
    """The form in which a model is traced."""
    del args
    return program


def traced(options: PassOptions, arguments: Any, form: Form) -> tuple[Traced, Program]:
    """The model, traced for these abstract (variables, batch, rngs), and its program in a form."""
    variables, batch, rngs = arguments
    found = trace(options.model, variables, batch, options.call, rngs)
    check_layers(found.program, options.model, variables)
    leaves = jax.tree.leaves(arguments)
    return found, form(with_own_constants(found.program, leaves), leaves)


def find_calls(options: PassOptions, shapes: Shapes, form: Form) -> tuple[LayerCalls, Closed]:
    """Traces the model and `sample_weight`, which are not held by what is returned."""
    arguments = variables, batch, rngs = shapes.abstract()
    whole, program = traced(options, arguments, form)
    others = len(jax.tree.leaves((batch, rngs)))
    layers = stored_layers(variables["batch_stats"], options.read)
    entries = entries_read(program, variables, others, layers)
    check_own_layers(options.model, program, entries)
    wanted = np.concatenate([np.ravel(layers.entries[path]) for path in options.wanted])
    found = {i: e for i, e in enumerate(entries) if e is not None and np.isin(e, wanted).all()}
    axes = {}
    if shapes.present is not None or options.sample_weight is not None:
        _, longer = traced(options, shapes.abstract(grow=1), form)
        axes = {i: _batch_axis(program, longer, i, count_samples(batch)) for i in found}
    inputs = program.tap_inputs()
    is_complex = [bool(jnp.issubdtype(inputs[site].dtype, jnp.complexfloating)) for site in found]
    program, closed = as_arguments(program)
    weigh, closed_by_weights = _trace_weights(options.sample_weight, batch)
    counts = (len(closed), *(len(jax.tree.leaves(tree)) for tree in arguments))
    reading = Reading(layers, entries_read(whole.program, variables, others, layers))
    not_seen = leaves_unseen(whole.program, whole.written, variables, others, reading, options.wanted)
    samples = common_length(batch)
    calls = LayerCalls(program, counts, found, is_complex, axes, samples, shapes.present, weigh, not_seen)
    return calls, Closed(*(_placed(arrays, options.sharding) for arrays in (closed, closed_by_weights)))


def _trace_weights(sample_weight: Any, batch: Any) -> tuple[Program | None, list[Any]]:
    """`sample_weight` as a program, and the arrays that it closes over."""
    if sample_weight is None:
        return None, []

    def weigh(batch: Any) -> Array:
        wanted = "`batch -> weights`, one for each sample"
        return jnp.asarray(run_explained("sample_weight", wanted, sample_weight, batch=show(batch)))

    closed = jax.make_jaxpr(weigh)(batch)
    (weights,), size = closed.out_avals, count_samples(batch)
    if weights.shape != (size,):
        raise ValueError(f"`sample_weight` must return one weight per sample, shape ({size},): got {weights.shape}.")
    program = with_own_constants(Program(closed.jaxpr, closed.consts), jax.tree.leaves(batch))
    return as_arguments(program)


def _placed(closed: Sequence[Any], sharding: NamedSharding | None) -> list[Array]:
    """Closed-over arrays where the pass can take them: in a compiled function they would lie wherever that runs."""
    arrays = [jnp.asarray(a) for a in closed]
    if sharding is not None:
        return place(arrays, sharding)

    def is_bound(a: Array) -> bool:
        is_key = jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
        return getattr(a, "committed", False) and len(a.devices()) == 1 and not is_key

    return [jnp.asarray(np.asarray(a)) if is_bound(a) else a for a in arrays]


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
