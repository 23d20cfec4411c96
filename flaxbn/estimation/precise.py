"""One pass over batches with the weights frozen: each layer normalizes by its own batch, the moments are merged."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxbn.data.batches import Arrays, Stream, abstract
from flaxbn.data.placement import by_step, padding
from flaxbn.data.progress import Counter
from flaxbn.data.samples import hide
from flaxbn.estimation.batch_pass import Pass, key_of_pass
from flaxbn.estimation.compiled import shapes_of
from flaxbn.estimation.joined import Packed, fetched
from flaxbn.estimation.layer_moments import Result, check_finite, check_several, checked_tree, merged_by_layer
from flaxbn.estimation.request import Request, has_other_names, request, tracing_options
from flaxbn.estimation.reuse import Compiled
from flaxbn.estimation.stream import Passed, run_stream
from flaxbn.estimation.threads import Cores, cores_for
from flaxbn.models.arguments import Model, open_model
from flaxbn.models.linen import Call

_REPORTS = 20  # about so often a pass over arrays tells how far it is, where anybody looks


def precise_pass(asked: Request, data: Arrays | Stream, counter: Counter) -> list[Result]:
    """The moments of all batches, in chunks.

    Each is looked at as soon as it is there, since a stream may have no end: moments that are not finite, or of a
    single value, are an error. What comes last is one transfer.
    """
    results: list[Result] = []
    counter.expect(data.length())
    passed = _scan_arrays(asked, data, counter) if isinstance(data, Arrays) else run_stream(asked, data)
    for batches, some in passed:
        found = fetched(some)
        check_finite(found, asked.layers)
        check_several(found, asked.layers)
        results += found
        counter.add(batches)
    return results


def _scan_arrays(asked: Request, data: Arrays, counter: Counter) -> Iterator[Passed]:
    options, variables, rngs = asked[:3]
    arrays = data.on_device() if options.sharding is None else None
    passes = Compiled(Pass, options)
    first = 0
    for places in data.groups:
        present = padding(places.shape[1], options.layout.multiple)
        if present is not None:
            places = np.pad(places, ((0, 0), (0, len(present) - places.shape[1])), mode="edge")
        compiled, (closed,) = passes.find(key_of_pass(asked, abstract(data.arrays, places.shape[1]), present))
        if options.sharding is None:
            parts = _REPORTS if counter.is_watched else 1
            yield from _on_one_device(compiled, (closed, variables, rngs, arrays), places, present, first, parts)
        else:
            begin = first
            for chunk in np.array_split(places, -(-len(places) // compiled.chunk)):
                batches = jax.device_put(data.take(chunk), by_step(options.sharding))
                packed = compiled.scan(closed, variables, rngs, batches, None, None, present, begin)
                yield len(chunk), [compiled.pending(range(begin, begin + len(chunk)), packed)]
                begin += len(chunk)
        first += len(places)


def _on_one_device(
    compiled: Pass, args: tuple[Any, ...], places: np.ndarray, present: np.ndarray | None, first: int, least: int
) -> Iterator[Passed]:
    """The moments of arrays on one device, gathered batch by batch; on a CPU as many at once as there are cores.

    Args:
        compiled: the pass.
        args: what it takes besides places: the closed arrays, the variables, the random keys, and the arrays of data.
        places: the rows of each batch, [batches, samples].
        present: which samples of a batch are no padding; None where there is none.
        first: the number of the first of these batches.
        least: the parts that there are at least, if there are as many batches: after each somebody may look.
    """
    *_, arrays = args
    leaves = jax.tree.leaves(arrays)
    nbytes = places.size * sum(a.nbytes for a in leaves) // len(leaves[0])
    cores = 1 if compiled.asks_host else cores_for(args, len(places), nbytes)
    number = max(cores, -(-len(places) // compiled.chunk), min(least, len(places)))
    own = np.array_split(places, -(-number // cores) * cores)
    parts = [(first + begin, part) for begin, part in zip(np.cumsum([0, *map(len, own)]).tolist(), own)]

    def passed(some: Sequence[tuple[int, np.ndarray]], packed: Sequence[Packed]) -> Passed:
        found = [compiled.pending(range(begin, begin + len(rows)), one) for (begin, rows), one in zip(some, packed)]
        return sum(len(rows) for _, rows in some), found

    if cores == least == 1:
        for begin, rows in parts:
            yield passed([(begin, rows)], [compiled.scan(*args, rows, None, present, begin)])
        return
    run = _with_room_for_all(compiled, args, present, parts)
    with Cores(cores, tracing_options) as threads:
        for i in range(0, len(parts), cores):
            some = parts[i : i + cores]
            yield passed(some, threads.each(run, some))


def _with_room_for_all(
    compiled: Pass, args: tuple[Any, ...], present: np.ndarray | None, parts: Sequence[tuple[int, np.ndarray]]
) -> Callable[[tuple[int, np.ndarray]], Packed]:
    """The pass over any of these parts; the merged result depends on how many there are by rounding only.

    All have room for the same number of batches, so they are one program, which is compiled here: each thread would do
    so by itself.
    """
    begin, longest = parts[0]
    key = len(longest), len(jax.tree.leaves(args)[-1])

    def run(part: tuple[int, np.ndarray]) -> Packed:
        begin, rows = part
        return compiled.scan(*args, np.pad(rows, ((0, len(longest) - len(rows)), (0, 0))), len(rows), present, begin)

    if key not in compiled.has_run:
        run((begin, longest[:0]))
        compiled.has_run.add(key)
    return run


def batch_moments(
    model: Model,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    call: Call | None = None,
    only: Callable[[str], bool] | None = None,
) -> Iterator[Any]:
    """For each batch the tree that `population_moments` gives for it alone; layers that it does not reach have count 0.

    The model is traced once for batches of one shape.
    """
    options: dict[str, Any] = {"sample_weight": None, "sharding": None, "rngs": None}
    model, variables = open_model(model, variables)
    batches = map(hide, batches)
    begin = [*islice(batches, 1)]
    first = abstract(begin[0]) if begin and has_other_names(variables) else None
    asked = request(model, variables, call=call, only=only, first=first, **options)
    passes = Compiled(Pass, asked.options)
    for step, batch in enumerate(chain(begin, batches)):
        source, (closed,) = passes.find(shapes_of(asked.variables, abstract(batch), asked.rngs, present=None))
        one = jax.tree.map(lambda a: jnp.asarray(a)[None], batch)
        found = source.pending([step], source.scan(closed, asked.variables, asked.rngs, one, None, None, None, step))
        yield checked_tree(merged_by_layer(fetched([found]), asked.layers), asked.wanted, keep_unseen=True)
