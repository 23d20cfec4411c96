"""Into which pieces exact statistics cut arrays: what they find does not depend on it, how long they take does."""

from dataclasses import replace

import jax

from flaxbn.data.batches import Arrays, abstract, strided_rows
from flaxbn.data.placement import free_bytes, on_accelerator
from flaxbn.estimation.compiled import shapes_of
from flaxbn.estimation.exact.segments import Segments
from flaxbn.estimation.request import Request
from flaxbn.estimation.reuse import Compiled
from flaxbn.estimation.threads import lanes_for
from flaxbn.tracing.flatten import unroll

_IN_CACHE = 3 * 2**20  # bytes of one array between two layers, on a CPU
_LEAST = 2**18  # of these: of fewer, starting takes longer than computing
_FEW = 8  # samples: of fewer it shows less whether they affect each other
_UNDER_WAY = 10  # arrays of that size for each core, within what may be kept: three are under way, and take a third
_TO_BE_BUSY = 2**33  # bytes of all of them, on an accelerator: the host takes a third of a millisecond for each piece
_SHARE = 8  # of its free memory, or of what may be kept there
_WORTH_IT = 1.5  # times smaller or larger; another size is another trace


def in_pieces(asked: Request, data: Arrays, memory_limit: int | None) -> Arrays:
    """The same samples, cut otherwise where that is faster: smaller on CPUs, larger on accelerators.

    As they are where the cut matters, or may: where random numbers or weights are made for each batch, where batches
    lie on several devices, and where the model takes batches of this size only.

    Args:
        asked: the request.
        data: the samples.
        memory_limit: how many bytes may be kept, if that was said: what is under way beside them is to be much less.
    """
    options = asked.options
    if options.sharding is not None or options.sample_weight is not None or asked.rngs or jax.process_count() > 1:
        return data
    samples, size = sum(rows.size for rows in data.groups), data.groups[0].shape[1]
    wanted = _even_size(samples, min(_best_size(asked, _segments(asked, data, size), size, memory_limit), samples))
    if max(wanted / size, size / wanted) < _WORTH_IT:
        return data
    try:
        _segments(asked, data, wanted)
    except Exception:  # whatever the model raises that cannot take them
        return data
    return replace(data, groups=strided_rows(samples, wanted))


def _even_size(samples: int, size: int) -> int:
    """The size of pieces of at most `size` samples, if possible all of one size, which is one trace less."""
    fewest = -(-samples // size)
    pieces = next((n for n in range(fewest, fewest * 5 // 4 + 1) if samples % n == 0), fewest)
    return -(-samples // pieces)


def _segments(asked: Request, data: Arrays, size: int) -> Segments:
    shapes = shapes_of(asked.variables, abstract(data.arrays, size), asked.rngs, present=None)
    return Compiled(Segments, asked.options, unroll).find(shapes)[0]


def _best_size(asked: Request, segments: Segments, size: int, memory_limit: int | None) -> int:
    between = [[v.aval.size * v.aval.dtype.itemsize for v in live] for live in segments.live[1:]]
    largest, most = max((max(own, default=0) for own in between), default=0), max(map(sum, between), default=0)
    if not most:
        return size
    limits = [] if memory_limit is None else [memory_limit]
    if not on_accelerator(asked.variables):
        in_all = _UNDER_WAY * lanes_for(asked.variables, most)
        fits = max(1, min(size, _IN_CACHE * size // largest))
        within = (max(limit // in_all, _LEAST) * size // largest for limit in limits)
        return min([fits, *(max(samples, _FEW) for samples in within)])
    free = free_bytes(jax.tree.leaves(asked.variables)[0].devices())
    limits += [] if free is None else [free]
    return max(size, min([_TO_BE_BUSY, *(limit // _SHARE for limit in limits)]) * size // most)
