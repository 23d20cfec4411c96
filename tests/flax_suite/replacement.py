"""A pytest plugin: `nn.BatchNorm` is flaxbn's, and only the tests that use it are kept."""

import collections
import inspect
import re
from collections.abc import Callable, Generator
from types import ModuleType
from typing import Any

import flax.linen as nn
import pytest

import flaxbn

USES_BATCH_NORM = r"\b(?:nn|linen)\.BatchNorm\b"

# Tests that do what flaxbn rejects by design: they must end in this error, for this reason.
REJECTED = {
    "linen/linen_module_test.py::ModuleTest::test_bind_stateful": pytest.mark.xfail(
        raises=pytest.RaisesExc(ValueError, match="more than one value per channel"),
        reason="trains on a single value per channel: its input has no batch axis",
        strict=True,
    ),
}

stock = nn.BatchNorm
calls: collections.Counter[str] = collections.Counter()


def pytest_configure() -> None:
    nn.BatchNorm = flaxbn.BatchNorm


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    patterns = {module: users_of_batch_norm(module) for module in {item.module for item in items}}
    kept, dropped = [], []
    for item in items:
        uses = patterns[item.module].search(inspect.getsource(inspect.unwrap(item.obj)))
        (kept if uses else dropped).append(item)
        if item.nodeid in REJECTED:
            item.add_marker(REJECTED[item.nodeid])
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


def users_of_batch_norm(module: ModuleType) -> re.Pattern[str]:
    """A pattern of source that uses `nn.BatchNorm`, itself or through classes and functions of its module."""
    sources = {
        name: inspect.getsource(value)
        for name, value in inspect.getmembers(module, lambda value: inspect.isclass(value) or inspect.isfunction(value))
        if value.__module__ == module.__name__ and not name.endswith("Test")
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

    with nn.intercept_methods(count):
        result = yield
    assert calls[item.nodeid], "kept because its source uses nn.BatchNorm, but flaxbn.BatchNorm was never called"
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"flaxbn.BatchNorm was called {calls.total()} times in {len(+calls)} tests")
