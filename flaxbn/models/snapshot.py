"""A model, or a function, by value: equal snapshots do the same, so that what was compiled for one serves the other.

What Python itself compares is not enough: `1 == True` and `0.0 == -0.0`, fields with `compare=False` do not count, two
modules are equal whether or not they share a layer, and what is equal now may be changed in place later.
"""

import dataclasses
import dis
import enum
import functools
import inspect
import sys
import types
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.core import FrozenDict
from flax.typing import HashableMapping

from flaxbn.models.recognized import recognized_key
from flaxbn.tracing.jaxpr import Same

_BUDGET = 2**16  # bytes of a snapshot, which is held for as long as what is compiled
_GRAPH_BUDGET = 2**20  # of the graph of an nnx model, which spells out each attribute of each layer
_PART_BYTES = 16  # of each part, about; a snapshot of so many parts takes a few milliseconds
_ATOMS = frozenset({bool, int, str, type(None)})
_PLAIN = frozenset({bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, slice, type(None)})
_NOT_FIELDS = frozenset({"parent", "scope", "_parent_ref", "_id", "_state", "_compact_name_scope_modules"})
"""What a Flax module holds that says where it is used, and not what it does."""
_IMPORTED = (types.FunctionType, types.BuiltinFunctionType, np.ufunc)
_LIBRARIES = frozenset({"jax", "jaxlib", "flax", "flaxbn", "optax", "numpy"}) | sys.stdlib_module_names
"""Their functions read no globals that users change, and their modules stay as they are."""
_NO_METHODS = frozenset({"__init__", "__post_init__", "__eq__", "__hash__", "__repr__"})
"""Functions of a class that no model calls: what they do, fields show."""
_COMPARED = (
    *(np.dtype, range, type(Ellipsis)),
    *(jax.sharding.Sharding, jax.sharding.Mesh, jax.sharding.AbstractMesh, jax.sharding.PartitionSpec),
)
"""Types whose objects never change, and are compared by value."""


class NotFrozenError(TypeError):
    """A value that can change, or is compared, in ways that a snapshot does not see."""


def snapshot(value: Any) -> Hashable:
    """What a model or a function does, as a key.

    Frozen are numbers, strings, dtypes, enums, containers and small numpy arrays of these; modules, by type and all
    that they hold; dataclasses and plain objects that are not callable; functions that can be imported under their own
    name; other functions by their code, with all that they close over and the globals that they read; and partials.
    Classes that cannot be imported are so by their methods.

    The classes that `recognize` was told of are part of it.

    Not seen are attributes of classes, and what importable functions and classes read: globals, and what they close
    over.

    Raises:
        NotFrozenError: if something else is among it: callable objects, bound methods, bound modules, arrays of jax,
            iterators, cycles, more than 64 kB; or if an interceptor of Flax is active, which may do anything.
    """
    # Flax has no public way to ask: an interceptor of one's own is called behind all others.
    if nn.module._global_interceptor_stack:
        raise NotFrozenError("an interceptor is active")
    return recognized_key(), _Snapshot().of(value)


