"""Statistics between old and new ones: the paper's formula, and the law of total variance, in float64."""

import jax
import numpy as np
import pytest
from flax import nnx
from models import MLP

import flaxbn

X = np.random.default_rng(0).normal(1.0, 2.0, (32, 6)).astype(np.float32)
MODEL = MLP((8, 6))
VARIABLES = jax.jit(MODEL.init)(jax.random.key(0), X[:2])
OLD = jax.tree.map(
    lambda a: a + np.abs(np.random.default_rng(1).normal(size=a.shape)).astype(a.dtype), VARIABLES["batch_stats"]
)
NEW = flaxbn.population_moments(MODEL, VARIABLES, X, batch_size=32)
FIRST, SECOND = NEW


def expected(old, new, weight, *, total):
    mean, var = (np.asarray(old[name], np.float64) for name in ("mean", "var"))
    between = weight * (1 - weight) * (new.mean - mean) ** 2 if total else 0
    return {"mean": (1 - weight) * mean + weight * new.mean, "var": (1 - weight) * var + weight * new.var + between}


@pytest.mark.parametrize(("prior", "samples"), [(16, 32), (0, 32), (256.5, 1), (5, 0)])
@pytest.mark.parametrize("variance", ["average", "total"])
def test_both_formulas(prior, samples, variance):
    found = flaxbn.blend(OLD, NEW, prior=prior, samples=samples, variance=variance)
    assert jax.tree.structure(found) == jax.tree.structure(OLD)
    for layer in OLD:
        wanted = expected(OLD[layer], NEW[layer], samples / (prior + samples), total=variance == "total")
        for name in ("mean", "var"):
            np.testing.assert_allclose(found[layer][name], wanted[name], rtol=2e-7)  # stored in float32


def test_the_total_variance_is_that_of_both_data():
    """The old statistics being those of 3 n examples, and the new ones of n."""
    old, new = np.float32(np.random.default_rng(2).normal(size=(24, 6))), X[:8]
    layer = {"mean": old.mean(0), "var": old.var(0)}
    moments = flaxbn.Moments(np.full(6, 8.0), new.mean(0, np.float64), new.var(0, dtype=np.float64))
    found = flaxbn.blend(layer, moments, prior=24, samples=8, variance="total")
    both = np.concatenate([old, new]).astype(np.float64)
    np.testing.assert_allclose(found["var"], both.var(0), rtol=1e-6)
    np.testing.assert_allclose(found["mean"], both.mean(0), rtol=1e-6, atol=1e-7)


def test_what_saw_nothing_stays():
    first, *others = NEW
    count = np.where(np.arange(8) < 3, 0.0, 32.0)
    found = flaxbn.blend(OLD, {first: NEW[first]._replace(count=count)}, prior=1, samples=1)
    np.testing.assert_array_equal(found[first]["var"][:3], OLD[first]["var"][:3])
    assert np.all(found[first]["var"][3:] != OLD[first]["var"][3:])
    for layer in others:
        jax.tree.map(np.testing.assert_array_equal, found[layer], OLD[layer])


def test_nnx():
    model = nnx.BatchNorm(6, use_running_average=True, rngs=nnx.Rngs(0))
    old = nnx.state(model, nnx.BatchStat)
    moments = flaxbn.population_moments(*nnx.split(model), X, batch_size=32)
    nnx.update(model, flaxbn.blend(old, moments, prior=32, samples=32))
    np.testing.assert_allclose(model.mean[...], X.mean(0, np.float64) / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("moments", "options", "message"),
    [
        (NEW, {"prior": -1, "samples": 1}, "must be 0 or more, and one of them positive: got -1 and 1"),
        (NEW, {"prior": 0, "samples": 0}, "one of them positive"),
        (NEW, {"prior": float("nan"), "samples": 1}, "must be 0 or more"),
        (NEW, {"prior": 1, "samples": 1, "variance": "mean"}, 'must be "average" or "total": got \'mean\''),
        ({"other": NEW[FIRST]}, {"prior": 1, "samples": 1}, "at 'other', where `batch_stats` holds nothing"),
        ({SECOND: NEW[FIRST]}, {"prior": 1, "samples": 1}, r"moments of shape \(8,\) .* a mean of shape \(6,\)"),
    ],
)
def test_errors(moments, options, message):
    with pytest.raises(ValueError, match=message):
        flaxbn.blend(OLD, moments, **options)
