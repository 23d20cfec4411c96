"""A precise pass over batches as they come: in groups, by threads, with the statistics of one batch after the other."""

import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import MLP, train
from oracle import assert_same_statistics, by_training_mode

import flaxbn
from flaxbn.estimation.stream import in_group
from flaxbn.estimation.threads import Lanes

pytestmark = pytest.mark.usefixtures("three_cores")
X = np.random.default_rng(0).normal(1.0, 2.0, (2048, 256)).astype(np.float32)
MODEL = MLP((8, 6))
VARIABLES = jax.jit(MODEL.init)(jax.random.key(0), X[:2])


def cut(*sizes):
    """Batches of these sizes."""
    return np.split(X[: sum(sizes)], np.cumsum(sizes)[:-1])


def estimate(batches, **options):
    return flaxbn.estimate_population_stats(MODEL, VARIABLES, batches, **options)


@pytest.mark.parametrize(
    "sizes", [(64,), (64,) * 5, (64,) * 31, (64, 64, 70) * 8, (70, 64) * 4 + (80, 90, 100, 110, 120)]
)
@pytest.mark.parametrize("reads", [list, iter])
def test_the_statistics_are_those_of_one_batch_after_the_other(sizes, reads):
    """Groups that are full, that are not, and more shapes than may be open at once."""
    batches = cut(*sizes)
    assert_same_statistics(estimate(reads(batches)), by_training_mode(MODEL, VARIABLES, batches, train))


def test_batches_are_computed_in_threads_one_like_another(threads):
    first = estimate(cut(*[64] * 24))
    assert threads - {threading.main_thread()}
    jax.tree.map(np.testing.assert_array_equal, first, estimate(cut(*[64] * 24)))
    before = threading.active_count()
    estimate(iter(cut(*[64] * 24)))
    assert threading.active_count() == before


def test_small_batches_are_not_worth_a_thread(threads):
    estimate(cut(*[63] * 24))  # of less than 64 KiB
    assert threads <= {threading.main_thread()}


def test_options_that_hold_for_one_thread(threads):
    with jax.default_matmul_precision("highest"):
        estimate(cut(*[64] * 8))
    assert threads <= {threading.main_thread()}


@pytest.mark.parametrize("bad", [0, 9, 23])
def test_an_error_names_the_batch_and_ends_the_threads(bad):
    batches = [batch.copy() for batch in cut(*[64] * 24)]
    batches[bad][3] = np.inf
    before = threading.active_count()
    with pytest.raises(ValueError, match=rf"not in batch {bad} \(counted from 0\)"):
        estimate(batches)
    assert threading.active_count() == before


def test_a_loader_that_fails_is_what_is_raised():
    """Not what came of the batches before it; and its threads end."""

    def load():
        yield from cut(*[64] * 9)
        raise ConnectionError("the disk is gone")

    before = threading.active_count()
    with pytest.raises(ConnectionError, match="the disk is gone"):
        estimate(load())
    assert threading.active_count() == before


TABLES = {"a": jnp.arange(3.0)[None], "b": jnp.float32([[-10.0, 0.0, 10.0]])}


@pytest.mark.parametrize("method", ["precise", "exact"])
def test_names_choose_among_arrays_that_are_closed_over(method):
    """One program serves all, with other arrays: batches of either name are not to get the other's."""
    model = nn.BatchNorm(use_running_average=True)
    x = X[:64, :3].reshape(8, 8, 3)
    variables = model.init(jax.random.key(0), x[0])
    batches = [{"x": one, "site": "ab"[i % 2]} for i, one in enumerate(x)]
    moved = np.concatenate([one + np.asarray(TABLES["ab"[i % 2]], np.float64) for i, one in enumerate(x)])
    weights = {"a": jnp.full(8, 1.0), "b": jnp.full(8, 3.0)}
    for weigh, each in ((None, [1, 1]), (lambda b: weights[b["site"]], [1, 3])):
        found = flaxbn.estimate_population_stats(
            model,
            variables,
            batches,
            method=method,
            call=lambda m, b: m(b["x"] + TABLES[b["site"]]),
            sample_weight=weigh,
        )
        counts = np.repeat(np.tile(each, 4), 8)
        mean = np.average(moved, 0, counts)
        np.testing.assert_allclose(found["mean"], mean, rtol=1e-5)
        np.testing.assert_allclose(found["var"], np.average((moved - mean) ** 2, 0, counts), rtol=1e-5)


def test_a_loader_that_donates_what_it_gave():
    """A batch is taken as it was when it was given, whatever becomes of its buffer."""
    step = jax.jit(lambda x: x + 1, donate_argnums=0)

    def load():
        x = jnp.asarray(X[:64])
        for _ in range(9):
            yield x
            x = step(x)

    expected = by_training_mode(MODEL, VARIABLES, [X[:64] + np.float32(i) for i in range(9)], train)
    assert_same_statistics(estimate(load()), expected)


class LengthUnknown(list):
    """As loaders of streams are."""

    def __len__(self):
        raise TypeError("object of type 'IterableDataset' has no len()")


def test_a_length_that_raises_is_not_known():
    batches = cut(64, 64, 64)
    assert_same_statistics(estimate(LengthUnknown(batches)), by_training_mode(MODEL, VARIABLES, batches, train))


def test_few_large_batches_are_held():
    """As many as there are lanes, one that waits and one that is read; here of 64 MiB."""
    assert in_group(None, 2, 2**26) == 1
    assert in_group(100, 8, 2**23) == 3


@pytest.mark.parametrize(
    ("batches", "lanes", "size"),
    [(None, 2, 4), (0, 2, 4), (1, 2, 1), (10, 2, 3), (16, 2, 4), (20, 2, 4), (9, 1, 3)],
)
def test_lanes_get_equal_shares_where_the_number_is_known(batches, lanes, size):
    assert in_group(batches, lanes, 2**16) == size


def test_a_lane_does_its_parts_in_their_order():
    done = []

    def compute(lane, part):
        done.append((lane, part))
        return 10 * part

    with Lanes(2, lambda: None) as lanes:
        assert [*lanes.each(compute, range(20), lambda part: True)] == [10 * i for i in range(20)]
    for lane in range(2):
        assert [part for own, part in done if own == lane] == [*range(lane, 20, 2)]


def test_what_is_not_compiled_is_computed_here_and_alone():
    under_way, here = set(), []

    def compute(lane, part):
        under_way.add(part)
        if threading.current_thread() is threading.main_thread():
            here.append((part, set(under_way)))
        under_way.remove(part)

    with Lanes(2, lambda: None) as lanes:
        assert len([*lanes.each(compute, range(20), lambda part: part % 7 > 0)]) == 20
    assert here == [(part, {part}) for part in (0, 7, 14)]


def fail(lane, part):
    if part == 3:
        raise ZeroDivisionError(part)


def test_what_a_lane_raises_is_raised():
    with Lanes(2, lambda: None) as lanes, pytest.raises(ZeroDivisionError, match="3"):
        [*lanes.each(fail, range(20), lambda part: True)]


def test_what_a_lane_raised_comes_before_what_the_next_part_raises():
    def parts():
        yield from range(4)
        raise ConnectionError("the disk is gone")

    with Lanes(2, lambda: None) as lanes, pytest.raises(ZeroDivisionError, match="3"):
        [*lanes.each(fail, parts(), lambda part: True)]
