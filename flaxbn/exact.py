"""The statistics of the whole set as one batch: all batches go through one layer after the other.

Every batch is taken up to the input of a layer, the moments of all batches are merged, and every batch goes on with
the merged statistics. That is the limit of precise statistics as the batch grows to the whole set, in one forward pass.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from flaxbn import batches as data
from flaxbn import mesh, probe, stored
from flaxbn.hosts import together
from flaxbn.lockstep import Batch, run
from flaxbn.naming import layer_name
from flaxbn.observe import Call
from flaxbn.planning import Plan, make_plan
from flaxbn.request import Request, request
from flaxbn.results import Result, check_finite
from flaxbn.segments import Segments
from flaxbn.setting import Compiled, shapes_of

Source = tuple[Any, Callable[[], Any]]
"""The shapes of a batch, and what reads it."""


def plan(
    model: nn.Module,
    variables: Mapping[str, Any],
    batches: Any,
    *,
    call: Call | None = None,
    batch_size: int | None = None,
    num_samples: int | None = None,
    sample_weight: Callable[[Any], Array] | None = None,
    only: Callable[[str], bool] | None = None,
    memory_limit: int | None = None,
    sharding: NamedSharding | None = None,
    rngs: Mapping[str, Array] | None = None,
) -> Plan:
    """What `estimate_population_stats(..., method="exact")` will keep and compute, before any data is read.

    The arguments are those of the estimate, which raises the same errors about the model. Values that later layers
    need are kept, of all batches, where they fit `memory_limit`; where they do not, later layers compute them again
    from the last place where they did.

    Args:
        batches: with `batch_size`, a pytree of arrays; otherwise a list of batches, or an iterable with a length, of
            which the first batch is read and the others are taken to be like it.
        memory_limit: how many bytes of these values each device may keep; by default half of its free memory where
            the device tells it, and any number elsewhere (on CPUs).

    Returns:
        The plan; `print` shows it as a table.

    Raises:
        TypeError: if `batches` is an iterator, whose length is not known; or as the estimate.
        ValueError: if the model has no batch-norm layer, or one inside a `while` loop, inside a `cond` that data or
            variables decide, or inside `shard_map`; more than 512 calls; with weights, an unknown batch axis.
    """
    data.check_arrays(batches, batch_size)
    data.check_positive("batch_size", batch_size)
    data.check_positive("num_samples", num_samples)
    check_limit(memory_limit, "exact")
    asked = request(model, variables, call=call, sample_weight=sample_weight, only=only, sharding=sharding, rngs=rngs)
    if batch_size is None:
        known = data.known_batches(batches, num_samples)
    else:
        rows = data.strided_rows(data.chosen_samples(batches, num_samples), batch_size)
        known = [data.abstract(batches, len(row)) for group in rows for row in group]
    with mesh.own_mesh(asked.setting.sharding, by_device=asked.setting.by_device):
        return _plan(asked, _compile(asked, [(shape, lambda: None) for shape in known]), memory_limit)


def check_limit(memory_limit: Any, method: str) -> None:
    """A memory limit is a number of bytes, and for exact statistics."""
    data.check_positive("memory_limit", memory_limit)
    if memory_limit is not None and method != "exact":
        raise ValueError(f'`memory_limit` is for `method="exact"`, which keeps values of all batches: got {method!r}.')


def exact_pass(asked: Request, read: Callable[[], list[Source]], memory_limit: int | None) -> Result:
    """The exact moments of the batches that `read` describes, merged over all processes for each call."""
    batches: list[Batch] = []
    watched: list[int] = []

    def prepare() -> np.ndarray:
        batches.extend(_compile(asked, read()))
        if len(batches) == 1 == jax.process_count():
            for segment in batches[0].segments.segments:
                segment.check_values()
        watched.extend(probe.watched(asked, batches))
        return _signature(batches)

    calls = _agreed(together(prepare))
    kept = [call.kept for call in _plan(asked, batches, memory_limit).calls] if batches else [True] * calls
    found = run(asked, batches, kept, watched)
    entries = batches[0].segments.entries if batches else [stored.all_entries(asked.layers)] * calls
    result = Result(entries, range(len(batches)), found.moments, jnp.asarray(found.first_bad))

    def finite() -> np.ndarray:
        check_finite([result], asked.layers)
        return np.zeros(())

    def independent() -> np.ndarray:
        if watched and not batches[0].segments.uses_keys:
            probe.check_independence(asked, [batches[number] for number in watched], found)
        return np.zeros(())

    together(finite)
    together(independent)
    return result


def held(batches: Iterable[Any]) -> list[Source]:
    """Batches that stay where they are until they are needed."""
    return [(data.abstract(batch), partial(lambda batch: batch, batch)) for batch in batches]


def cut(arrays: Any, batch_size: int) -> list[Source]:
    """Strided batches of arrays, which stay where they are."""

    def take(rows: np.ndarray) -> Any:
        return jax.tree.map(lambda a: jnp.take(a, rows, axis=0) if isinstance(a, jax.Array) else a[rows], arrays)

    arrays = jax.tree.map(lambda a: a if isinstance(a, jax.Array) else np.asarray(a), arrays)
    groups = data.strided_rows(data.count_samples(arrays), batch_size)
    return [(data.abstract(arrays, len(rows)), partial(take, rows)) for group in groups for rows in group]


def _compile(asked: Request, sources: Sequence[Source]) -> list[Batch]:
    """The batches with the segments that run them; nothing is read."""
    compiled = Compiled(Segments, asked.setting)
    shards = data.shards(asked.setting.sharding)
    by_shape: dict[Any, Segments] = {}

    def segments_for(shape: Any) -> Segments:
        leaves, structure = jax.tree.flatten(shape)
        key = structure, *((leaf.shape, leaf.dtype) for leaf in leaves)
        if key not in by_shape:
            present = data.padding(data.count_samples(shape), shards)
            placed = shape if present is None else data.abstract(shape, len(present))
            samples = None if present is None else int(np.sum(present))
            shapes = shapes_of(asked.variables, placed, asked.rngs, present=samples)
            by_shape[key] = compiled[shapes]
        return by_shape[key]

    batches = [Batch(i, data.count_samples(s), fetch, segments_for(s)) for i, (s, fetch) in enumerate(sources)]
    for first, other in pairwise(by_shape.values()):
        if [e.tolist() for e in other.entries] != [e.tolist() for e in first.entries]:
            raise ValueError(
                "All batches must call the same batch-norm layers in the same order: got batches that call "
                f"{', '.join(first.layers)}, and batches of another shape that call {', '.join(other.layers)}."
            )
    return batches


def _plan(asked: Request, batches: Sequence[Batch], memory_limit: int | None) -> Plan:
    if memory_limit is None:
        free = mesh.free_bytes(jax.tree.leaves(asked.variables)[0].devices())
        memory_limit = None if free is None else max(free // 2, 1)
    names = []
    for entries in batches[0].segments.entries:
        path = next(path for path, own in asked.layers.entries.items() if np.isin(own, entries).any())
        names.append(layer_name(path))
    samples = sum(batch.size for batch in batches)
    shards = data.shards(asked.setting.sharding)
    return make_plan(names, [batch.segments for batch in batches], samples, shards, memory_limit)


def _signature(batches: Sequence[Batch]) -> np.ndarray:
    """How many batches and calls there are, and a checksum of what the calls read."""
    entries = batches[0].segments.entries if batches else []
    checksum = zlib.crc32(b"".join(np.asarray(e, np.int64).tobytes() for e in entries))
    return np.asarray([len(batches), len(entries), checksum % 2**31], np.int32)


def _agreed(signatures: Sequence[np.ndarray]) -> int:
    present = {tuple(np.asarray(s).tolist()[1:]) for s in signatures if s[0]}
    if not present:
        raise ValueError("The data must hold at least one sample: no process saw any.")
    if len(present) > 1:
        raise ValueError(
            "All processes must call the same batch-norm layers in the same order: got "
            f"{sorted(calls for calls, _ in present)} calls, or others of the same number."
        )
    return next(iter(present))[0]
