"""What a call costs beside computing: programs and transfers, as the profiler of jax counts them."""

import logging
import pathlib
import sys
import threading

import flax.linen as nn
import jax
import numpy as np
import pytest

import flaxbn
from flaxbn.estimation import reuse
from flaxbn.estimation.exact import layer_by_layer

# The events of a CPU's client are counted.
pytestmark = pytest.mark.usefixtures("cpu")

X = np.random.default_rng(0).normal(1.0, 2.0, (48, 4)).astype(np.float32)
BATCHES = 4


class Deep(nn.Module):
    """As many layers as are asked for."""

    layers: int

    @nn.compact
    def __call__(self, x):
        for _ in range(self.layers):
            x = nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x))
        return x


def counted(folder, layers, method, **options):
    """How many programs a second call starts, and how many arrays go to the device and come back."""
    model = Deep(layers)
    variables = jax.jit(model.init)(jax.random.key(0), X[:2])

    def estimate():
        jax.block_until_ready(flaxbn.estimate_population_stats(model, variables, method=method, **options))

    estimate()
    with jax.profiler.trace(folder):
        estimate()
    (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
    lines = [line for plane in jax.profiler.ProfileData.from_file(str(file)).planes for line in plane.lines]
    names = [event.name for line in lines for event in line.events]
    return {what: sum(name in event for event in names) for what, name in EVENTS.items()}


EVENTS = {"programs": "ExecuteHelperOnSingleDevice", "to it": "DevicePut", "from it": "np.asarray(jax.Array)"}


def started(folder, layers, method):
    options = {"batches": X, "batch_size": len(X) // BATCHES, "check_independence": False}
    return counted(folder, layers, method, **options)["programs"]


def test_a_precise_pass_starts_few_programs_however_many_layers(tmp_path):
    """The pass, and one that puts what was found on the device."""
    few, many = started(tmp_path / "few", 2, "precise"), started(tmp_path / "many", 12, "precise")
    assert 0 < few == many <= 5


def test_an_exact_pass_starts_one_for_each_batch_of_each_layer(tmp_path):
    """On a CPU; what merges batches there is no program."""
    few, many = started(tmp_path / "few", 2, "exact"), started(tmp_path / "many", 12, "exact")
    assert many - few == (12 - 2) * BATCHES


def test_the_host_does_little_for_each_layer():
    """Calls of functions, of Python and of C, counted by Python itself: about 100 for a layer and its four leaves."""

    def calls(layers):
        model = Deep(layers)
        variables = jax.jit(model.init)(jax.random.key(0), X[:2])
        data, count = jax.device_put(X), 0

        def on_event(frame, event, argument):
            nonlocal count
            count += event in ("call", "c_call")

        for _ in range(2):
            flaxbn.estimate_population_stats(model, variables, data, batch_size=12)
        sys.setprofile(on_event)
        try:
            flaxbn.estimate_population_stats(model, variables, data, batch_size=12)
        finally:
            sys.setprofile(None)
        return count

    assert 0 < calls(12) - calls(2) <= 10 * 130


def test_an_exact_pass_on_an_accelerator_transfers_as_much_however_many_layers(tmp_path, accelerator):
    """The batches, one of them once more for the check; what is stored and what is found go together, both ways."""
    batches = [X[k::BATCHES] for k in range(BATCHES)]
    few, many = (counted(tmp_path / str(n), n, "exact", batches=batches) for n in (9, 12))
    assert 0 < few["to it"] == many["to it"] <= BATCHES + 1 + 2
    # Of what is stored two arrays come back, one of the moments, two of the check.
    assert 0 < few["from it"] == many["from it"] <= 5
    # One for each batch of each layer, and one that merges them.
    assert many["programs"] - few["programs"] == (12 - 9) * (BATCHES + 1)
    # A copy of each batch that is read; the check, and what lays arrays end to end or cuts them apart.
    assert few["programs"] - 9 * (BATCHES + 1) <= BATCHES + 1 + 5


def test_on_an_accelerator_segments_compile_side_by_side_and_once(monkeypatch, caplog, request, accelerator):
    """What is compiled ahead is what runs: no program more than where each is compiled when it is needed."""
    variables = jax.jit(Deep(4).init)(jax.random.key(0), X[:2])
    threads, compile_lowered = set(), jax.stages.Lowered.compile

    def noted(lowered):
        threads.add(threading.current_thread())
        return compile_lowered(lowered)

    def compiled():
        caplog.clear()
        with caplog.at_level(logging.WARNING, "jax"):
            flaxbn.estimate_population_stats(Deep(4), variables, X, batch_size=12, method="exact")
        return sum("XLA compilation of jit(_measured)" in r.getMessage() for r in caplog.records)

    monkeypatch.setattr(jax.stages.Lowered, "compile", noted)
    jax.config.update("jax_log_compiles", True)  # in all threads, other than the context manager
    request.addfinalizer(lambda: jax.config.update("jax_log_compiles", False))
    ahead = compiled()
    assert threads
    assert threading.current_thread() not in threads
    monkeypatch.setattr(layer_by_layer, "_compile_ahead", lambda *given: None)
    reuse._by_snapshot.clear()
    reuse._by_program.clear()
    assert compiled() == ahead > 1
