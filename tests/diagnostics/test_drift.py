"""What diagnostics measure, against float64, against theory, and against the model's own training mode."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxbn
from flaxbn.diagnostics.drift import compare
from flaxbn.diagnostics.loss_gap import gap
from flaxbn.diagnostics.noise import batch_noise

RNG = np.random.default_rng(0)
EPSILON = 1e-5


def moments_of(x, axes=(0,)):
    """In float64, as the float32 that are stored."""
    x = np.asarray(x, np.float64)
    count = np.full(np.delete(x.shape, axes), np.prod([x.shape[a] for a in axes]), np.float32)
    return flaxbn.Moments(count, x.mean(axes).astype(np.float32), x.var(axes).astype(np.float32))


class Net(nn.Module):
    """Two stock layers."""

    features: tuple[int, ...] = (6, 5)

    @nn.compact
    def __call__(self, x, train=False):
        for features in self.features:
            x = nn.Dense(features)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(3)(x)


NET = Net()
X = RNG.normal(size=(256, 4)).astype(np.float32)
LABELS = RNG.integers(0, 3, 256)
VARIABLES = jax.jit(NET.init)(jax.random.key(0), X[:2])


class TestCompare:
    def test_every_number(self):
        """Two parts of five channels, by hand."""
        parts = [RNG.normal(3, 2, (n, 5)) for n in (40, 60)]
        whole = np.concatenate(parts)
        kept = {"mean": RNG.normal(3, 1, 5).astype(np.float32), "var": RNG.uniform(1, 8, 5).astype(np.float32)}
        (record,) = compare({"norm": kept}, [{"norm": moments_of(part)} for part in parts])
        std = np.sqrt(whole.var(0) + EPSILON)
        shift = np.abs(kept["mean"] - whole.mean(0)) / std
        ratio = np.abs(np.log((kept["var"] + EPSILON) / std**2))
        squares = [(len(p) / 100) ** 2 * (p.mean(0) - whole.mean(0)) ** 2 for p in parts]
        var_squares = [(len(p) / 100) ** 2 * (p.var(0) - whole.var(0)) ** 2 for p in parts]
        expected = {
            "shift": [np.median(shift), np.percentile(shift, 95), shift.max()],
            "log_ratio": [np.median(ratio), np.percentile(ratio, 95), ratio.max()],
            "rms_shift": np.sqrt(np.mean(shift**2)),
            "rms_log_ratio": np.sqrt(np.mean(ratio**2)),
            "shift_error": np.sqrt(np.mean(2 * sum(squares) / std**2)),
            "log_ratio_error": np.sqrt(np.mean(2 * sum(var_squares) / std**4)),
        }
        assert (record.layer, record.channels, record.dead, record.count) == ("norm", 5, 0, 100)
        for name, value in expected.items():
            found = getattr(record, name)
            found = [found.median, found.p95, found.worst] if name in ("shift", "log_ratio") else found
            np.testing.assert_allclose(found, value, rtol=1e-4)  # differences of means that float32 stores

    def test_the_error_of_one_tree_takes_positions_for_independent(self):
        x = RNG.normal(size=(1000, 50))
        (record,) = compare({"norm": {"mean": x.mean(0), "var": x.var(0)}}, {"norm": moments_of(x)})
        np.testing.assert_allclose(record.shift_error, 1 / np.sqrt(1000), rtol=1e-3)
        np.testing.assert_allclose(record.log_ratio_error, np.sqrt(2 / 1000), rtol=1e-3)

    def test_the_error_of_parts_sees_that_pixels_are_alike(self):
        """400 images of 25 equal pixels are 400 samples; parts say so, the count does not."""
        images = np.repeat(RNG.normal(size=(400, 1, 200)), 25, axis=1)
        parts = [{"norm": moments_of(images[k::10], (0, 1))} for k in range(10)]
        kept = {"norm": {"mean": np.zeros(200), "var": np.ones(200)}}
        (by_parts,), (by_count,) = compare(kept, parts), compare(kept, flaxbn.merge(*parts))
        # 200 channels of 9 degrees of freedom each: 2.4 % for the standard error of the root mean square.
        np.testing.assert_allclose(by_parts.shift_error, 1 / 20, rtol=0.1)
        np.testing.assert_allclose(by_parts.log_ratio_error, np.sqrt(2 / 400), rtol=0.1)
        np.testing.assert_allclose(by_count.shift_error, 1 / 100, rtol=0.1)

    @pytest.mark.parametrize(
        ("shift", "ratio", "significant"),
        [(0, 1, False), (1, 1, True), (0, 1.5, True), (0, np.nan, True), (np.nan, 1, True)],
    )
    def test_drift_is_told_apart_from_noise(self, shift, ratio, significant):
        parts = [{"norm": moments_of(RNG.normal(size=(100, 20)))} for _ in range(8)]
        (record,) = compare({"norm": {"mean": np.full(20, shift), "var": np.full(20, ratio)}}, parts)
        assert record.is_significant == significant

    def test_dead_channels_are_counted_and_left_out(self):
        x = RNG.normal(size=(100, 4)) * [1, 0, 1e-4, 1]
        stored = {"mean": np.array([1, 7, 7, 1]), "var": np.ones(4)}
        (record,) = compare({"norm": stored}, {"norm": moments_of(x)})
        (alive,) = compare({"norm": {k: v[[0, 3]] for k, v in stored.items()}}, {"norm": moments_of(x[:, [0, 3]])})
        assert (record.dead, alive.dead) == (2, 0)
        assert (record.rms_shift, record.shift, record.log_ratio_error) == (
            alive.rms_shift,
            alive.shift,
            alive.log_ratio_error,
        )
        (none,) = compare({"norm": stored}, {"norm": moments_of(0 * x)})
        assert (none.dead, none.rms_shift, none.is_significant) == (4, 0, False)

    def test_rows_that_some_parts_did_not_see(self):
        """Domain 1 is in one part of three only: its error is that of a count, and domain 0's that of two parts."""
        seen = [(0, 1), (0,), ()]
        parts = []
        for domains in seen:
            rows = [
                moments_of(RNG.normal(size=(400, 50)))
                if d in domains
                else flaxbn.Moments(*np.zeros((3, 50), np.float32))
                for d in range(2)
            ]
            parts.append({"norm": flaxbn.Moments(*(np.stack(fields) for fields in zip(*rows)))})
        kept = {"norm": {"mean": np.zeros((2, 50)), "var": np.ones((2, 50))}}
        first, second = compare(kept, parts)
        np.testing.assert_allclose(first.shift_error, 1 / np.sqrt(800), rtol=0.3)  # one degree of freedom, 50 channels
        np.testing.assert_allclose(second.shift_error, 1 / np.sqrt(400), rtol=0.02)

    def test_no_parts(self):
        with pytest.raises(ValueError, match="must be moments, or a list of them: got an empty list"):
            compare({}, [])

    def test_share(self):
        """At first order the mean square change of a normalized value."""
        z, mean, var = RNG.normal(size=200_000), 0.03, 1.04
        change = np.mean(((z - mean) / np.sqrt(var) - z) ** 2)
        kept = {"norm": {"mean": np.array([mean]), "var": np.array([var])}}
        (record,) = compare(kept, {"norm": flaxbn.Moments(*np.float32([[1e6], [0], [1]]))})
        np.testing.assert_allclose(record.share, change, rtol=0.05)

    def test_rows_of_domains_are_records_of_their_own(self):
        rows = [moments_of(RNG.normal(i, 1, (50, 4))) for i in range(3)]
        rows[1] = flaxbn.Moments(*np.zeros((3, 4), np.float32))  # saw nothing
        stacked = flaxbn.Moments(*(np.stack(fields) for fields in zip(*rows)))
        kept = {"mean": np.zeros((3, 4)), "var": np.ones((3, 4))}
        records = compare({"a": {"norm": kept}}, {"a": {"norm": stacked}})
        assert [record.layer for record in records] == ["a/norm[0]", "a/norm[2]"]
        assert records[1].rms_shift > records[0].rms_shift + 1

    def test_a_real_model(self):
        """A running average after one step against the population: what it moved by is known."""
        population = flaxbn.population_moments(NET, VARIABLES, X, batch_size=256)
        first, second = compare(VARIABLES["batch_stats"], population)
        assert (first.layer, second.layer) == ("BatchNorm_0", "BatchNorm_1")
        again = flaxbn.to_batch_stats(population, VARIABLES["batch_stats"])
        assert max(record.rms_shift for record in compare(again, population)) < 1e-6

    def test_a_layer_that_is_not_stored(self):
        with pytest.raises(
            ValueError, match=r"must hold the layers of `population` in their shapes: 'norm' has moments"
        ):
            compare({"other": {"mean": np.zeros(2), "var": np.ones(2)}}, {"norm": moments_of(np.zeros((4, 2)))})


