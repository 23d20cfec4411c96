"""What counts as the same model, and what cannot be known to be."""

import collections
import copy
import dataclasses
import enum
import functools
import math
import random
import threading
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

import flaxbn
from flaxbn.models.snapshot import NotFrozenError, snapshot

FACTOR = 2.0


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Plain:
    def __init__(self, **fields):
        vars(self).update(fields)

    def method(self):
        return self


class Called(Plain):
    def __call__(self, x):
        return x


class Slots:
    __slots__ = ("__dict__", "hidden")


class Items(list):
    pass


@dataclasses.dataclass
class Config:
    width: int = 3
    note: object = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Schedule:
    rate: float = 0.1

    def __call__(self, step):
        return self.rate * step


class Net(nn.Module):
    value: object = None
    hidden: object = dataclasses.field(default=None, compare=False)

    def forward(self, x):
        return x


Pair = collections.namedtuple("Pair", "a b")
Other = collections.namedtuple("Other", "a b")


def scaled(factor):
    return lambda m, x: m(x * factor)


def by_global():
    return lambda m, x: m(x * FACTOR)


def by_nested_global():
    return lambda m, x: (lambda y: m(y * FACTOR))(x)


def with_default(factor):
    return lambda m, x, factor=factor: m(x * factor)


def with_keyword(factor):
    def call(m, x, *, factor=factor):
        return m(x * factor)

    return call


@jax.jit
def compiled(x):
    return x


# Made anew each time: equal ones have equal snapshots, and no two of different names do.
VALUES = {
    "None": lambda: None,
    "True": lambda: True,
    "1": lambda: 1,
    "1.0": lambda: 1.0,
    "1 + 0j": lambda: 1 + 0j,
    "0.0": lambda: 0.0,
    "-0.0": lambda: -0.0,
    "nan": lambda: float("nan"),
    "numpy 1": lambda: np.int64(1),
    "numpy 1.0": lambda: np.float64(1),
    "numpy nan": lambda: np.float32("nan"),
    "numpy -0.0": lambda: np.float32(-0.0),
    "numpy 0.0": lambda: np.float32(0.0),
    "str": lambda: "1",
    "bytes": lambda: b"1",
    "tuple": lambda: (1, 2),
    "list": lambda: [1, 2],
    "list of floats": lambda: [1.0, 2.0],
    "nested": lambda: [[1, 2]],
    "named tuple": lambda: Pair(1, 2),
    "other named tuple": lambda: Other(1, 2),
    "derived list": lambda: Items([1, 2]),
    "dict": lambda: {"a": 1, "b": 2},
    "dict in another order": lambda: {"b": 2, "a": 1},
    "ordered dict": lambda: collections.OrderedDict(a=1, b=2),
    "frozen dict": lambda: FrozenDict({"a": 1, "b": 2}),
    "set": lambda: {1, 2},
    "frozenset": lambda: frozenset({1, 2}),
    "slice": lambda: slice(1, 2),
    "range": lambda: range(1, 2),
    "ellipsis": lambda: ...,
    "dtype": lambda: np.dtype(np.float32),
    "class": lambda: jnp.float32,
    "numpy class": lambda: np.float32,
    "bfloat16": lambda: jnp.dtype(jnp.bfloat16),
    "enum": lambda: Color.RED,
    "other enum": lambda: Color.BLUE,
    "array": lambda: np.ones(2),
    "array of nan": lambda: np.full(2, np.nan),
    "array in a column": lambda: np.ones((2, 1)),
    "array of float32": lambda: np.ones(2, np.float32),
    "array of ints": lambda: np.ones(2, int),
    "function": lambda: with_default,
    "builtin": lambda: math.sin,
    "relu": lambda: nn.relu,
    "jnp function": lambda: jnp.sin,
    "jnp ufunc": lambda: jnp.add,
    "compiled function": lambda: compiled,
    "method of a class": lambda: Net.forward,
    "he_normal": nn.initializers.he_normal,
    "lecun_normal": nn.initializers.lecun_normal,
    "constant": lambda: nn.initializers.constant(2.0),
    "schedule": lambda: optax.cosine_decay_schedule(1.0, 10),
    "closure": lambda: scaled(2.0),
    "closure over an int": lambda: scaled(2),
    "closure over a list": lambda: scaled([2.0]),
    "global": by_global,
    "nested global": by_nested_global,
    "default": lambda: with_default(2.0),
    "other default": lambda: with_default(3.0),
    "keyword": lambda: with_keyword(2.0),
    "other keyword": lambda: with_keyword(3.0),
    "partial": lambda: functools.partial(nn.Conv, use_bias=False),
    "other partial": lambda: functools.partial(nn.Conv, use_bias=True),
    "partial of a partial": lambda: functools.partial(scaled(2.0), 3),
    "dataclass": Config,
    "other dataclass": lambda: Config(4),
    "dataclass with a note": lambda: Config(3, [1]),
    "callable dataclass": Schedule,
    "object": lambda: Plain(a=1),
    "other object": lambda: Plain(a=2),
    "namespace": lambda: types.SimpleNamespace(a=1),
    "module": Net,
    "module of 1": lambda: Net(1),
    "module of True": lambda: Net(True),
    "module of a list": lambda: Net([3, 4]),
    "module with a hidden field": lambda: Net(None, 3),
    "module of a module": lambda: Net(Net()),
    "module with a name": lambda: Net(name="n"),
    "two modules": lambda: [Net(), Net()],
    "twice a module": lambda: [Net()] * 2,
    "BatchNorm": nn.BatchNorm,
    "BatchRenorm": flaxbn.BatchRenorm,
    "Sequential": lambda: nn.Sequential([nn.Dense(3), nn.relu, lambda x: x]),
}


