"""A case: a model, data and a check, which prints itself as code that runs it again."""

import itertools
import re
import warnings
from dataclasses import dataclass

import jax
import numpy as np
from fuzz.checks import Check
from fuzz.data import Data
from fuzz.nodes import Around, Norm, flat
from fuzz.reference import Reference, filled, layers
from fuzz.writer import HEADER, Writer, build

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float64": 1e-9, "complex64": 1e-4}
"""In a few layers some thousand roundings: what is beyond is compared with what Flax loses itself."""


@dataclass(frozen=True)
class Case:
    """A random model on random data, and what is checked of it.

    Attributes:
        nodes: the parts of the model.
        data: the data.
        check: what is checked.
        left_out: the names of layers that `only` leaves out, besides those of which flaxbn knows nothing.
    """

    nodes: tuple
    data: Data
    check: Check
    left_out: tuple = ()

    @property
    def unknown(self):
        """The names of layers of which flaxbn knows nothing, and may not be asked for statistics."""
        found = re.findall(r'(norm_\d+) = Unknown|Unknown\([^\n]*?name="(norm_\d+)"', self.code)
        return tuple(one or other for one, other in found)

    @property
    def frozen(self):
        """The names of layers that keep to what they have stored."""
        return (*self.left_out, *self.unknown)

    @property
    def dtype(self):
        return "jnp.bfloat16" if self.data.dtype == "bfloat16" else None

    @property
    def code(self):
        """The model as Flax code."""
        return Writer(dtype=self.dtype).model(self.nodes)

    @property
    def has_merged(self):
        """Whether a layer's input has no axis of examples."""
        around = [node for node in flat(self.nodes) if isinstance(node, Around) and ".reshape(" in node.before]
        return any(isinstance(node, Norm) and node.cls != "Unknown" for node in flat(around))

    def _used(self):
        """The classes of the parts, by the modules that they are in."""
        classes = sorted({type(node) for node in flat(self.nodes)}, key=lambda cls: (cls.__module__, cls.__name__))
        return {module: [cls.__name__ for cls in own] for module, own in itertools.groupby(classes, _module)}

    def script(self):
        """A script that runs the case: the model may be changed in it, what is right is known by the parts."""
        imports = [
            "from fuzz.case import Case",
            "from fuzz.checks import Apply, Domains, Estimate, Export",
            "from fuzz.data import Data",
            *(f"from {module} import {', '.join(names)}" for module, names in self._used().items()),
        ]
        nodes = "".join(f"\n        {node!r}," for node in self.nodes)
        rest = "".join(f"\n    {name}={getattr(self, name)!r}," for name in ("data", "check", "left_out"))
        case = f"Case(\n    nodes=({nodes}\n    ),{rest}\n).run(Net())"
        devices = 'jax.config.update("jax_num_cpu_devices", 8)'
        return "\n".join([HEADER, *imports, "", devices, "", "", self.code, "", "", case, ""])

    def wanted(self, variables):
        """The layers to estimate, by their paths, and the names of their statistics."""
        found = layers(variables["batch_stats"])
        return {path: names for path, names in found.items() if path[-1] not in self.frozen}

    def run(self, model=None):
        """Raises unless flaxbn does what it should; `model` stands in the place of the one that is written here."""
        with jax.enable_x64(self.data.dtype == "float64"):
            variables = filled(self.code, self.data.x[:2])
            model = model or build(self.code)()
            reference = Reference(self.nodes, variables, self.frozen, self.dtype)
            expected = self.check.expected(self.data, model, variables, reference)
            found = self._found(model, variables, reference)
            if found is None:
                return
            assert set(found) == set(expected), f"found {sorted(found)}, not {sorted(expected)}"
            errors = {name: error_of(found[name], *expected[name]) for name in expected}
        tolerance = TOLERANCE[self.data.dtype]
        if max(errors.values()) > tolerance:
            self._compare_with_double(model, variables, found, expected, tolerance)

    def _found(self, model, variables, reference):
        """What flaxbn finds, with the warnings that it must give; None where it must and does refuse."""
        refused = self.check.refused(self)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                found = self.check.found(self, model, variables)
            except ValueError as error:
                if refused is None or not re.search(refused, str(error)):
                    raise
                return None
        assert refused is None, f"not refused, with an error that says {refused!r}"
        twice = {path[-1] for path in reference.called_twice()} - set(self.frozen)
        wanted, told = set(self.check.warned_of(self, twice)), " ".join(str(w.message) for w in caught)
        assert set(re.findall(r"'(?:[\w/]*/)?(norm_\d+)'", told)) == wanted, f"it must warn of {wanted}: {told!r}"
        assert wanted or not told, f"it must not warn: {told!r}"
        return found

    def _compare_with_double(self, model, variables, found, expected, tolerance):
        """What is off by more than roundings of a tame model may be off by as much as Flax's own numbers are, tenfold.

        Both are measured against the same model in double precision.
        """
        if self.data.dtype == "float64":
            raise AssertionError(described(found, expected, tolerance))
        with jax.enable_x64(True):
            model = build(Writer().model(self.nodes))()
            reference = Reference(self.nodes, variables, self.frozen)
            truth = self.check.expected(self.data.wide, model, variables, reference)
            allowed = {name: tolerance + 10 * error_of(expected[name][0], *truth[name]) for name in truth}
            wrong = {name for name in truth if not error_of(found[name], *truth[name]) <= max(allowed.values())}
        if wrong:
            raise AssertionError(described(found, expected, tolerance))


def _module(cls):
    return cls.__module__


def error_of(found, expected, size):
    """The largest error, in units of `size`; of NaN infinite."""
    found, expected = (np.asarray(a).astype(np.complex128) for a in (found, expected))
    assert found.shape == expected.shape, f"found the shape {found.shape}, not {expected.shape}"
    error = np.max(np.abs(found - expected) / size, initial=0)
    return np.inf if np.isnan(error) else float(error)


def described(found, expected, tolerance):
    """Which arrays are off, for an error."""
    errors = {name: error_of(found[name], *expected[name]) for name in expected}
    rows = [f"  {name}: off by {error:.2g}" for name, error in errors.items() if not error <= tolerance]
    return "\n".join([f"of {len(errors)} arrays, tolerance {tolerance:.2g}:", *rows])
