"""Independent paths to the same numbers: numpy in float64, and Flax's own training mode."""

import jax
import numpy as np


def merged(counts, means, variances):
    """Law of total variance in float64."""
    counts, means, variances = (np.asarray(a, np.float64) for a in (counts, means, variances))
    weights = counts / counts.sum()
    mean = np.tensordot(weights, means, 1)
    return mean, np.tensordot(weights, variances + (means - mean) ** 2, 1)


def one_oracle(x):
    """The statistics of a model that is one layer, `OneLayer`, in float64: of all values of a channel."""
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    return {"norm": {"mean": x.mean(0), "var": x.var(0)}}


def by_training_mode(model, variables, batches, train):
    """Precise statistics by the model's own training mode, whose layers have momentum 0, merged in float64.

    `train(module, batch)` runs the model in training mode.
    """
    collected = []
    for batch in batches:
        _, new = model.apply(variables, batch, method=train, mutable=["batch_stats"])
        collected.append(jax.tree.map(lambda a: np.asarray(a, np.float64), jax.device_get(dict(new["batch_stats"]))))
    sizes = [len(jax.tree.leaves(batch)[0]) for batch in batches]
    return _merge_trees(sizes, collected)


def _merge_trees(sizes, trees):
    if "mean" not in trees[0]:
        return {k: _merge_trees(sizes, [t[k] for t in trees]) for k in trees[0] if isinstance(trees[0][k], dict)}
    mean, var = merged(sizes, [t["mean"] for t in trees], [t["var"] for t in trees])
    return {"mean": mean, "var": var}


def assert_same_statistics(found, expected, tolerance=2e-6):
    """|Δmean| <= tolerance * std and |Δvar| <= tolerance * var, in every layer.

    The default is some ten roundings of float32, as sums of a few hundred terms in another order differ by.
    """
    if "mean" not in expected:
        assert set(expected) <= set(found)
        for key in expected:
            assert_same_statistics(found[key], expected[key], tolerance)
        return
    found, expected = (
        {k: np.asarray(getattr(tree[k], "value", tree[k]), np.float64) for k in ("mean", "var")}
        for tree in (found, expected)
    )
    assert found["mean"].shape == expected["mean"].shape
    assert np.all(np.abs(found["mean"] - expected["mean"]) <= tolerance * np.sqrt(expected["var"]))
    assert np.all(np.abs(found["var"] - expected["var"]) <= tolerance * expected["var"])