def test_equal_values_have_equal_snapshots():
    for name, make in VALUES.items():
        assert snapshot(make()) == snapshot(make()), name
        assert hash(snapshot(make())) == hash(snapshot(make())), name


def test_all_others_are_told_apart():
    taken = [(name, snapshot(make())) for name, make in VALUES.items()]
    assert len({key for _, key in taken}) == len(taken), [
        (a, b) for i, (a, first) in enumerate(taken) for b, second in taken[:i] if first == second
    ]


def cycle():
    found = [1]
    found.append(found)
    return found


def module_in_itself():
    model = Net([])
    model.value.append(model)
    return model


def undefined():
    if FACTOR == 0:
        x = 1
    return lambda: x


def derived_array():
    return np.ma.masked_array([1.0], [True])


def method_closing_over(value):
    class Local(nn.Module):
        def __call__(self, x):
            return x * value

        @property
        def same(self):
            return value

    return Local()


UNKNOWN = {
    "bound module": lambda: nn.Dense(3).bind({}),
    "long text": lambda: "text" * 20_000,
    "many parts": lambda: [[i] for i in range(10_000)],
    "module of Python": lambda: models,
    "method that closes over a jax array": lambda: method_closing_over(jnp.ones(2)),
    "class with a method that closes over a jax array": lambda: type(method_closing_over(jnp.ones(2))),
    "callable object": Called,
    "bound method": lambda: Plain().method,
    "bound method of a builtin": lambda: [].append,
    "partial of a bound method": lambda: functools.partial(Plain().method),
    "closure over a callable object": lambda: scaled(Called()),
    "jax array": lambda: jnp.ones(2),
    "closure over a jax array": lambda: scaled(jnp.ones(2)),
    "random key": lambda: jax.random.key(0),
    "large array": lambda: np.ones(10_000),
    "array of objects": lambda: np.array([[], None], object),
    "derived array": derived_array,
    "compiled lambda": lambda: jax.jit(lambda x: x),
    "generator": lambda: (i for i in "ab"),
    "iterator": lambda: iter([1]),
    "lock": threading.Lock,
    "random state": lambda: random.Random(0),
    "numpy generator": lambda: np.random.default_rng(0),
    "default dict": lambda: collections.defaultdict(list),
    "deque": collections.deque,
    "slots": Slots,
    "object": object,
    "cycle": cycle,
    "module in itself": module_in_itself,
    "closed over before it is defined": undefined,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_can_change_unseen_is_not_frozen(name):
    value = UNKNOWN[name]()
    for held in (value, [value], Net(value), Config(3, value), Plain(a=value)):
        with pytest.raises(NotFrozenError):
            snapshot(held)


@pytest.mark.parametrize("value", [[1], {"a": 1}, {1}, Plain(a=1), types.SimpleNamespace(a=1), Config(), Items([1])])
def test_a_change_in_place_is_seen(value):
    value = copy.deepcopy(value)
    holders = [value, scaled(value), functools.partial(print, value), Net(value), Net(None, value)]
    before = [snapshot(holder) for holder in holders]
    if hasattr(value, "__dict__"):
        value.more = 2
    elif isinstance(value, dict):
        value["b"] = 2
    else:
        getattr(value, "append", getattr(value, "add", None))(2)
    assert all(snapshot(holder) != old for holder, old in zip(holders, before))


def test_what_a_method_of_a_local_class_closes_over_counts():
    value = [1.0]
    model = method_closing_over(value)
    before = snapshot(model)
    assert snapshot(model) == before
    value.append(2.0)
    assert snapshot(model) != before


def test_what_was_put_into_a_module_counts():
    model = Net()
    before = snapshot(model)
    object.__setattr__(model, "more", 1)
    assert snapshot(model) != before


def test_where_a_module_is_used_does_not_count():
    model = nn.BatchNorm(use_running_average=True)
    variables = model.init(jax.random.key(0), np.ones((2, 3)))
    assert snapshot(model.clone()) == snapshot(model) == snapshot(model.bind(variables).clone(parent=None))


@pytest.mark.parametrize("make", [by_global, by_nested_global])
def test_globals_that_a_lambda_reads_count(make, monkeypatch):
    """In a notebook all names are global, and a lambda that is written again reads the new value."""
    before = snapshot(make())
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    assert snapshot(make()) != before


def test_an_interceptor_leaves_nothing_known():
    with nn.intercept_methods(lambda f, args, kwargs, _: f(*args, **kwargs)), pytest.raises(NotFrozenError):
        snapshot(1)
    assert snapshot(1) == snapshot(1)


# ---- models of flax.nnx


class Numbered(nnx.Module):
    def __init__(self, rngs, number=1, settings=None):
        self.norm, self.number, self.settings = nnx.BatchNorm(2, rngs=rngs), number, settings


def graph(seed=0, **options):
    return nnx.graphdef(Numbered(nnx.Rngs(seed), **options))


class Settings:
    """A mutable object, which Python compares by identity."""

    def __init__(self, width):
        self.width = width


def test_graphs_are_frozen_by_value():
    assert snapshot(graph()) == snapshot(graph(seed=1))
    assert len({snapshot(graph(number=n)) for n in (1, True, 1.0, 0.0, -0.0, "1", None)}) == 7
    assert snapshot(graph(settings=Settings(1))) == snapshot(graph(settings=Settings(1)))


def test_a_setting_that_is_changed_in_place_shows():
    settings = Settings(1)
    changed = graph(settings=settings)
    before = snapshot(changed)
    settings.width = 2
    assert changed == graph(settings=settings)  # to Flax
    assert snapshot(changed) != before


def test_modes_and_ties_show():
    model, evaluated = (nnx.List([nnx.BatchNorm(2, rngs=nnx.Rngs(0))] * n) for n in (2, 2))
    evaluated[0].eval()
    apart = nnx.List([nnx.BatchNorm(2, rngs=nnx.Rngs(0)) for _ in range(2)])
    assert len({snapshot(nnx.graphdef(m)) for m in (model, evaluated, apart)}) == 3


def test_deep_models_are_frozen():
    """A graph spells out each attribute: of 49 layers ten times the parts that other snapshots may have."""

    def deep(seed):
        return nnx.List([nnx.BatchNorm(2, rngs=nnx.Rngs(seed)) for _ in range(100)])

    assert snapshot(nnx.graphdef(deep(0))) == snapshot(nnx.graphdef(deep(1)))


def test_what_a_graph_cannot_freeze_is_told():
    with pytest.raises(NotFrozenError):
        snapshot(graph(settings=random.Random(0)))
