"""Arrays and streams cut into batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import OneLayer
from oracle import assert_same_statistics, one_oracle

import flaxbn
from flaxbn.data.batches import strided_rows

X = np.random.default_rng(0).normal(1.0, 2.0, (41, 3, 2)).astype(np.float32)
ONE = OneLayer(flaxbn.BatchNorm)
ONE_VARIABLES = ONE.init(jax.random.key(0), X[:2])


def test_samples_are_cut_exactly():
    evenly = np.arange(10) * 41 // 10
    found = flaxbn.estimate_population_stats(ONE, ONE_VARIABLES, X, batch_size=4, num_samples=10)
    assert_same_statistics(found, one_oracle(X[evenly]), 5e-7)
    stream = iter([X[:8], X[8:16], X[16:24]])
    found = flaxbn.estimate_population_stats(ONE, ONE_VARIABLES, stream, num_samples=10)
    assert_same_statistics(found, one_oracle(X[:10]), 5e-7)
    assert len(next(stream)) == 8


@pytest.mark.parametrize("batch_size", [1, 3, 4, 41, 50])
def test_strided_rows_are_all_samples_in_batches_of_nearly_one_size(batch_size):
    batches = [row for group in strided_rows(41, batch_size) for row in group]
    count = len(batches)
    assert count == -(-41 // batch_size)
    for k, row in enumerate(batches):
        np.testing.assert_array_equal(row, np.arange(k, 41, count))
    assert max(map(len, batches)) - min(map(len, batches)) <= 1


def test_the_last_batch_counts_by_its_size():
    batches = [X[:16], X[16:32], X[32:]]
    for given, options in ((X, {"batch_size": 16}), (iter(batches), {})):
        moments = flaxbn.population_moments(ONE, ONE_VARIABLES, given, **options)["norm"]
        np.testing.assert_array_equal(moments.count, 41 * 3)
        np.testing.assert_allclose(moments.mean, one_oracle(X)["norm"]["mean"], rtol=1e-5)


@pytest.mark.parametrize("method", ["precise", "exact"])
@pytest.mark.parametrize("size", [8, 5])
def test_a_loader_may_fill_one_buffer_again_and_again(method, size):
    """Aligned or not: jax on a CPU takes what is aligned as it is."""

    def loader():
        buffer = np.empty((size, 3, 2), np.float32)
        for i in range(0, 40, size):
            buffer[...] = X[i : i + size]
            yield buffer

    found = flaxbn.estimate_population_stats(ONE, ONE_VARIABLES, loader(), method=method)
    assert_same_statistics(found, one_oracle(X[:40]))


class Counted:
    """A sequence that counts how often it is read as a whole."""

    def __init__(self):
        self.reads = 0

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        self.reads += i == 0
        return X[i]


def test_a_sequence_is_read_once():
    given = Counted()
    found = flaxbn.estimate_population_stats(ONE, ONE_VARIABLES, given, batch_size=10)
    assert_same_statistics(found, one_oracle(X))
    assert given.reads == 1


def donated(x):
    x = jnp.array(x)  # a copy: what is donated may be overwritten
    jax.jit(lambda a: a + 1, donate_argnums=0)(x)
    return x


@pytest.mark.parametrize("method", ["precise", "exact"])
def test_donated_arrays_are_named(method):
    message = r"must hold arrays that are still there: got one that was deleted.*`donate_argnums`"
    for batches, options in ((donated(X), {"batch_size": 10}), ([X[:20], donated(X[20:])], {})):
        with pytest.raises(ValueError, match=f"`batches` {message}"):
            flaxbn.estimate_population_stats(ONE, ONE_VARIABLES, batches, method=method, **options)
    variables = jax.tree.map(donated, ONE_VARIABLES)
    with pytest.raises(ValueError, match=f"`variables` {message}"):
        flaxbn.estimate_population_stats(ONE, variables, X, batch_size=10, method=method)
