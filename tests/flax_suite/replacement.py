"""A pytest plugin: `nn.BatchNorm` and `nnx.BatchNorm` are flaxbn's, and only the tests that use them are kept."""

import collections
import inspect
import re
from collections.abc import Callable, Generator
from types import ModuleType
from typing import Any

import flax.linen as nn
import pytest
from flax import nnx

import flaxbn

USES_BATCH_NORM = r"\b(?:nn|nnx|linen)\.BatchNorm\b"

SINGLE = pytest.mark.xfail(
    raises=pytest.RaisesExc(ValueError, match="more than one value per channel"),
    reason="trains on a single value per channel: a batch of one, or an input without a batch axis",
    strict=True,
)
MASK = pytest.mark.xfail(
    raises=pytest.RaisesExc(ValueError, match="`mask` must have rank"),
    reason="a mask of shape (C,) for an input of shape (B, C)",
    strict=True,
)
UNMENDED = pytest.mark.xfail(run=False, reason="as SINGLE, and Flax does not mend its classes where that raises")
# Tests that do what flaxbn rejects by design: they must end in this error, for this reason.
REJECTED = {
    r"linen_module_test.py::ModuleTest::test_bind_stateful": SINGLE,
    r"helpers_test.py::TestHelpers::test_train_state_methods": SINGLE,
    r"transforms_test.py::TestScan::test_complex(?!_set_mode)": SINGLE,
    r"transforms_test.py::TestVmap::test_(split_rngs_decorator|state_axes(_super)?)_simple": SINGLE,
    r"normalization_test.py::TestLinenConsistency::test_nnx_linen_batchnorm_equivalence\d*[13579]$": MASK,
    r"summary_test.py::SummaryTest::test_tabulate$": UNMENDED,
}
SEVERAL_LAYERS = "linear_test.py::TestLayers"
"""Tests with a case for each of Flax's layers."""

stock = nn.BatchNorm
calls: collections.Counter[str] = collections.Counter()
"""How often a test called our layer; of nnx, whose tests often only look at modules, how often it made one."""


class Counted(flaxbn.nnx.BatchNorm):
    """Our layer for nnx, which counts how often it is made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        calls[running[-1]] += 1
        super().__init__(*args, **kwargs)


Counted.__name__ = Counted.__qualname__ = "BatchNorm"
running = ["collection"]


def pytest_configure() -> None:
    nn.BatchNorm, nnx.BatchNorm = flaxbn.BatchNorm, Counted


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    patterns = {module: users_of_batch_norm(module) for module in {item.module for item in items}}
    kept, dropped = [], []
    for item in items:
        uses = patterns[item.module].search(inspect.getsource(inspect.unwrap(item.obj)))
        (kept if uses else dropped).append(item)
        for pattern, mark in REJECTED.items():
            if re.search(pattern, item.nodeid):
                item.add_marker(mark)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


def users_of_batch_norm(module: ModuleType) -> re.Pattern[str]:
    """A pattern of source that uses `nn.BatchNorm`, itself or through classes and functions of its module."""
    sources = {
        name: inspect.getsource(value)
        for name, value in inspect.getmembers(module, lambda value: inspect.isclass(value) or inspect.isfunction(value))
        if value.__module__ == module.__name__ and not re.search("^Test|Test$", name)
    }
    names: list[str] = []
    pattern = re.compile(USES_BATCH_NORM)
    while found := [name for name in sources if name not in names and pattern.search(sources[name])]:
        names += found
        pattern = re.compile("|".join([USES_BATCH_NORM, *(rf"\b{name}\b" for name in names)]))
    return pattern


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    def count(next_function: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        assert not isinstance(context.module, stock), "flax.linen.BatchNorm was called"
        calls[item.nodeid] += isinstance(context.module, flaxbn.BatchNorm)
        return next_function(*args, **kwargs)

    running.append(item.nodeid)
    with nn.intercept_methods(count):
        result = yield
    if not calls[item.nodeid] and SEVERAL_LAYERS in item.nodeid:
        pytest.skip("a case for another layer")
    assert calls[item.nodeid], "kept because its source uses BatchNorm, but flaxbn's was never called"
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(
        f"BatchNorm of flaxbn was called, or made, {calls.total()} times in {len(+calls)} tests"
    )
