"""One pass over batches with the weights frozen: each layer normalizes by its own batch, the moments are merged."""

import functools
import inspect
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from flaxbn import batches as data
from flaxbn import linen, observe, stored
from flaxbn.moments import Moments, measure_shared, merge_along
from flaxbn.observe import Call, Tap
from flaxbn.sharing import Sharing

_CHUNK = 256
_CHUNK_BYTES = 2**26
_AHEAD = 2


class Key:
    """A model as a key of compiled passes: by value where it can be hashed, by identity where it cannot."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        try:
            self._hash = hash(model)
            self.by_value = True
        except TypeError:
            self._hash = id(model)
            self.by_value = False

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Key):
            return NotImplemented
        if self.model is other.model:
            return True
        return self.by_value and other.by_value and type(self.model) is type(other.model) and self.model == other.model


class Setting(NamedTuple):
    """What a compiled pass depends on, besides shapes."""

    key: Key
    call: Call
    sample_weight: Callable[[Any], Array] | None
    wanted: frozenset[stored.Path]
    sharding: NamedSharding | None
    options: tuple[Any, ...]


def stored_statistics(tap: Tap) -> tuple[Array, Array, None]:
    """Reads a layer's stored statistics, and records nothing."""
    return tap.mean, tap.var, None


def batch_statistics(tap: Tap, weights: Array | None) -> tuple[Array, Array, Moments]:
    """The moments of the tap's input; where their count is 0, the layer normalizes by what is stored."""
    values = math.prod(tap.x.shape[tap.lanes + axis] for axis in tap.axes)
    if tap.axis_name is not None:
        values *= linen.members(tap.axis_name, tap.axis_index_groups)
    if values == 1:
        raise ValueError(
            f"{tap.layer} normalizes by batch statistics, which needs more than one value per channel: got an input "
            f"of shape {tap.x.shape} reduced over axes {tap.axes}. Use a larger batch, or drop a last batch of one."
        )
    if weights is None:
        weights = tap.weights
    elif tap.weights is not None:
        weights = weights * tap.weights
    moments = _measure(tap, weights)
    seen = moments.count > 0
    return jnp.where(seen, moments.mean, tap.mean), jnp.where(seen, moments.var, tap.var), moments


def _measure(tap: Tap, weights: Array | None) -> Moments:
    def measured(x: Array, weights: Array | None, domain: Array | None) -> Moments:
        options = {"weights": weights, "axis_name": tap.axis_name, "axis_index_groups": tap.axis_index_groups}
        if domain is None:
            return measure_shared(x, Sharing(tap.axes), **options)
        num_domains = tap.mean.shape[tap.lanes]
        if domain.ndim == 0 and tap.axis_name is not None:
            domain = jnp.broadcast_to(domain, x.shape[:1])
        if domain.ndim:
            return measure_shared(x, Sharing(tap.axes, domain, num_domains), **options)
        row = measure_shared(x, Sharing(tap.axes), **options)
        return Moments(*(jnp.zeros((num_domains, *a.shape), a.dtype).at[domain].set(a, mode="drop") for a in row))

    for _ in range(tap.lanes):
        measured = jax.vmap(measured)
    if weights is not None:
        weights = jnp.broadcast_to(weights, (*tap.x.shape[: tap.lanes], *weights.shape[tap.lanes :]))
    return measured(tap.x, weights, tap.domain)


class _Shapes(NamedTuple):
    """The structure and the leaves' shapes of (variables, batch, rngs), as a key."""

    structure: Any
    leaves: tuple[tuple[tuple[int, ...], Any], ...]
    padded: bool

    def abstract(self, *, grow: int = 0) -> Any:
        """The arguments as abstract arrays, the batch longer by `grow` samples."""
        leaves = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in self.leaves]
        variables, batch, rngs = jax.tree.unflatten(self.structure, leaves)
        batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct((a.shape[0] + grow, *a.shape[1:]), a.dtype), batch)
        return variables, batch, rngs


def _shapes(variables: Any, batch: Any, rngs: Any, *, padded: bool) -> _Shapes:
    leaves, structure = jax.tree.flatten((variables, batch, rngs))
    return _Shapes(structure, tuple((a.shape, a.dtype) for a in leaves), padded)


