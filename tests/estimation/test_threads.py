"""A precise pass on several cores: the same statistics as on one, and the same errors."""

import threading

import jax
import numpy as np
import pytest
from models import MLP, train
from oracle import assert_same_statistics, by_training_mode

import flaxbn
from flaxbn.estimation.threads import cores_for, side_by_side

X = np.random.default_rng(0).normal(1.0, 2.0, (4097, 256)).astype(np.float32)  # 4 MiB: worth two threads and more
MODEL = MLP((8, 6))
VARIABLES = jax.jit(MODEL.init)(jax.random.key(0), X[:2])
CORES = 3


@pytest.fixture(autouse=True)
def _three_cores(monkeypatch):
    """Whatever this machine has: what the operating system says is what is asked."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(CORES)), raising=False)


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


def estimate(x=X, **options):
    return flaxbn.estimate_population_stats(MODEL, VARIABLES, x, batch_size=100, **options)


def test_the_statistics_are_those_of_one_core(threads):
    """41 batches of 100 or 99: the first call compiles and runs them here, the second in threads."""
    first = estimate()
    assert threads <= {threading.main_thread()}
    second = estimate()
    assert threads - {threading.main_thread()}  # one of them may be fast enough to do all
    expected = by_training_mode(MODEL, VARIABLES, [X[k::41] for k in range(41)], train)
    for found in (first, second):
        assert_same_statistics(found, expected)


def test_options_that_hold_for_one_thread(threads):
    with jax.default_matmul_precision("highest"):
        found = [estimate() for _ in range(2)]
    assert threads <= {threading.main_thread()}
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_an_error_names_the_batch():
    x = X.copy()
    x[7 + 2 * 41] = np.nan
    for _ in range(2):
        with pytest.raises(ValueError, match=r"not in batch 7 \(counted from 0\)"):
            estimate(x)


def test_what_a_thread_raises_is_raised():
    def fail(part):
        raise ZeroDivisionError(part)

    with pytest.raises(ZeroDivisionError, match="1"):
        side_by_side(fail, [1, 2], 2, lambda: None)


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