class _Snapshot:
    """One snapshot under way: the modules seen so far, what many layers share, what encloses the present object."""

    def __init__(self) -> None:
        self._modules: dict[int, int] = {}
        self._shared: dict[int, Hashable] = {}
        self._around: set[int] = set()
        self._left = _BUDGET

    def of(self, value: Any) -> Hashable:
        kind = type(value)
        self._spend(_PART_BYTES)
        if kind in _ATOMS:
            return self._atom(value)
        if kind is _graph_type():
            return self._graph(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, enum.Enum) or _is_imported(value):
            return Same(value)
        if kind in (str, bytes, float, complex) or isinstance(value, np.generic | np.ndarray):
            return self._number(value)
        if isinstance(value, _COMPARED):
            return kind, value
        if id(value) in self._around:
            raise NotFrozenError("a cycle")
        self._around.add(id(value))
        found = self._class(kind), self._parts(value)
        self._around.remove(id(value))
        return found

    def _spend(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise NotFrozenError(f"more than {_BUDGET} bytes")

    def _atom(self, value: bool | int | str | None) -> Hashable:
        if isinstance(value, str):
            self._spend(len(value))
        return type(value), value

    def _graph(self, graph: Any) -> Hashable:
        """The graph definition of an nnx model, which has tens of thousands of parts: most of them are atoms."""
        self._left += _GRAPH_BUDGET
        nodes = [self._slots(node) for node in graph.nodes]
        return tuple(nodes), tuple([(type(key), key, self._slots(held)) for key, held in graph.attributes])

    def _slots(self, part: Any) -> Hashable:
        """A dataclass of the graph, by its type and fields."""
        kind: Any = type(part)
        self._spend(_PART_BYTES)
        return Same(kind), tuple([self._quickly(getattr(part, name)) for name in _field_names(kind)])

    def _quickly(self, value: Any) -> Hashable:
        """What `of` gives, with short ways for atoms, mappings of them, and what layer after layer holds."""
        kind = type(value)
        if kind in _ATOMS:
            return self._atom(value)
        if kind is dict or kind is HashableMapping:
            self._spend(_PART_BYTES * len(value))
            return kind, tuple([(type(key), key, self._quickly(held)) for key, held in value.items()])
        if kind is not types.FunctionType and not isinstance(value, type):
            return self.of(value)
        if id(value) not in self._shared:
            self._shared[id(value)] = self.of(value)
        return self._shared[id(value)]

    def _number(self, value: Any) -> Hashable:
        """Text, and numbers of Python and numpy."""
        kind = type(value)
        if isinstance(value, str | bytes):
            self._spend(len(value))
            return kind, value
        if isinstance(value, float | complex) and not isinstance(value, np.generic):
            return kind, repr(value)  # tells zeros by their sign, and NaN equals itself
        if value.dtype.hasobject or (isinstance(value, np.ndarray) and kind is not np.ndarray):
            raise NotFrozenError(f"a {kind.__name__} of {value.dtype}")
        self._spend(value.nbytes)
        return kind, value.shape, value.dtype, value.tobytes()

    def _class(self, kind: type) -> Hashable:
        """A class by identity; one that cannot be imported may have methods that close over something."""
        if kind in _PLAIN or _is_found(kind) or id(kind) in self._around:
            return Same(kind)
        self._around.add(id(kind))
        own = [one for one in kind.__mro__ if not _is_found(one)]
        functions = [
            f for one in own for name, held in vars(one).items() if name not in _NO_METHODS for f in _code(held)
        ]
        found = Same(kind), tuple([self._function(f) for f in functions])
        self._around.remove(id(kind))
        return found

    def _parts(self, value: Any) -> Hashable:
        """What an object holds of other ones."""
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, types.ModuleType):
            return self._library(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, functools.partial):
            return self._all((value.func, value.args, value.keywords, vars(value)))
        if isinstance(value, dict | FrozenDict | types.MappingProxyType):
            return self._items(value), self._extras(value, (dict, OrderedDict, FrozenDict, types.MappingProxyType))
        if isinstance(value, tuple | list):
            return self._all(value), self._extras(value, (list, tuple))
        if isinstance(value, set | frozenset):
            return frozenset(self._all(value)), self._extras(value, (set, frozenset))
        if isinstance(value, jax.tree_util.PyTreeDef):
            return self._all((value.node_data(), value.children()))
        if isinstance(value, slice):
            return self._all((value.start, value.stop, value.step))
        return self._object(value)

    def _all(self, values: Iterable[Any]) -> tuple[Hashable, ...]:
        return tuple([self.of(value) for value in values])

    def _items(self, values: Mapping[Any, Any]) -> Hashable:
        return tuple([(self.of(key), self.of(value)) for key, value in values.items()])

    def _extras(self, value: Any, bases: tuple[type, ...]) -> Hashable:
        """What an object of a class derived from a container holds beside its items."""
        base = next(kind for kind in type(value).__mro__ if kind in bases)
        if not _is_plain(type(value), base):
            raise NotFrozenError(f"a {type(value).__name__}")
        return self._items(getattr(value, "__dict__", {}))

    def _module(self, value: nn.Module) -> Hashable:
        """All fields, and what else was put into it; whose parts are one module matters, since these share weights."""
        if vars(value).get("scope") is not None:
            raise NotFrozenError("a module that is bound to variables")
        if id(value) in self._modules:
            return self._modules[id(value)]
        self._modules[id(value)] = len(self._modules)
        return tuple([(name, self.of(held)) for name, held in vars(value).items() if name not in _NOT_FIELDS])

    def _library(self, value: types.ModuleType) -> Hashable:
        if not _is_library(value.__name__):
            raise NotFrozenError(f"the module {value.__name__}, whose variables may change")
        return Same(value)

    def _function(self, value: types.FunctionType) -> Hashable:
        try:
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
        except ValueError:
            raise NotFrozenError("a function that closes over what is not defined yet") from None
        around = value.__globals__
        home = str(around.get("__name__"))
        names = () if _is_library(home) else _global_names(value.__code__)
        read = {name: around[name] for name in names if name in around}
        parts = (cells, read, value.__defaults__, value.__kwdefaults__, vars(value))
        return value.__code__, home, self._all(parts)

    def _object(self, value: Any) -> Hashable:
        if dataclasses.is_dataclass(value):
            fields = [getattr(value, field.name, None) for field in dataclasses.fields(value)]
            return self._all((*fields, getattr(value, "__dict__", {})))
        base = types.SimpleNamespace if isinstance(value, types.SimpleNamespace) else object
        if callable(value) or not hasattr(value, "__dict__") or not _is_plain(type(value), base):
            raise NotFrozenError(f"a {type(value).__name__}")
        return self._items(vars(value))


