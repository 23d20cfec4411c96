"""A harsh climate: simulated devices, no silent rank promotion, warnings are errors (see pyproject.toml)."""

import os
import pathlib
import tempfile

import chex
import hypothesis
import jax
import numpy as np
import pytest

import flaxbn
from flaxbn.estimation.recompiled import compiled_shapes

NUM_DEVICES = 8
# What the workers of one run and the scripts that they start compile, so that it is compiled once.
_compiled = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
CACHE = os.environ.setdefault("FLAXBN_TESTS_CACHE", _compiled.name)

jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# What is public is loaded when it is asked for, and only then found by doctest where it says that it is from.
for _name in dir(flaxbn):
    getattr(flaxbn, _name)

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def _fresh_trace_counter():
    chex.clear_trace_counter()


@pytest.fixture(autouse=True)
def _nothing_compiled_yet():
    """What other tests compiled is no reason to warn this one."""
    compiled_shapes.clear()


@pytest.fixture(autouse=True)
def _same_numbers(request):
    """What a test draws does not depend on which tests its process ran before."""
    if hasattr(request.module, "RNG"):
        request.module.RNG = np.random.default_rng(0)


@pytest.fixture
def devices() -> list[jax.Device]:
    """Eight devices; a machine whose accelerator has fewer skips the test."""
    found = jax.devices()
    if len(found) < NUM_DEVICES:
        pytest.skip(f"needs {NUM_DEVICES} devices, {found[0].platform} has {len(found)}")
    return found[:NUM_DEVICES]


@pytest.fixture
def cpu() -> None:
    """For what counts the pieces, programs or bytes of a CPU: accelerators have others."""
    if (platform := jax.devices()[0].platform) != "cpu":
        pytest.skip(f"counts what a CPU does, this is a {platform}")


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """Real data sets: $FLAXBN_DATA, or shared/data beside the repository."""
    beside = pathlib.Path(__file__).parents[2] / "shared" / "data"
    path = pathlib.Path(os.environ.get("FLAXBN_DATA", beside))
    if not path.is_dir():
        pytest.skip(f"no data at {path}; set FLAXBN_DATA")
    return path


def pytest_collection_modifyitems(items):
    """What starts processes begins first: it takes longest, and does not use a core all the time."""
    items.sort(key=lambda item: not {"scripts", "test_processes.py"} & set(item.path.parts))
