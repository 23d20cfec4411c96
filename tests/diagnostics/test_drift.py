"""How far stored statistics are from the population's, against float64 and against theory."""

import jax
import numpy as np
import pytest
from models import MLP

import flaxbn
from flaxbn.diagnostics.drift import compare

RNG = np.random.default_rng(0)
EPSILON = 1e-5


def moments_of(x, axes=(0,)):
    """In float64, as the float32 that are stored."""
    x = np.asarray(x, np.float64)
    count = np.full(np.delete(x.shape, axes), np.prod([x.shape[a] for a in axes]), np.float32)
    return flaxbn.Moments(count, x.mean(axes).astype(np.float32), x.var(axes).astype(np.float32))


NET = MLP(outputs=3, momentum=0.9)
X = RNG.normal(size=(256, 4)).astype(np.float32)
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
