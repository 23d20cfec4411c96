"""Statistics of replicas that were trained side by side, as those of one model."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from flaxbn.arithmetic.moments import Moments, merge_along
from flaxbn.models.batch_stats import stored_layers
from flaxbn.models.leaves import dict_names, named_leaves
from flaxbn.models.places import Pair


def merge_replicas(batch_stats: Any, counts: Sequence[float] | None = None) -> Any:
    """One `batch_stats` from those of replicas, by the law of total variance.

    Under `jax.pmap` without `axis_name` each device keeps the running average of its own data. That of all data is

        mean = sum_i n_i mean_i / n        var = sum_i n_i (var_i + |mean_i - mean|^2) / n

    and not the average of the variances, which loses the variance between the means.

    Args:
        batch_stats: the tree with a leading axis of replicas on every leaf, as `pmap` returns it.
        counts: the samples that each replica saw, or any weights in proportion to them; by default the same for all.

    Returns:
        The tree without the leading axis, on the default device: `mean` and `var` of each layer merged, each in its
        dtype. Of the `steps` of its layers the largest number is taken: clients that train for unequal times differ in
        it, and a ramp that has ended for one has ended. Other leaves must be the same on all replicas; the first one's
        are taken.

    Raises:
        ValueError: if leaves have no common leading axis; `counts` are negative, all zero, or not one for each replica;
            or other leaves differ between replicas.

    Examples:
        >>> import flaxbn, jax.numpy as jnp
        >>> stats = {"norm": {"mean": jnp.array([[0.0], [4.0]]), "var": jnp.ones((2, 1))}}  # of two replicas
        >>> merged = flaxbn.merge_replicas(stats)["norm"]
        >>> merged["mean"].tolist(), merged["var"].tolist()  # the variance between the means counts
        ([2.0], [5.0])
    """
    batch_stats = jax.device_get(batch_stats)
    leaves, structure = jax.tree_util.tree_flatten_with_path(batch_stats)
    sizes = sorted({np.shape(leaf)[:1] for _, leaf in leaves})
    if len(sizes) != 1 or not sizes[0]:
        raise ValueError(
            "All leaves of `batch_stats` must have the replicas along their leading axis: got leading axes "
            f"{[size[0] if size else None for size in sizes]}. Statistics of one replica need no merging."
        )
    weights = _weights(counts, sizes[0][0])
    named = named_leaves(batch_stats)
    layers = stored_layers(batch_stats).places
    merged = {place: value for pair in layers.values() for place, value in zip(pair, _merge(named, pair, weights)[1:])}
    values = []
    for path, leaf in leaves:
        names = dict_names(path)
        if names in merged:
            values.append(merged[names].astype(leaf.dtype))
        elif names[:-1] in layers and names[-1:] == ("steps",):
            values.append(np.max(leaf, 0))
        else:
            values.append(_common(path, leaf))
    return jax.tree.unflatten(structure, jax.device_put(values))


def _weights(counts: Sequence[float] | None, replicas: int) -> np.ndarray:
    weights = np.ones(replicas) if counts is None else np.asarray(counts, float)
    if weights.shape != (replicas,) or not np.all(weights >= 0) or not 0 < weights.sum() < np.inf:
        raise ValueError(
            f"`counts` must be {replicas} numbers, one for each replica, finite, not negative and not all zero: got an "
            f"array of shape {weights.shape}."
        )
    return weights / weights.sum()


def _merge(named: Any, pair: Pair, weights: np.ndarray) -> Moments:
    mean, var = (np.asarray(named[place]) for place in pair)
    count = weights.reshape(-1, *[1] * (mean.ndim - 1))
    # A replica that has seen nothing may hold anything.
    mean, var = (np.where(count > 0, a, 0) for a in (mean, var))
    return merge_along(Moments(np.broadcast_to(count, mean.shape), mean, var))  # type: ignore[arg-type]


def _common(path: Any, leaf: Any) -> Any:
    if not np.array_equal(np.asarray(leaf), np.broadcast_to(np.asarray(leaf)[:1], np.shape(leaf))):
        raise ValueError(
            f"What is no statistic must be the same on all replicas: {jax.tree_util.keystr(path)} differs between "
            "them. Take it from the replica that you want first."
        )
    return np.asarray(leaf[0])
