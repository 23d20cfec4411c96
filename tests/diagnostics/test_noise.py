"""What a batch's statistics stray by, against theory and by experiment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import MLP

from flaxbn.diagnostics.noise import batch_noise

RNG = np.random.default_rng(0)
NET = MLP(outputs=3, momentum=0.9)
X = RNG.normal(size=(256, 4)).astype(np.float32)
VARIABLES = jax.jit(NET.init)(jax.random.key(0), X[:2])


class TestBatchNoise:
    @pytest.mark.parametrize("batch_size", [8, 32])
    def test_normal_samples(self, batch_size):
        """A mean of B normal samples strays by 1/sqrt(B), a biased variance by sqrt(2/B - 1/B^2)."""
        net = MLP((400,))
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
        net, x = MLP((5,)), RNG.normal(size=(1024, 4)).astype(np.float32)
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

        class Counted(MLP):
            features: list

            def __call__(self, x):
                traces.append(x.shape)
                return super().__call__(x)

        with pytest.raises(TypeError):
            hash(Counted([6, 5]))
        batch_noise(Counted([6, 5]), VARIABLES, X, batch_size=16)
        assert len(traces) <= 2
