"""The statistics of the whole set as one batch: all batches go through one layer after the other.

Every batch is taken up to the input of a layer, the moments of all batches are merged, and every batch goes on with
the merged statistics. That is the limit of precise statistics as the batch grows to the whole set, in one forward pass.
"""

import zlib
from collections.abc import Sequence

import jax
import numpy as np

from flaxbn.data.batches import Arrays, Stream
from flaxbn.data.processes import gather, on_all
from flaxbn.data.progress import Counter
from flaxbn.estimation.exact.arrival import prepare_arriving
from flaxbn.estimation.exact.layer_by_layer import run
from flaxbn.estimation.exact.pieces import in_pieces
from flaxbn.estimation.exact.plan import memory_limit_of, plan_batches
from flaxbn.estimation.exact.prepare import prepare_batches
from flaxbn.estimation.exact.stage import Batch
from flaxbn.estimation.exact.verify import IndependenceCheck
from flaxbn.estimation.layer_moments import NotFiniteError, Result, check_finite, check_population
from flaxbn.estimation.request import Request
from flaxbn.models.batch_stats import all_entries


def exact_pass(
    asked: Request, data: Arrays | Stream, memory_limit: int | None, counter: Counter, *, check_independence: bool
) -> Result:
    """The exact moments of the data, merged over all processes for each call.

    Without a check that examples are independent, a model may have to have whole batches: these are not cut otherwise.
    """
    if not check_independence or not isinstance(data, Arrays):
        return _pass(asked, data, memory_limit, counter, check_independence=check_independence)
    pieces = on_all(lambda: in_pieces(asked, data, memory_limit))
    try:
        return _pass(asked, pieces, memory_limit, counter, check_independence=True)
    except NotFiniteError:
        if pieces is data:
            raise
    return _pass(asked, data, memory_limit, counter, check_independence=True)  # raises, too, naming the batch


def _pass(
    asked: Request, data: Arrays | Stream, memory_limit: int | None, counter: Counter, *, check_independence: bool
) -> Result:
    def prepare() -> tuple[list[Batch], list[bool], IndependenceCheck | None]:
        if isinstance(data, Arrays) or jax.process_count() > 1:
            batches, held = [*prepare_batches(asked, data.sources())], 0
        else:
            batches, held = prepare_arriving(asked, data, memory_limit)
        limit = memory_limit_of(asked, memory_limit, held)
        if len(batches) == 1 == jax.process_count():
            for segment in batches[0].segments.segments:
                segment.check_values()
        kept = [call.kept for call in plan_batches(asked, batches, limit).calls] if batches else []
        return batches, kept, IndependenceCheck.of(asked, batches) if check_independence else None

    batches, kept, check = on_all(prepare)
    calls = _agreed(gather(_signature(batches)))
    if not calls:
        return Result.of_calls([], range(len(batches)), [], [])
    found = run(asked, batches, kept or [True] * calls, counter, watched=None if check is None else check.watched)
    entries = batches[0].segments.entries if batches else [all_entries(asked.layers)] * calls

    def verified() -> Result:
        compare = None if check is None else check.start(found)  # before anybody waits for the run
        moments, first_bad = found.fetched()
        result = Result.of_calls(entries, range(len(batches)), moments, first_bad)
        check_finite([result], asked.layers)
        if asked.options.sample_weight is None:
            check_population(result, asked.layers)
        if compare is not None:
            compare([own.var for own in moments])
        return result

    return on_all(verified)


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
