"""A flat program cut at its layers: what runs between one call of a layer and the next, and what lives across it.

The program is split by dependence, not by place: an equation belongs to the first call whose input needs it, and what
no call's input needs (the head, dead code) belongs to none. What depends on weights and statistics alone is computed
where it is used and never kept.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import jax
from jax.sharding import Sharding
from jax.stages import Lowered
from jaxtyping import Array

from flaxbn.arithmetic.moments import Moments
from flaxbn.estimation.calls import Closed, LayerCalls
from flaxbn.estimation.compiled import Layout
from flaxbn.estimation.sharded import measure_sharded
from flaxbn.tracing.jaxpr import Hashed, as_function, as_key, is_variable, operations, structure
from flaxbn.tracing.primitive import as_tap, tap_p

Values = dict[Any, Any]
"""Variables of a program, and what they hold for one batch."""

_COMPILERS = 8  # at once; each uses threads of its own where it can


class Segments:
    """The segments of a model for batches of one shape, one for each call of a wanted layer, in order.

    Attributes:
        calls: the flat program and the calls in it.
        layout: how batches lie on devices.
        asks_host: whether a function of the host is called.
        is_weighted: whether samples have weights.
        sample_weights: `(closed, batch, present)`: those of a batch's samples.
        layers: the layer of each call, for messages.
        entries: for each call the numbers of the stored entries that it reads.
        inputs: the variables of a batch's leaves, and of its random keys'.
        live: the variables of a batch that later calls need, before each call and after the last.
        reads_size: whether the model computes with the size of the batch; None where nobody has asked.
    """

    def __init__(self, calls: Sequence[LayerCalls], layout: Layout) -> None:
        (self.calls,) = calls
        self.layout = layout
        self.asks_host = self.calls.asks_host
        self.entries = list(self.calls.entries.values())
        jaxpr = self.calls.program.jaxpr
        taps = [eqn for eqn in jaxpr.eqns if eqn.primitive is tap_p]
        self.taps = [taps[site] for site in self.calls.entries]
        self.layers = [eqn.params["layer"] for eqn in self.taps]
        closed, variables, self._batch_leaves, _ = self.calls.arguments
        self._shared, self.inputs = jaxpr.invars[: closed + variables], jaxpr.invars[closed + variables :]
        self.is_weighted = self.calls.weigh is not None or self.calls.present is not None
        self.sample_weights = jax.jit(self.calls.sample_weights)
        self.reads_size: bool | None = None
        self._compiled: dict[Hashable, Any] = {}
        self._ahead: dict[Hashable, Any] = {}
        tapped = set(map(id, self.taps))
        made_by = {v: i for i, eqn in enumerate(jaxpr.eqns) if id(eqn) not in tapped for v in eqn.outvars}
        self.live, stages = _cut(jaxpr.eqns, made_by, self.inputs, self.taps)
        self.segments = [Segment(self, k, stage, made_by) for k, stage in enumerate(stages)]
        self._bytes = [sum(v.aval.size * v.aval.dtype.itemsize for v in live) for live in self.live]

    def shared(self, closed: Closed, variables: Any) -> Values:
        """The variables that hold the same for all batches, but for the statistics."""
        return dict(zip(self._shared, jax.tree.leaves((closed.model, variables))))

    @property
    def uses_keys(self) -> bool:
        """Whether some call's input depends on random keys."""
        return any(v in self.live[0] for v in self.inputs[self._batch_leaves :])

    def bytes(self, call: int) -> int:
        """The size of what lives before a call."""
        return self._bytes[call]

    def compile_ahead(self, sharding: Sharding, begin: int = 0) -> None:
        """Compiles what measures the calls, side by side, for batches without weights of which everything is kept.

        On an accelerator compilers try kernels out, which takes longer than all else in a first call. All arrays lie as
        `sharding`; the calls before `begin` have been measured.
        """
        devices = frozenset(sharding.device_set)
        wanted = {(one.key, devices): one for one in self.segments[begin:]}
        new = {key: one for key, one in wanted.items() if key not in self._ahead}
        lowered = [one.lower(sharding) for one in new.values()]
        with ThreadPoolExecutor(_COMPILERS) as pool:
            self._ahead |= zip(new, pool.map(_compiled, lowered))

    def ahead(self, key: Hashable, arrays: Sequence[Array]) -> Any:
        """What `compile_ahead` compiled for the segments of this key on the devices of their arguments, or None.

        Those that arrays are committed to decide, as for any compiled function: a batch may lie elsewhere than the
        variables do, and those of the next estimate elsewhere than those of the last.
        """
        if not self._ahead:
            return None
        devices = frozenset().union(*(a.devices() for a in arrays if a.committed)) or arrays[0].devices()
        return self._ahead.get((key, frozenset(devices)))

    def compiled(self, key: Hashable, make: Any) -> Any:
        """What `make` compiles, once for all segments of equal programs."""
        if key not in self._compiled:
            self._compiled[key] = make()
        return self._compiled[key]


