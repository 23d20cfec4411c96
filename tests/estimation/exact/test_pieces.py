"""Arrays are cut otherwise than asked where that is faster; what is found, and what is said, stays the same."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from models import train
from oracle import assert_same_statistics, by_training_mode

import flaxbn
from flaxbn.data.batches import Arrays
from flaxbn.estimation.exact import pieces
from flaxbn.estimation.exact.segments import Segment

WIDTH = 8192  # 32 KiB a sample between the layers: 96 samples in a piece


class Wide(nn.Module):
    """Two layers with much between them."""

    rows: int | None = None

    @nn.compact
    def __call__(self, x, train=False):
        if self.rows is not None:
            x = x.reshape(self.rows, -1)
        x = nn.Dense(WIDTH, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.0)(x))
        return nn.BatchNorm(use_running_average=not train, momentum=0.0)(x)


X = np.random.default_rng(0).normal(1.0, 2.0, (480, 2)).astype(np.float32)
MODEL = Wide()
VARIABLES = jax.jit(MODEL.init)(jax.random.key(0), X[:2])
WHOLE = by_training_mode(MODEL, VARIABLES, [X], train)


def estimate(x=X, model=MODEL, **options):
    return flaxbn.estimate_population_stats(model, VARIABLES, x, **({"batch_size": 240, "method": "exact"} | options))


def planned(model=MODEL, **options):
    return flaxbn.plan(model, VARIABLES, X, **({"batch_size": 240} | options)).batches


@pytest.mark.usefixtures("cpu")
def test_smaller_pieces_on_a_cpu():
    assert planned() == 5  # of 96 each
    assert_same_statistics(estimate(), WHOLE)


@pytest.mark.usefixtures("cpu")
def test_a_memory_limit_makes_them_smaller_on_a_cpu(monkeypatch):
    """Of three arrays under way on each of two cores each takes a twentieth of the limit, or less."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert planned(memory_limit=20 * 24 * 4 * WIDTH) == 20  # of 24 each
    assert planned(memory_limit=2**30) == 5
    assert_same_statistics(estimate(memory_limit=20 * 24 * 4 * WIDTH), WHOLE)


@pytest.mark.usefixtures("cpu")
def test_a_memory_limit_leaves_enough_samples_to_tell_whether_they_affect_each_other(monkeypatch):
    monkeypatch.setattr(pieces, "_LEAST", 1)
    assert planned(memory_limit=1) == 60  # of 8 each
    with pytest.raises(flaxbn.BatchDependenceError):
        estimate(memory_limit=1, call=lambda module, x: module(x + jax.numpy.roll(x, len(x) // 4, 0)))


def test_a_memory_limit_makes_them_smaller_on_an_accelerator(accelerator):
    assert planned(batch_size=40, memory_limit=8 * 120 * 4 * WIDTH) == 4  # of 120 each
    assert planned(batch_size=40, memory_limit=1) == 12  # as asked


def test_larger_pieces_on_an_accelerator(accelerator):
    assert planned(batch_size=40) == 1
    assert_same_statistics(estimate(batch_size=40), WHOLE)


@pytest.mark.usefixtures("cpu")
def test_the_check_on_a_cpu_runs_two_batches_more(monkeypatch):
    """What it compares them with the run has found."""
    ran, measure = [], Segment.measure
    monkeypatch.setattr(Segment, "measure", lambda segment, *given: ran.append(segment) or measure(segment, *given))
    estimate()
    assert len(ran) == 2 * (5 + 2)  # of two layers, 5 pieces
    with pytest.raises(flaxbn.BatchDependenceError):
        estimate(call=lambda module, x: module(x - x.mean(0, keepdims=True)))


def test_the_check_on_an_accelerator_reads_a_few_examples(accelerator, monkeypatch):
    """Of a piece that holds all of the data; on the host that would be copied once more."""
    read, take = [], Arrays.take
    monkeypatch.setattr(Arrays, "take", lambda data, places: read.append(places.tolist()) or take(data, places))
    estimate(batch_size=40)
    assert read == [list(range(480)), list(range(128))]
    with pytest.raises(flaxbn.BatchDependenceError):
        estimate(batch_size=40, call=lambda module, x: module(x - x.mean(0, keepdims=True)))


def test_the_check_on_an_accelerator_is_of_examples_that_have_weight(accelerator):
    """The first ones, which it takes, count for nothing; nothing is computed with the size of the batch."""
    with pytest.raises(flaxbn.BatchDependenceError):
        estimate(
            batch_size=480,
            sample_weight=lambda x: jax.numpy.arange(len(x)) >= 200,
            call=lambda module, x: module(x + x[::-1]),
        )


def test_pieces_are_of_one_size_if_that_takes_few_more():
    assert pieces._even_size(480, 96) == 96
    assert pieces._even_size(480, 100) == 96
    assert pieces._even_size(491, 100) == 99  # prime: of two sizes


@pytest.mark.usefixtures("cpu")
def test_what_is_cut_as_it_was_asked_for():
    weights = {"sample_weight": lambda batch: np.ones(len(batch), np.float32)}
    assert planned(**weights) == 2
    assert planned(rngs={"noise": jax.random.key(0)}) == 2
    assert planned(Wide(rows=240)) == 2  # which takes no other batches
    assert planned(batch_size=120) == 4  # near enough


def test_the_error_names_the_batch_that_was_asked_for():
    x = X.copy()
    x[1 + 2 * 200] = np.nan
    with pytest.raises(ValueError, match=r"not in batch 1 \(counted from 0\)"):
        estimate(x)


def test_without_a_check_batches_are_whole():
    """A model that must have whole batches, which mixes their halves, is estimated with them."""

    def call(module, x):
        return module(x + x[np.arange(len(x)) - 120])

    found = estimate(call=call, check_independence=False)
    mixed = np.concatenate([b + np.roll(b, 120, 0) for b in (X[::2], X[1::2])])
    assert_same_statistics(found, by_training_mode(MODEL, VARIABLES, [mixed], train))
    with pytest.raises(flaxbn.BatchDependenceError):
        estimate(call=call)


@pytest.mark.parametrize("batch_size", [240, 5])
def test_nothing_waits_on_an_accelerator(accelerator, monkeypatch, batch_size):
    """All batches of all layers are started, and what is found is fetched once; batches of 5 are merged in chunks."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0}, raising=False)  # threads are for CPUs
    seen = []
    batches = [X[k :: 480 // batch_size] for k in range(480 // batch_size)]
    estimate(batches, batch_size=None, check_independence=False)  # traces, which looks at numbers of entries
    for name in ("block_until_ready", "device_get"):
        wait = getattr(jax, name)

        def noted(value, name=name, wait=wait):
            seen.extend([name] * any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value)))
            return wait(value)

        monkeypatch.setattr(jax, name, noted)
    found = estimate(batches, batch_size=None, check_independence=False)
    assert_same_statistics(found, WHOLE)
    # Beside that what is stored is fetched before, once.
    assert seen.count("device_get") == 2
    assert seen.count("block_until_ready") <= max(0, 480 // batch_size - 8)  # while data is read, 8 batches ahead
