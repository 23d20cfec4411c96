"""A precise pass on several cores: the same statistics as on one, and the same errors."""

import threading
import time

import flax.linen as nn
import jax
import numpy as np
import pytest
from models import MLP, train
from oracle import assert_same_statistics, by_training_mode

import flaxbn
from flaxbn.estimation.threads import Cores, cores_for

X = np.random.default_rng(0).normal(1.0, 2.0, (4097, 256)).astype(np.float32)  # 4 MiB: worth two threads and more
MODEL = MLP((8, 6))
VARIABLES = jax.jit(MODEL.init)(jax.random.key(0), X[:2])
CORES = 3  # of `three_cores`
pytestmark = pytest.mark.usefixtures("three_cores")


def estimate(x=X, **options):
    return flaxbn.estimate_population_stats(MODEL, VARIABLES, x, batch_size=100, **options)


def test_the_statistics_are_those_of_one_core(threads):
    """41 batches of 100 or 99; the first call compiles here, and runs them in threads as any other."""
    first = estimate()
    assert threads - {threading.main_thread()}  # one of them may be fast enough to do all
    second = estimate()
    jax.tree.map(np.testing.assert_array_equal, first, second)
    expected = by_training_mode(MODEL, VARIABLES, [X[k::41] for k in range(41)], train)
    for found in (first, second):
        assert_same_statistics(found, expected)


def test_exact_statistics_are_those_of_one_core(threads, monkeypatch):
    found = estimate(method="exact")
    assert threads - {threading.main_thread()}
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0}, raising=False)
    assert_same_statistics(found, estimate(method="exact"))
    assert_same_statistics(found, by_training_mode(MODEL, VARIABLES, [X], train))


@pytest.mark.parametrize("method", ["precise", "exact"])
def test_options_that_hold_for_one_thread(threads, method):
    with jax.default_matmul_precision("highest"):
        found = [estimate(method=method) for _ in range(2)]
    assert threads <= {threading.main_thread()}
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize("method", ["precise", "exact"])
@pytest.mark.parametrize("batch", [7, 40])
def test_an_error_names_the_batch(method, batch):
    x = X.copy()
    x[batch + 41] = np.nan
    with pytest.raises(ValueError, match=rf"not in batch {batch} \(counted from 0\)"):
        estimate(x, method=method)


def test_what_a_thread_raises_is_raised():
    def fail(part):
        raise ZeroDivisionError(part)

    with Cores(2, lambda: None) as cores, pytest.raises(ZeroDivisionError, match="1"):
        cores.each(fail, [1, 2])


def test_threads_end_with_the_estimate():
    before = threading.active_count()
    with Cores(2, lambda: None) as cores:
        assert cores.each(lambda part: part + 1, [1, 2]) == [2, 3]
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("batches", "nbytes", "cores"),
    [(100, 2**30, CORES), (5, 2**30, 2), (1, 2**30, 1), (100, 2**21, 2), (100, 10, 1)],
)
def test_how_many(batches, nbytes, cores):
    assert cores_for(jax.device_put(X[:1], jax.devices("cpu")[0]), batches, nbytes) == cores


def test_several_devices_are_no_work_for_threads(threads, devices):
    """Their programs exchange what they find, in the order in which they were started."""
    spread = jax.device_put(X[:4096], flaxbn.data_sharding())
    assert cores_for((VARIABLES, spread), 100, 2**30) == 1
    for _ in range(2):
        found = estimate(spread)
    assert threads <= {threading.main_thread()}
    assert_same_statistics(found, by_training_mode(MODEL, VARIABLES, [X[k:4096:41] for k in range(41)], train))


class Asking(nn.Module):
    """A layer whose input a function of the host has made."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x)
        return nn.BatchNorm(use_running_average=True)(jax.pure_callback(asked, x, x))


UNDER_WAY, MOST = [], []


def asked(x):
    UNDER_WAY.append(x)
    time.sleep(0.005)
    MOST.append(len(UNDER_WAY))
    UNDER_WAY.pop()
    return x


@pytest.mark.parametrize("method", ["precise", "exact"])
@pytest.mark.parametrize("form", [np.asarray, np.split, lambda x, parts: iter(np.split(x, parts))])
def test_what_calls_functions_of_the_host_runs_one_after_the_other(method, form):
    """Of two at once each may wait for the other for ever, where they look at their arrays."""
    model, options = Asking(), {}
    variables = jax.jit(model.init)(jax.random.key(0), X[:2])
    data = X[:4096]
    if form is np.asarray:
        options = {"batch_size": 256}
    else:
        data = form(data, 16)
    MOST.clear()
    flaxbn.estimate_population_stats(model, variables, data, method=method, **options)
    assert len(MOST) >= 16
    assert max(MOST) == 1