def _compiled(lowered: Lowered) -> Any:
    """The program, or None where it cannot be compiled beside others: then it is by itself, when it is needed."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError:  # out of memory, with kernels of several programs tried out at once
        return None


class Segment:
    """The computation of one call's input, and of what else is then known and needed later.

    Attributes:
        work: how much it computes.
        dead: which variables of a batch nobody needs afterwards.
        dtypes: those of the mean and the variance that the call lets through.
        has_run: whether `measure` was called, so that it is compiled.
    """

    def __init__(self, whole: Segments, call: int, stage: Sequence[int], made_by: Mapping[Any, int]) -> None:
        self._whole = whole
        self._site = list(whole.calls.entries)[call]
        self._tap = tap = whole.taps[call]
        eqns = whole.calls.program.jaxpr.eqns
        before, after = whole.live[call], whole.live[call + 1]
        operands = [tap.invars[0], *tap.invars[3:]]
        own = {v for i in stage for v in eqns[i].outvars}
        self.work = sum(operations(eqns[i]) for i in stage)
        self.dead = before.keys() - after.keys()
        self._made = [v for v in after if v in own]
        needed = _closure([*operands, *self._made], before, eqns, made_by)
        self._eqns = [eqns[i] for i in sorted(needed)]
        reads = [v for eqn in self._eqns for v in eqn.invars] + operands
        inside = {v for eqn in self._eqns for v in eqn.outvars}
        outside = list(dict.fromkeys(v for v in reads if is_variable(v) and v not in inside))
        self._read = [v for v in outside if v in before]
        self._shared = [v for v in outside if v not in before]
        self._operands = operands
        self._spent = _spent([v for v in self._read if v in self.dead and v not in whole.inputs], self._made)
        self.dtypes = tuple(v.aval.dtype for v in tap.outvars)
        self.has_run = False

    def measure(
        self, values: Values, shared: Values, retained: Values, weights: Array | None
    ) -> tuple[Moments, Values]:
        """The moments of the call's input, and what the segment adds to `values`.

        Overwrites what is not needed any more, unless it is in `retained`. The moments are ready when all is.
        """
        spent = [values[v] if v in self._spent and v not in retained else None for v in self._read]
        kept = [None if given is not None else values[v] for given, v in zip(spent, self._read)]
        own = [shared[v] for v in self._shared]
        arrays = [*(values[v] for v in self._read), *own]
        ahead = self._whole.ahead(self.key, arrays) if weights is None and not retained else None
        moments, made = (ahead or self._measure)(spent, kept, own, weights)
        self.has_run = True
        return moments, dict(zip(self._made, made))

    def lower(self, sharding: Sharding) -> Lowered:
        """What `measure` runs where nothing is retained and nothing weighted, before it is compiled."""

        def abstract(v: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, sharding=sharding)

        spent = [abstract(v) if v in self._spent else None for v in self._read]
        kept = [None if v in self._spent else abstract(v) for v in self._read]
        return self._measure.lower(spent, kept, [abstract(v) for v in self._shared], None)

    def advance(self, values: Values, shared: Values) -> Values:
        """What the segment adds to `values`."""
        return dict(zip(self._made, self._advance([values[v] for v in self._read], [shared[v] for v in self._shared])))

    def check_values(self) -> None:
        """A single value per channel in this batch is an error."""
        self._whole.calls.check_values(as_tap(self._tap.params, [v.aval for v in self._tap.invars], self._site))

    def statistics(self, mean: Any, var: Any) -> Values:
        """What the call lets through, as variables shared by later segments."""
        cast = [a if a.dtype == dtype else a.astype(dtype) for a, dtype in zip((mean, var), self.dtypes)]
        there = all(isinstance(a, jax.Array) for a in cast)
        return dict(zip(self._tap.outvars, cast if there else jax.device_put(cast)))

    @cached_property
    def key(self) -> Hashable:
        """Equal for segments of equal programs."""
        params = {name: value for name, value in self._tap.params.items() if name != "layer"}
        places = tuple(v in self._spent for v in self._read), self._whole.calls.batch_axes.get(self._site)
        shape = tuple(v.aval for v in self._tap.invars[1:3])
        invars, outvars = [*self._read, *self._shared], [*self._operands, *self._made]
        return Hashed((len(self._read), places, shape, as_key(params), structure(invars, self._eqns, outvars)))

    @cached_property
    def _function(self) -> Any:
        debug_info = self._whole.calls.program.jaxpr.debug_info
        return as_function(self._eqns, [*self._read, *self._shared], [*self._operands, *self._made], debug_info)

    @cached_property
    def _measure(self) -> Any:
        return self._whole.compiled(("measure", self.key), lambda: jax.jit(self._measured, donate_argnums=0))

    @cached_property
    def _advance(self) -> Any:
        operands = len(self._operands)

        def advanced(read: list[Any], shared: list[Any]) -> list[Any]:
            return self._function(*read, *shared)[operands:]

        return self._whole.compiled(("advance", self.key), lambda: jax.jit(advanced))

    def _measured(
        self, spent: list[Any], kept: list[Any], shared: list[Any], weights: Any
    ) -> tuple[Moments, list[Any]]:
        read = [k if s is None else s for s, k in zip(spent, kept)]
        outputs = self._function(*read, *shared)
        (x, *others), made = outputs[: len(self._operands)], outputs[len(self._operands) :]
        stored = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in self._tap.invars[1:3]]
        tap = as_tap(self._tap.params, [x, *stored, *others], self._site)
        weights = self._whole.calls.weights(tap, weights)
        layout = self._whole.layout
        platform = None if layout.on_accelerator else layout.platform
        return measure_sharded(tap, weights, self._whole.calls.samples, layout.sharding, on=platform).moments, made


def _cut(
    eqns: Sequence[Any], made_by: Mapping[Any, int], inputs: Sequence[Any], taps: Sequence[Any]
) -> tuple[list[dict[Any, None]], list[list[int]]]:
    """The variables that live before each tap and after the last; the equations that vary by batch, for each tap."""
    varying = set(inputs)
    for eqn in eqns:
        if not varying.isdisjoint(v for v in eqn.invars if is_variable(v)):
            varying.update(v for v in eqn.outvars if v in made_by)
    made_by = {v: i for v, i in made_by.items() if v in varying}
    born: dict[Any, int] = dict.fromkeys(inputs, -1)
    last: dict[Any, int] = {}
    stages: list[list[int]] = []
    for k, tap in enumerate(taps):
        operands = [tap.invars[0], *tap.invars[3:]]
        stage = sorted(_closure(operands, born, eqns, made_by))
        born |= {v: k for i in stage for v in eqns[i].outvars}
        read = [v for i in stage for v in eqns[i].invars] + operands
        last |= {v: k for v in read if is_variable(v) and v in varying}
        stages.append(stage)
    return [{v: None for v, b in born.items() if b < k <= last.get(v, -1)} for k in range(len(taps) + 1)], stages


def _closure(wanted: Iterable[Any], known: Any, eqns: Sequence[Any], made_by: Mapping[Any, int]) -> set[int]:
    """The equations from which the wanted variables follow, given the known ones and those that no equation makes."""
    found: set[int] = set()
    todo = list(wanted)
    while todo:
        v = todo.pop()
        if is_variable(v) and v not in known and v in made_by and made_by[v] not in found:
            found.add(made_by[v])
            todo += eqns[made_by[v]].invars
    return found


def _spent(dead: Sequence[Any], made: Sequence[Any]) -> set[Any]:
    """Which dead variables can be overwritten by one of the same type."""
    free = [(v.aval.shape, v.aval.dtype) for v in made]
    spent = set()
    for v in dead:
        if (v.aval.shape, v.aval.dtype) in free:
            free.remove((v.aval.shape, v.aval.dtype))
            spent.add(v)
    return spent
