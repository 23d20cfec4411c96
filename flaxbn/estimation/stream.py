"""A precise pass over batches as they come: moments go into buffers, filled by as many threads as a CPU has cores."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxbn.data.batches import Stream
from flaxbn.data.placement import placed
from flaxbn.estimation.batch_pass import TOGETHER, Pass, key_of_pass, merge_buffer
from flaxbn.estimation.chunks import Ahead, room
from flaxbn.estimation.joined import Pending, Record
from flaxbn.estimation.request import Request, tracing_options
from flaxbn.estimation.reuse import Compiled
from flaxbn.estimation.threads import Lanes, lanes_for
from flaxbn.tracing.jaxpr import Same

_AHEAD = 1  # groups of a lane: one is computed while the next is read
_BYTES = 2**28  # what batches of a stream may take that are held; more only if one of each lane takes more
_OPEN = 4  # buffers of a lane, each for the batches that call the same layers; mostly there is one, of up to 64 MiB

Passed = tuple[int, list[Pending]]
"""How many batches more a pass has taken, and the chunks that were merged."""


class _Group:
    """Batches of one shape that are computed by one program.

    Attributes:
        batches: the leaves of each.
        numbers: their places in the data.
    """

    def __init__(self, compiled: Pass, closed: Any, present: Any) -> None:
        self.compiled = compiled
        self.batches: list[list[Any]] = []
        self.numbers: list[int] = []
        self._others = closed, present

    def arguments(self, asked: Request) -> tuple[Any, ...]:
        """What `compiled.step` takes after buffer and slot; as many batches as it has room for, the last one again."""
        closed, present = self._others
        more = self.compiled.together - len(self.batches)
        batches, numbers = self.batches + more * self.batches[-1:], self.numbers + more * self.numbers[-1:]
        count = len(self.batches)
        return count, closed, asked.variables, asked.rngs, batches, present, np.asarray(numbers, np.int32)


def run_stream(asked: Request, data: Stream) -> Iterator[Passed]:
    """The moments of all batches, in chunks.

    Batches are read here, one after the other, and go to the lanes in groups, in turn: what is found depends on how
    many lanes there are by rounding only.
    """
    batches = _placed(asked, data)
    first = [*islice(batches, 1)]
    arguments = asked.variables, asked.rngs, first
    nbytes = sum(a.nbytes for a in jax.tree.leaves(first))
    with Lanes(lanes_for(arguments, nbytes), tracing_options) as threads:
        lanes = [_Lane(asked, threads.number) for _ in range(threads.number)]
        groups = _groups(asked, chain(first, batches), in_group(data.length(), len(lanes), nbytes))
        yield from threads.each(lambda lane, group: lanes[lane].take(group), groups, _is_for_a_thread)
        yield 0, [chunk for one in lanes for chunk in one.rest()]


def _is_for_a_thread(group: _Group) -> bool:
    """Not what is compiled yet, which each thread would do by itself, nor what asks the host."""
    return group.compiled.has_stepped and not group.compiled.asks_host


def _placed(asked: Request, data: Stream) -> Iterator[tuple[Any, Any]]:
    """Each batch where it is computed, and which of its samples are no padding.

    Arrays of jax are copied, too: they wait until their group is full, and whoever made them may donate them meanwhile.
    """
    for batch in data:
        own = jax.tree.map(lambda a: jnp.copy(a) if isinstance(a, jax.Array) else a, batch)
        yield placed(own, asked.options.sharding, asked.options.layout.multiple)


def in_group(batches: int | None, lanes: int, nbytes: int) -> int:
    """How many batches make a group: so many that those that are held take 256 MiB, and all lanes get as many.

    Held are a group for each lane, one that waits, and one that is read. `batches` is None where their number is not
    known.
    """
    most = max(1, min(TOGETHER, _BYTES // ((lanes + 2) * max(nbytes, 1))))
    if not batches:
        return most
    rounds = -(-batches // (lanes * most))
    return -(-batches // (lanes * rounds))


def _groups(asked: Request, batches: Iterable[tuple[Any, Any]], most: int) -> Iterator[_Group]:
    """The batches in groups of one shape, of at most so many; few are open, the oldest is closed first."""
    passes = Compiled(Pass, asked.options)
    groups: dict[tuple[Pass, Same], _Group] = {}
    for number, (batch, present) in enumerate(batches):
        compiled, (closed,) = passes.find(key_of_pass(asked, batch, present))
        key = compiled, Same(closed)  # batches with other names may have one program, with other arrays
        group = groups.pop(key, None) or _Group(compiled, closed, present)
        group.batches.append(jax.tree.leaves(batch))
        group.numbers.append(number)
        if len(group.numbers) == min(compiled.together, most):
            yield group
        else:
            groups[key] = group
        if len(groups) > _OPEN:
            yield groups.pop(next(iter(groups)))
    yield from groups.values()


class _Lane:
    """Groups, one after the other: few buffers are open, the one that was used longest ago is merged first."""

    def __init__(self, asked: Request, lanes: int) -> None:
        self._asked = asked
        self._lanes = lanes
        self._chunks: dict[Hashable, _Chunk] = {}  # the one used last is the last
        self._ahead = Ahead(0 if lanes > 1 else _AHEAD)  # a thread waits for each: others run meanwhile

    def take(self, group: _Group) -> Passed:
        """Takes one group more; gives the chunks that were merged."""
        count, *arguments = group.arguments(self._asked)
        *others, batches, present, numbers = arguments
        key, moments = group.compiled.moments_like(*others, batches[0], present, numbers[0])
        chunk = self._chunks.pop(key, None) or _Chunk(group.compiled, moments, self._lanes)
        self._ahead.started(chunk.add(group, count, arguments))
        done = []
        if chunk.is_full:
            done.append(chunk.merged())
        else:
            self._chunks[key] = chunk
        if len(self._chunks) > _OPEN:
            done.append(self._chunks.pop(next(iter(self._chunks))).merged())
        return len(group.numbers), done

    def rest(self) -> list[Pending]:
        """The chunks that were not."""
        return [chunk.merged() for chunk in self._chunks.values()]


class _Chunk:
    """Batches whose moments are not merged yet; of any shapes, as long as they call the same layers.

    The buffers of all lanes together are as large as that of one alone.
    """

    def __init__(self, like: Pass, moments: list[Record], lanes: int) -> None:
        self._numbers: list[int] = []
        self._like = like
        self._most = max(like.together, like.chunk // lanes)
        self._buffer = room(moments, self._most)

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another group."""
        return len(self._numbers) + self._like.together > self._most

    def add(self, group: _Group, count: int, arguments: Sequence[Any]) -> Any:
        """Takes a group more; returns a token, which is ready when it is done."""
        self._buffer, done = group.compiled.step(self._buffer, len(self._numbers), count, *arguments)
        self._numbers += group.numbers
        group.compiled.has_stepped = True
        return done

    def merged(self) -> Pending:
        return self._like.pending(self._numbers, merge_buffer(self._buffer, by_device=self._like.layout.by_device))
