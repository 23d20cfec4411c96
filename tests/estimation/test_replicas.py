"""Statistics of replicas merged."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict, freeze
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_same_statistics, merged

import flaxbn

RNG = np.random.default_rng(0)
X = (RNG.normal(size=(120, 4)) + np.arange(120)[:, None] / 30).astype(np.float32)


def replicas(count=3, channels=5, seed=0):
    """Statistics as replicas hold them: in float32, one row each."""
    rng = np.random.default_rng(seed)
    mean, var = rng.normal(size=(count, channels)), rng.uniform(0.5, 2, (count, channels))
    return {"mean": mean.astype(np.float32), "var": var.astype(np.float32)}


def pooled(stats, counts=None):
    counts = np.ones(len(stats["mean"])) if counts is None else counts
    return dict(zip(("mean", "var"), merged(counts, stats["mean"], stats["var"])))


@pytest.mark.parametrize("counts", [None, [1, 1, 1], [7, 2, 30], [5, 0, 3], (0.5, 0.25, 0.25), np.array([1e6, 1, 3e6])])
def test_replicas_merge_by_their_counts(counts):
    stats = replicas()
    found = flaxbn.merge_replicas({"norm": stats}, counts)
    assert_same_statistics(found, {"norm": pooled(stats, counts)})
    with pytest.raises(AssertionError):  # the average of the variances is another one
        assert_same_statistics(found, {"norm": {k: np.average(v, 0, counts) for k, v in stats.items()}})


def test_the_moments_of_pooled_data():
    """Parts of 10, 50 and 60 samples, whose means differ."""
    parts = np.split(X.astype(np.float64), [10, 60])
    stats = {"mean": np.stack([p.mean(0) for p in parts]), "var": np.stack([p.var(0) for p in parts])}
    stats = jax.tree.map(lambda a: a.astype(np.float32), stats)
    found = flaxbn.merge_replicas({"norm": stats}, [10, 50, 60])
    assert_same_statistics(found["norm"], {"mean": X.mean(0, np.float64), "var": X.var(0, dtype=np.float64)})


def test_equal_counts_are_the_default():
    stats = {"norm": replicas()}
    chex.assert_trees_all_equal(flaxbn.merge_replicas(stats), flaxbn.merge_replicas(stats, [4, 4, 4]))


def test_one_replica_is_itself():
    stats = replicas(count=1)
    found = flaxbn.merge_replicas({"norm": stats}, [3])
    assert_same_statistics(found["norm"], {k: v[0] for k, v in stats.items()}, 2e-7)  # rounded once


def test_statistics_stacked_by_a_scan():
    """The replicas lie along the first axis, the layers of the scan along the second."""
    stats = replicas(count=4, channels=6)
    stacked = jax.tree.map(lambda a: a.reshape(4, 2, 3), stats)
    found = flaxbn.merge_replicas({"body": {"norm": stacked}}, [1, 2, 3, 4])
    expected = jax.tree.map(lambda a: a.reshape(2, 3), pooled(stats, [1, 2, 3, 4]))
    assert_same_statistics(found["body"]["norm"], expected)


def test_merged_in_float32_and_stored_as_before():
    stats = jax.tree.map(lambda a: (100 + a).astype(jnp.bfloat16), replicas())
    found = flaxbn.merge_replicas({"norm": stats})["norm"]
    expected = pooled(jax.tree.map(lambda a: np.asarray(a, np.float64), stats))
    for name, leaf in found.items():
        assert leaf.dtype == jnp.bfloat16
        # The result is rounded once, to 8 bits.
        np.testing.assert_allclose(np.asarray(leaf, np.float64), expected[name], rtol=2**-9 * 1.01)


def test_complex_means():
    stats = replicas()
    stats["mean"] = (stats["mean"] + 1j * stats["mean"][::-1]).astype(np.complex64)
    found = flaxbn.merge_replicas({"norm": stats}, [1, 2, 3])["norm"]
    mean = np.average(stats["mean"].astype(np.complex128), 0, [1, 2, 3])
    var = np.average(stats["var"] + np.abs(stats["mean"] - mean) ** 2, 0, [1, 2, 3])
    np.testing.assert_allclose(found["mean"], mean, atol=1e-6)
    np.testing.assert_allclose(found["var"], var, rtol=1e-6)


def test_containers_are_kept():
    stats = freeze({"block": {"norm": replicas()}})
    found = flaxbn.merge_replicas(stats)
    assert isinstance(found, FrozenDict)
    assert jax.tree.structure(found) == jax.tree.structure(stats)
    assert_same_statistics(found["block"]["norm"], pooled(stats["block"]["norm"]))


def test_metadata_is_kept():
    boxed = jax.tree.map(lambda a: nn.Partitioned(a, ("channel",)), replicas())
    found = flaxbn.merge_replicas({"norm": boxed})["norm"]
    assert found["mean"].names == ("channel",)
    assert_same_statistics(found, pooled(replicas()))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_of_steps_the_largest_number_is_kept(dtype):
    stats = {"norm": {**replicas(), "steps": np.array([17, 40, 3], dtype)}}
    found = flaxbn.merge_replicas(stats)["norm"]["steps"]
    assert (found.shape, found.dtype, int(found)) == ((), dtype, 40)


def test_a_single_statistic_is_no_layer():
    """Without a variance of its shape beside it, a mean is kept like any other leaf."""
    found = flaxbn.merge_replicas({"ema": {"mean": np.full((3, 2), 4, np.float32)}})
    np.testing.assert_array_equal(found["ema"]["mean"], [4, 4])


def test_the_result_fits_the_model(devices):
    """What replicas hold on eight devices is one tree on one device, which the model takes."""
    model = nn.BatchNorm(momentum=0.0)
    variables = model.init(jax.random.key(0), X, use_running_average=True)

    @jax.pmap
    def step(x):
        return model.apply(variables, x, use_running_average=False, mutable=["batch_stats"])[1]["batch_stats"]

    found = flaxbn.merge_replicas(step(X.reshape(8, 15, 4)))
    chex.assert_trees_all_equal_shapes_and_dtypes(found, variables["batch_stats"])
    assert_same_statistics(found, {"mean": X.mean(0, np.float64), "var": X.var(0, dtype=np.float64)})
    assert {leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(found)} == {True}
    model.apply({**variables, "batch_stats": found}, X, use_running_average=True)


@settings(max_examples=50)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.floats(-100, 100),
    st.floats(0.01, 100),
    st.integers(0, 2**32 - 1),
)
def test_merging_the_moments_of_parts_gives_those_of_the_whole(sizes, mean, std, seed):
    x = np.random.default_rng(seed).normal(mean, std, (sum(sizes), 3))
    parts = np.split(x, np.cumsum(sizes)[:-1])
    stats = {"mean": np.stack([p.mean(0) for p in parts]), "var": np.stack([p.var(0) for p in parts])}
    found = flaxbn.merge_replicas(jax.tree.map(lambda a: a.astype(np.float32), stats), sizes)
    # Means are stored to 6e-8 of their size, which enters the variance by twice the deviation from the common mean.
    off = 2e-7 * np.abs(x).max()
    assert np.all(np.abs(found["mean"] - x.mean(0)) <= 2 * off)
    assert np.all(np.abs(found["var"] - x.var(0)) <= 2e-6 * x.var(0) + 4 * off * x.std(0) + off**2)


@pytest.mark.parametrize(
    ("message", "stats", "counts"),
    [
        (r"replicas along their leading axis: got leading axes \[2, 3\]", {"steps": np.ones(2)}, None),
        (r"replicas along their leading axis: got leading axes \[None, 3\].*one replica", {"steps": np.ones(())}, None),
        (r"`counts` must be 3 numbers.*got an array of shape \(2,\)", {}, [1, 2]),
        (r"`counts` must be 3 numbers.*got an array of shape \(\)", {}, 5),
        (r"`counts` must be 3 numbers.*not negative", {}, [1, -1, 1]),
        (r"`counts` must be 3 numbers.*not all zero", {}, [0, 0, 0]),
        (r"`counts` must be 3 numbers", {}, [1, np.nan, 1]),
        (r"`counts` must be 3 numbers", {}, [1, np.inf, 1]),
        (
            r"the same on all replicas: \['norm'\]\['version'\] differs between them. Take it from",
            {"version": np.array([3, 3, 4])},
            None,
        ),
    ],
)
def test_errors(message, stats, counts):
    with pytest.raises(ValueError, match=message):
        flaxbn.merge_replicas({"norm": {**replicas(), **stats}}, counts)


def test_statistics_of_one_model_are_an_error():
    """Channels would be taken for replicas, were it not for layers of other sizes."""
    stats = {"a": {"mean": np.zeros(8), "var": np.ones(8)}, "b": {"mean": np.zeros(4), "var": np.ones(4)}}
    with pytest.raises(ValueError, match=r"got leading axes \[4, 8\].*one replica need no merging"):
        flaxbn.merge_replicas(stats)
