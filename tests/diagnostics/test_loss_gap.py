"""What the choice of statistics does to the loss, against the model's own modes in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import MLP

import flaxbn
from flaxbn.diagnostics.loss_gap import gap

RNG = np.random.default_rng(0)
NET = MLP(outputs=3, momentum=0.9)
X = RNG.normal(size=(256, 4)).astype(np.float32)
LABELS = RNG.integers(0, 3, 256)
VARIABLES = jax.jit(NET.init)(jax.random.key(0), X[:2])


def cross_entropy(logits, batch):
    logs = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(logs, batch["label"][:, None], axis=1)[:, 0]


def call(module, batch):
    return module(batch["x"])


DATA = {"x": X, "label": LABELS, "domain": np.arange(256) % 2}


VALIDATION = {"x": X[::-1][:100] + 1, "label": LABELS[:100], "domain": np.arange(100) % 2}


def oracle(batch, train):
    """Losses by the model's own modes."""
    logits = NET.apply(VARIABLES, batch["x"], train=train, mutable=["batch_stats"])[0]
    return np.asarray(cross_entropy(logits, batch), np.float64)


def cut(arrays, size):
    return [jax.tree.map(lambda a, i=i: a[i : i + size], arrays) for i in range(0, len(arrays["label"]), size)]


def gap_by_domain(validation):
    options = {"call": call, "batch_size": 64, "domain": lambda batch: batch["domain"]}
    return gap(NET, VARIABLES, DATA, cross_entropy, validation=validation, **options)


class TestGap:
    @pytest.mark.parametrize("given", ["arrays", "stream"])
    def test_against_the_modes_of_the_model(self, given):
        batches, validation, options = DATA, VALIDATION, {"batch_size": 48}
        if given == "stream":
            batches, validation, options = iter(cut(DATA, 48)), iter(cut(VALIDATION, 48)), {}
        found = gap(NET, VARIABLES, batches, cross_entropy, call=call, validation=validation, **options)
        assert found.keys() == {None}
        training = DATA if given == "stream" else jax.tree.map(lambda a: a[:240], DATA)  # five full batches of 48
        by_batch = np.concatenate([oracle(batch, True) for batch in cut(training, 48)])
        stored, other = oracle(training, False), oracle(VALIDATION, False)
        record = found[None]
        assert record.samples == len(stored)
        np.testing.assert_allclose(record.batch, by_batch.mean(), rtol=1e-5)
        np.testing.assert_allclose(record.stored, stored.mean(), rtol=1e-5)
        np.testing.assert_allclose(record.validation, other.mean(), rtol=1e-5)
        np.testing.assert_allclose(record.normalization, (stored - by_batch).mean(), rtol=1e-4)
        np.testing.assert_allclose(record.rest, other.mean() - stored.mean(), rtol=1e-4)
        deviation = stored - by_batch - np.mean(stored - by_batch)
        sums = [deviation[i : i + 48].sum() for i in range(0, len(stored), 48)]
        factor = len(sums) / (len(sums) - 1)
        np.testing.assert_allclose(record.error, np.sqrt(factor * np.sum(np.square(sums))) / len(stored), rtol=1e-4)

    def test_the_error_is_that_of_repetitions(self):
        """Forty sets of data: their gaps spread as each of them says of itself."""
        batch_stats = flaxbn.estimate_population_stats(NET, VARIABLES, RNG.normal(size=(4096, 4)), batch_size=512)
        variables = {**VARIABLES, "batch_stats": batch_stats}
        sets = RNG.normal(size=(40, 512, 4)).astype(np.float32)

        @functools.cache
        def run(k):
            return gap(NET, variables, sets[k], lambda output, batch: output.sum(-1), batch_size=16)[None]

        spread = np.std([run(k).normalization for k in range(40)])
        said = np.sqrt(np.mean([run(k).error ** 2 for k in range(40)]))
        # Forty values have a standard deviation that is good to a ninth.
        np.testing.assert_allclose(said, spread, rtol=0.35)

    def test_one_batch_has_no_error(self):
        found = gap(NET, VARIABLES, [DATA], cross_entropy, call=call)[None]
        assert np.isnan(found.error)

    def test_by_domain(self):
        found = gap_by_domain(VALIDATION)
        assert found.keys() == {None, 0, 1}
        by_batch = np.concatenate([oracle(batch, True) for batch in cut(DATA, 64)])
        for label in (0, 1):
            np.testing.assert_allclose(found[label].batch, by_batch[DATA["domain"] == label].mean(), rtol=1e-5)
            there = oracle(VALIDATION, False)[VALIDATION["domain"] == label]
            np.testing.assert_allclose(found[label].validation, there.mean(), rtol=1e-5)
            assert found[label].samples == 128

    def test_a_domain_without_validation_data(self):
        some = jax.tree.map(lambda a: a[VALIDATION["domain"] == 0], VALIDATION)
        found = gap_by_domain(some)
        assert found[1].validation is None
        assert found[1].rest is None

    def test_population_statistics_close_the_gap_of_a_network(self):
        shifted = {**DATA, "x": 3 * X + 2}
        batch_stats = flaxbn.estimate_population_stats(NET, VARIABLES, shifted["x"], batch_size=128)
        stale, fresh = (
            gap(NET, variables, shifted, cross_entropy, call=call, batch_size=128)[None]
            for variables in (VARIABLES, {**VARIABLES, "batch_stats": batch_stats})
        )
        assert abs(stale.normalization) > 5 * stale.error
        assert abs(fresh.normalization) < abs(stale.normalization) / 5

    @pytest.mark.parametrize(
        ("loss_fn", "options", "message"),
        [
            (lambda logits, batch: logits, {}, r"`loss_fn` must give one value for each example, shape \(64,\): got"),
            (
                cross_entropy,
                {"domain": lambda batch: 3},
                r"`domain` must give one value for each example, shape \(64,\)",
            ),
        ],
    )
    def test_errors(self, loss_fn, options, message):
        with pytest.raises(ValueError, match=message):
            gap(NET, VARIABLES, DATA, loss_fn, call=call, batch_size=64, **options)

    def test_no_data(self):
        with pytest.raises(ValueError, match="at least one"):
            gap(NET, VARIABLES, iter([]), cross_entropy)
