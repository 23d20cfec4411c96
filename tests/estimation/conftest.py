"""What is needed to see threads at work, and what an accelerator would do."""

import threading

import jax
import pytest

from flaxbn.data import placement
from flaxbn.estimation.exact import arrival, layer_by_layer, pieces, verify


@pytest.fixture
def three_cores(monkeypatch):
    """Whatever this machine has: what the operating system says is what is asked."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(3)), raising=False)


@pytest.fixture
def threads(monkeypatch):
    """The threads in which jax is waited for."""
    seen = set()
    wait = jax.block_until_ready

    def noted(value):
        seen.add(threading.current_thread())
        return wait(value)

    monkeypatch.setattr(jax, "block_until_ready", noted)
    return seen


@pytest.fixture
def accelerator(monkeypatch):
    """Every device counts as one."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for module in (placement, arrival, pieces, layer_by_layer, verify):
        monkeypatch.setattr(module, "on_accelerator", lambda tree: True)