class TestBatchNoise:
    @pytest.mark.parametrize("batch_size", [8, 32])
    def test_normal_samples(self, batch_size):
        """A mean of B normal samples strays by 1/sqrt(B), a biased variance by sqrt(2/B - 1/B^2)."""
        net = Net(features=(400,))
        x = RNG.normal(size=(64 * batch_size, 400)).astype(np.float32)
        variables = {**net.init(jax.random.key(0), x[:2])}
        variables["params"]["Dense_0"]["kernel"] = jnp.eye(400)
        (record,) = batch_noise(net, variables, x, batch_size=batch_size)
        # 400 channels of 64 batches: a percent.
        np.testing.assert_allclose(record.mean, batch_size**-0.5, rtol=0.03)
        np.testing.assert_allclose(record.var, np.sqrt(2 / batch_size - 1 / batch_size**2), rtol=0.03)
        np.testing.assert_allclose(record.share, 1 / batch_size + record.var**2 / 4, rtol=0.06)
        # Of 64 batches: a chi-square's median lies below its mean.
        np.testing.assert_allclose(record.typical_share, record.share, rtol=0.06)

    def test_a_channel_that_is_rarely_active_is_not_typical(self):
        """It shows in the root mean square, not in the median."""
        net, x = Net(features=(5,)), RNG.normal(size=(1024, 4)).astype(np.float32)
        variables = {**net.init(jax.random.key(0), x[:2])}
        variables["params"]["Dense_0"]["kernel"] = jnp.eye(4, 5).at[0, 4].set(1)
        rare = np.concatenate([x[:, :3], np.where(np.arange(1024) % 200 == 7, 10, 0)[:, None]], 1).astype(np.float32)
        usual, found = (batch_noise(net, variables, given, batch_size=16)[0] for given in (x, rare))
        assert found.share > 2 * usual.share
        np.testing.assert_allclose(found.typical_share, usual.typical_share, rtol=0.3)

    def test_enough_samples_are_enough(self):
        x = RNG.normal(size=(8192, 4)).astype(np.float32)
        tolerance = 0.2
        for layer, record in enumerate(batch_noise(NET, VARIABLES, x, batch_size=16, tolerance=tolerance)):
            again = batch_noise(NET, VARIABLES, x, batch_size=record.enough)[layer]
            assert record.mean > tolerance or record.var > tolerance
            # 64 batches of six channels that are alike: a tenth; the law of 1/sqrt(B) is one of large B.
            np.testing.assert_allclose(max(again.mean, again.var), tolerance, rtol=0.25)

    def test_sorted_samples_stray_further(self):
        shuffled, ordered = (batch_noise(NET, VARIABLES, x, batch_size=16)[0] for x in (X, X[np.argsort(X[:, 0])]))
        assert ordered.mean > 2 * shuffled.mean

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 200}, "Two batches are needed at least: got 256 samples, `batch_size=200`"),
            ({"batch_size": 8, "num_batches": 1}, "`num_batches=1`"),
            ({"batch_size": 8, "tolerance": 0}, "`tolerance` must be positive: got 0"),
            ({"batch_size": 0}, "`batch_size` must be a positive integer: got 0"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(ValueError, match=message):
            batch_noise(NET, VARIABLES, X, **options)

    def test_batches_that_are_cut_already(self):
        with pytest.raises(TypeError, match="must be a pytree of arrays where `batch_size` is given"):
            batch_noise(NET, VARIABLES, [X[:64], X[64:]], batch_size=64)

    def test_only_some_layers(self):
        (record,) = batch_noise(NET, VARIABLES, X, batch_size=16, only=lambda path: path == "BatchNorm_1")
        assert record.layer == "BatchNorm_1"

    def test_a_model_that_cannot_be_hashed_is_traced_once(self):
        traces = []

        class Counted(Net):
            features: list

            def __call__(self, x):
                traces.append(x.shape)
                return super().__call__(x)

        with pytest.raises(TypeError):
            hash(Counted([6, 5]))
        batch_noise(Counted([6, 5]), VARIABLES, X, batch_size=16)
        assert len(traces) <= 2


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
        with pytest.raises(ValueError, match="at least one batch: got none"):
            gap(NET, VARIABLES, iter([]), cross_entropy)