class Pass:
    """The compiled pass over batches of one shape."""

    def __init__(self, setting: Setting, shapes: _Shapes) -> None:
        self.setting = setting
        variables, batch, rngs = shapes.abstract()
        self.program, _ = observe.trace(setting.key.model, variables, batch, setting.call, rngs)
        check_layers(self.program, setting.key.model)
        entries = stored.entries_read(self.program, variables, len(jax.tree.leaves((batch, rngs))))
        layers = stored.stored_layers(variables["batch_stats"])
        wanted = np.concatenate([np.ravel(layers.entries[path]) for path in setting.wanted])
        found = {i: e for i, e in enumerate(entries) if e is not None and np.isin(e, wanted).all()}
        self.sites, self.entries = list(found), list(found.values())
        channels = sum(e.size for e in self.entries)
        self.chunk = min(_CHUNK, max(1, _CHUNK_BYTES // (12 * max(channels, 1))))
        self.batch_axes: dict[int, int] = {}
        if shapes.padded or setting.sample_weight is not None:
            size = data.count_samples(batch)
            variables, batch, rngs = shapes.abstract(grow=1)
            longer, _ = observe.trace(setting.key.model, variables, batch, setting.call, rngs)
            self.batch_axes = {i: _batch_axis(self.program, longer, i, size) for i in self.sites}
        self.scan = jax.jit(self._scan)
        self.step = jax.jit(self._step, donate_argnums=0)
        self.merge = jax.jit(_merge_steps)

    def zeros(self, *args: Any) -> list[Moments]:
        """Room for the moments of a chunk of batches: zeros, which merging ignores."""
        shapes = jax.eval_shape(self._moments, *args)
        return jax.tree.map(lambda s: jnp.zeros((self.chunk, *s.shape), s.dtype), shapes)

    def _moments(self, variables: Any, rngs: Any, batch: Any, present: Any, step: Any) -> list[Moments]:
        weights = self._weights(batch, present)
        rngs = jax.tree.map(lambda key: jax.random.fold_in(key, step), rngs)
        leaves = jax.tree.leaves((variables, batch, rngs))
        _, records = self.program.run(leaves, functools.partial(self._on_tap, weights))
        return [record for record in records if record is not None]

    def _on_tap(self, weights: Array | None, tap: Tap) -> tuple[Array, Array, Moments | None]:
        if tap.site not in self.sites:
            return stored_statistics(tap)
        if weights is not None:
            axis = self.batch_axes[tap.site]
            weights = jnp.expand_dims(weights, [i for i in range(tap.x.ndim) if i != axis])
        return batch_statistics(tap, weights)

    def _weights(self, batch: Any, present: Any) -> Array | None:
        if self.setting.sample_weight is None:
            return None if present is None else present.astype(jnp.float32)
        weights = jnp.asarray(self.setting.sample_weight(batch))
        size = data.count_samples(batch)
        if weights.shape != (size,):
            raise ValueError(
                f"`sample_weight` must return one weight per sample, shape ({size},): got {weights.shape}."
            )
        return weights if present is None else jnp.where(present, weights, 0)

    def _scan(
        self, variables: Any, rngs: Any, arrays: Any, rows: Array, present: Any, first: Any
    ) -> tuple[list[Moments], Array]:
        def step(k: Array, row: Array) -> tuple[Array, list[Moments]]:
            batch = jax.tree.map(lambda a: jnp.take(a, row, axis=0), arrays)
            if self.setting.sharding is not None:
                batch = jax.lax.with_sharding_constraint(batch, self.setting.sharding)
            return k + 1, self._moments(variables, rngs, batch, present, k)

        _, steps = jax.lax.scan(step, first, rows)
        return _merge_steps(steps)

    def _step(
        self, buffer: list[Moments], slot: Any, variables: Any, rngs: Any, batch: Any, present: Any, step: Any
    ) -> tuple[list[Moments], Array]:
        moments = self._moments(variables, rngs, batch, present, step)
        return jax.tree.map(lambda b, m: b.at[slot].set(m), buffer, moments), step + 1


def _merge_steps(steps: list[Moments]) -> tuple[list[Moments], Array]:
    """The moments of all steps merged; and for each tap the first step whose moments are not finite, or -1."""

    def first_bad(moments: Moments) -> Array:
        finite = jnp.isfinite(moments.mean) & jnp.isfinite(moments.var)
        finite = jnp.all(finite.reshape(len(finite), -1), 1)
        return jnp.where(jnp.all(finite), -1, jnp.argmin(finite))

    return [merge_along(m) for m in steps], jnp.asarray([first_bad(m) for m in steps])


def _batch_axis(program: observe.Program, longer: observe.Program, site: int, size: int) -> int:
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


def check_layers(program: observe.Program, model: nn.Module) -> None:
    """A traced model without batch-norm layers is an error."""
    if not program.tap_inputs():
        raise ValueError(
            f"`model` must run a batch-norm layer (flax.linen.BatchNorm, flaxbn.BatchNorm or flaxbn.BatchRenorm, or a "
            f"subclass): {type(model).__name__} ran none in `call`."
        )


@functools.lru_cache(maxsize=16)
def _cached_pass(setting: Setting, shapes: _Shapes) -> Pass:
    return Pass(setting, shapes)


class _Passes(dict[_Shapes, Pass]):
    """The compiled passes of one estimate by shape; they outlive it only if nothing in `setting` can change."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        functions = (setting.call, setting.sample_weight)
        self._lasting = setting.key.by_value and not any(inspect.ismethod(f) for f in functions)

    def __missing__(self, shapes: _Shapes) -> Pass:
        self[shapes] = _cached_pass(self._setting, shapes) if self._lasting else Pass(self._setting, shapes)
        return self[shapes]


class Result(NamedTuple):
    """The merged moments of a chunk of batches, on the device; and for each tap which of `steps` is not finite."""

    source: Pass
    steps: Sequence[int]
    moments: list[Moments]
    first_bad: Array


def pass_over_arrays(setting: Setting, variables: Any, rngs: Any, arrays: Any, batch_size: int) -> list[Result]:
    """The moments of arrays in strided batches, by scans on the device."""
    groups = data.strided_rows(data.count_samples(arrays), batch_size)
    arrays = jax.tree.map(jnp.asarray, arrays)
    if setting.sharding is not None:
        arrays = jax.device_put(arrays, replicated(setting.sharding))
    passes = _Passes(setting)
    results, first = [], 0
    for rows in groups:
        present = data.padding(rows.shape[1], data.shards(setting.sharding))
        if present is not None:
            rows = np.pad(rows, ((0, 0), (0, len(present) - rows.shape[1])), mode="edge")
        batch = jax.tree.map(lambda a, n=rows.shape[1]: jax.ShapeDtypeStruct((n, *a.shape[1:]), a.dtype), arrays)
        source = passes[_shapes(variables, batch, rngs, padded=present is not None)]
        for chunk in np.array_split(rows, -(-len(rows) // source.chunk)):
            steps = range(first, first + len(chunk))
            results.append(Result(source, steps, *source.scan(variables, rngs, arrays, chunk, present, first)))
            first += len(chunk)
    return results


def pass_over_stream(setting: Setting, variables: Any, rngs: Any, batches: Iterable[Any]) -> list[Result]:
    """The moments of a stream of batches; nothing is read back from the device."""
    passes = _Passes(setting)
    results: list[Result] = []
    buffers: dict[Pass, list[Moments]] = {}
    steps: dict[Pass, list[int]] = {}
    ahead: deque[Any] = deque()

    def flush(source: Pass) -> None:
        results.append(Result(source, steps.pop(source), *source.merge(buffers.pop(source))))

    for step, batch in enumerate(batches):
        batch, present = _placed(batch, setting.sharding)
        source = passes[_shapes(variables, batch, rngs, padded=present is not None)]
        args = (variables, rngs, batch, present, step)
        if source not in buffers:
            buffers[source], steps[source] = source.zeros(*args), []
        buffers[source], done = source.step(buffers[source], len(steps[source]), *args)
        steps[source].append(step)
        if len(steps[source]) == source.chunk:
            flush(source)
        ahead.append(done)
        if len(ahead) > _AHEAD:
            jax.block_until_ready(ahead.popleft())
    for source in list(buffers):
        flush(source)
    return results


def _placed(batch: Any, sharding: NamedSharding | None) -> tuple[Any, np.ndarray | None]:
    """A batch on the device or devices, padded to what divides, and which of its samples are present."""
    if sharding is None:
        return jax.tree.map(jnp.asarray, batch), None
    size = data.count_samples(batch)
    present = data.padding(size, data.shards(sharding))
    if present is not None:
        rows = np.minimum(np.arange(len(present)), size - 1)
        batch = jax.tree.map(lambda a: np.asarray(a)[rows], batch)
    return jax.device_put(batch, sharding), present


def replicated(sharding: NamedSharding) -> NamedSharding:
    """The sharding of what all devices of `sharding` hold in whole."""
    return NamedSharding(sharding.mesh, PartitionSpec())