class _Plain:
    """An object that holds nothing but a dictionary, to compare sizes with."""


def _is_plain(kind: type, base: type) -> bool:
    """Whether objects of a class hold a dictionary, and else no more than those of its base: no state of C, no slots.

    Such state is seen by the code of the class alone.
    """
    larger = kind.__basicsize__ - base.__basicsize__ > _Plain.__basicsize__ - object.__basicsize__
    derived = kind.__mro__[: kind.__mro__.index(base)]
    return not larger and all("__module__" in vars(one) and not vars(one).get("__slots__") for one in derived)


def _graph_type() -> Any:
    """The class of graph definitions; None while flax.nnx is not loaded."""
    nnx = sys.modules.get("flax.nnx")
    return None if nnx is None else nnx.GraphDef


@functools.lru_cache(maxsize=64)
def _field_names(kind: Any) -> tuple[str, ...]:
    """The fields of a dataclass; another class is none of those that graphs are known to be made of."""
    if not dataclasses.is_dataclass(kind):
        raise NotFrozenError(f"a {kind.__name__}")
    return tuple([field.name for field in dataclasses.fields(kind)])


def _is_library(module: str) -> bool:
    return module.partition(".")[0] in _LIBRARIES


def _is_imported(value: Any) -> bool:
    """Whether it is a function that can be imported, of Python, numpy or jax: objects of users may hold fields."""
    is_function = isinstance(value, _IMPORTED) or type(value).__module__.partition(".")[0] in ("jax", "jaxlib")
    return is_function and callable(value) and _is_found(value)


def _is_found(value: Any) -> bool:
    """Whether a function or class is what its module and name say, so that it is the same one wherever it is used."""
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    found: Any = sys.modules.get(getattr(value, "__module__", None) or "")
    if not isinstance(name, str) or found is None:
        return False
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is value


def _code(held: Any) -> list[types.FunctionType]:
    """The functions behind an attribute of a class, without what Flax wraps around them."""
    if isinstance(held, property):
        return [f for accessor in (held.fget, held.fset) for f in _code(accessor)]
    found = inspect.unwrap(getattr(held, "__func__", held)) if callable(held) or hasattr(held, "__func__") else None
    return [found] if isinstance(found, types.FunctionType) else []


@functools.lru_cache(maxsize=1024)
def _global_names(code: types.CodeType) -> tuple[str, ...]:
    """The names of globals that a function, or one that it defines, may read."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    inner = [_global_names(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return tuple(sorted(names.union(*inner)))
