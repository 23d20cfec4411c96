"""Exact statistics of a stream: the first layer's input is computed while the next batch is read."""

import threading
import time

import flax.linen as nn
import jax
import numpy as np
import pytest

import flaxbn
from flaxbn.estimation.exact import arrival
from flaxbn.estimation.exact.segments import Segment
from flaxbn.estimation.exact.verify import IndependenceCheck

X = np.random.default_rng(0).normal(1.0, 2.0, (24 * 64, 256)).astype(np.float32)
BATCHES = np.split(X, 24)
SEEN = threading.Semaphore(0)


def seen(x):
    SEEN.release()
    return x


class Seen(nn.Module):
    """Two layers, the first of which sees what a function of the host has noticed."""

    @nn.compact
    def __call__(self, x):
        x = jax.pure_callback(seen, x, x)
        for features in (8, 6):
            x = nn.BatchNorm(use_running_average=True)(nn.Dense(features)(x))
        return x


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (8, 6):
            x = nn.BatchNorm(use_running_average=True)(nn.Dense(features)(x))
        return x


VARIABLES = jax.jit(Net().init)(jax.random.key(0), X[:2])


def estimate(batches, model=Net(), **options):  # noqa: B008 - it holds no state
    options = {"check_independence": False, **options}
    return flaxbn.estimate_population_stats(model, VARIABLES, batches, method="exact", **options)


def assert_whole(found, x=X):
    """The statistics of all samples at once, in float64; rounding of float32 through two layers is below 1e-5."""
    x = x.astype(np.float64)
    for i in range(2):
        dense = VARIABLES["params"][f"Dense_{i}"]
        x = x @ np.asarray(dense["kernel"], np.float64) + np.asarray(dense["bias"], np.float64)
        np.testing.assert_allclose(found[f"BatchNorm_{i}"]["mean"], x.mean(0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found[f"BatchNorm_{i}"]["var"], x.var(0), rtol=1e-5)
        x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)


@pytest.mark.parametrize("cores", [1, 3])
def test_batches_are_computed_while_others_are_read(monkeypatch, cores):
    """The loader gives its last batches only when the first ones have been computed."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    while SEEN.acquire(blocking=False):
        pass

    def loader():
        yield from BATCHES[:12]
        for _ in range(6):
            assert SEEN.acquire(timeout=60), "nothing is computed before all is read"
        yield from BATCHES[12:]

    assert_whole(estimate(loader(), Seen()))


@pytest.mark.usefixtures("three_cores")
@pytest.mark.parametrize("limit", [1, 5 * 64 * 8 * 4, 24 * 64 * 8 * 4, None])
def test_memory_limits(limit):
    """Nothing fits after the first layer, or too little, which shows in the middle of the data, or all."""
    assert_whole(estimate(iter(BATCHES), memory_limit=limit))


@pytest.mark.usefixtures("three_cores")
@pytest.mark.parametrize("limit", [1, 5 * 64 * 8 * 4, None])
def test_what_does_not_fit_is_not_held(monkeypatch, limit):
    held = []
    run = arrival.prepare_arriving

    def noted(*arguments):
        batches, kept = run(*arguments)
        held.append(sum(a.nbytes for batch in batches for a in (batch.values or {}).values()))
        assert kept == (held[0] if limit is None else 0)
        return batches, kept

    monkeypatch.setattr("flaxbn.estimation.exact.estimate.prepare_arriving", noted)
    estimate(iter(BATCHES), memory_limit=limit)
    # At most what three threads had under way when the limit was seen; it goes at the first layer.
    assert held[0] == len(X) * 8 * 4 if limit is None else held[0] <= 3 * 64 * 8 * 4


def test_what_checks_that_examples_are_independent_holds_nothing_computed(monkeypatch):
    made = []
    of = IndependenceCheck.of
    monkeypatch.setattr(IndependenceCheck, "of", lambda *given: made.append(of(*given)) or made[0])
    estimate([X], check_independence=True)
    assert [(batch.values, batch.begun) for batch in made[0].batches] == [(None, None)]


@pytest.mark.parametrize(("cores", "ahead"), [(1, 2), (3, 4)])
def test_the_loader_is_not_far_ahead(monkeypatch, cores, ahead):
    """Batches that wait to be computed are held twice, on their way to the device as well."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    done, read, most = [], 0, 0
    measure = arrival.measure_batch

    def slowly(stage, batch):
        time.sleep(0.01)
        moments = jax.block_until_ready(measure(stage, batch))
        done.append(batch.number)
        return moments

    def loader():
        nonlocal read, most
        for batch in BATCHES:
            read += 1
            most = max(most, read - len(done))
            yield batch

    monkeypatch.setattr(arrival, "measure_batch", slowly)
    estimate(loader())
    assert sorted(done) == list(range(24))
    assert most <= ahead


@pytest.mark.usefixtures("three_cores")
def test_batches_of_several_shapes_and_one_alone():
    assert_whole(estimate(iter(np.split(X, [100, 200, 300, 470]))))
    assert_whole(estimate([X]))


def test_weights_of_batches_that_wait():
    weights = np.random.default_rng(1).integers(0, 3, len(X)).astype(np.float32)
    batches = [{"x": x, "w": w} for x, w in zip(BATCHES, np.split(weights, 24))]
    found = estimate(batches, call=lambda model, b: model(b["x"]), sample_weight=lambda b: b["w"])
    assert_whole(found, np.repeat(X, weights.astype(int), axis=0))


@pytest.mark.usefixtures("three_cores")
def test_what_a_loader_raises_ends_the_estimate():
    def loader():
        yield from BATCHES[:7]
        raise OSError("the disk is gone")

    before = threading.active_count()
    with pytest.raises(OSError, match="the disk is gone"):
        estimate(loader())
    assert threading.active_count() == before


@pytest.mark.usefixtures("three_cores")
def test_a_batch_that_is_not_finite_is_named():
    batches = [*BATCHES[:9], np.full_like(BATCHES[9], np.nan), *BATCHES[10:]]
    with pytest.raises(ValueError, match=r"must be finite: .* are not in batch 9 \(counted from 0\)"):
        estimate(iter(batches))


def test_on_an_accelerator_what_has_run_is_not_compiled_ahead(accelerator, monkeypatch):
    """The first call of a stream, and nothing of arrays."""
    lowered = []
    lower = Segment.lower
    monkeypatch.setattr(Segment, "lower", lambda segment, lies: lowered.append(segment) or lower(segment, lies))
    assert_whole(estimate(iter(np.split(X, 16))))  # of a size that no other test has
    assert len(lowered) == 1
    assert_whole(estimate(X, batch_size=96))
    assert len(lowered) == 2


def test_a_layer_that_the_call_never_runs_is_named():
    """Whatever the method and the data, as in precise estimates."""

    class Two(nn.Module):
        def setup(self):
            self.one, self.other = (nn.BatchNorm(use_running_average=True) for _ in range(2))

        def __call__(self, x, other=False):
            return self.other(self.one(x)) if other else self.one(x)

    variables = Two().init(jax.random.key(0), X, other=True)
    options = {"method": "exact", "only": lambda path: path == "other"}
    for data in ({"batches": X, "batch_size": 64}, {"batches": BATCHES}):
        with pytest.raises(ValueError, match="must see data: 'other' saw none"):
            flaxbn.estimate_population_stats(Two(), variables, **data, **options)
