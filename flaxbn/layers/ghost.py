"""Ghost batches: consecutive groups of the examples of a batch, each of which is a batch to the layer.

Hoffer, Hubara & Soudry 2017, "Train longer, generalize better: closing the generalization gap in large batch training
of neural networks", algorithm 1. A layer normalizes each group as it would normalize it alone, whatever masks, domains
and renormalization do there, and the running average gets the moments of all groups, once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from flaxbn.arithmetic.groups import Sharing
from flaxbn.arithmetic.moments import merge_groups, total_of_groups
from flaxbn.layers.arguments import Options
from flaxbn.layers.arranged import Arranged
from flaxbn.layers.batch import Batch

_WHOLE, _CUT = None, 0  # of `in_axes`


def in_groups(normalized: Callable[[Arranged], tuple[Array, Any]], size: int, arranged: Arranged) -> tuple[Array, Any]:
    """The output of a function of batches for groups of `size` examples, end to end, and what else it returns for each.

    Args:
        normalized: a function of a batch that returns an output of its shape, and a tree of arrays.
        size: the number of examples in a group, which divides that in the batch.
        arranged: the batch.

    Returns:
        The output, of the shape of the batch; and the tree, with a leading axis of groups.
    """

    def cut(a: Array) -> Array:
        return a.reshape(-1, size, *a.shape[1:])

    def group(x: Array, weights: Array | None, domain: Array | None) -> tuple[Array, Any]:
        sharing = dataclasses.replace(arranged.sharing, domain=domain)
        return normalized(Arranged(x, weights, sharing, arranged.row))

    x, weights, domain = arranged.x, arranged.weights, arranged.sharing.domain
    alike = weights is None or len(weights) == 1  # in all groups
    weights = weights if weights is None or alike else cut(weights)
    domain = None if domain is None else cut(domain)
    axes = _CUT, _WHOLE if alike else _CUT, _WHOLE if domain is None else _CUT
    y, others = jax.vmap(group, in_axes=axes)(cut(x), weights, domain)
    return y.reshape(x.shape), others


def spread_in_group(sharing: Sharing) -> Callable[[Array], Array]:
    """`sharing.spread` in a group, whose gradient is summed within the group before it is summed over groups.

    Of both sums XLA would make one, over the batch, beside that of each group, which is needed too: for the gradient of
    `bias`, one more pass over all values. It does not see through the barrier.
    """
    return lambda statistics: sharing.spread(jax.lax.optimization_barrier(statistics))


def merged(options: Options, arranged: Arranged, groups: Batch) -> Batch:
    """The statistics of all groups, of all members of `axis_name`, as those of one batch, by the law of total variance.

    A group that holds a single value, by which nothing is normalized, counts here as it does in a batch without groups.
    """
    across: dict[str, Any] = {"axis_name": options.axis_name, "axis_index_groups": options.axis_index_groups}
    deviations, usable, unit = groups.deviations, groups.usable, 1
    if arranged.weights is None and arranged.sharing.domain is None:
        # Groups of one size weigh the same. One that overflows has an infinite variance, and so have all then.
        alike = (len(usable), *[1] * (usable.ndim - 1))
        unit = arranged.x.size // usable.size
        deviations, usable = deviations._replace(count=jnp.ones(alike, deviations.count.dtype)), jnp.ones(alike, bool)
    pivot, found = merge_groups(groups.pivot, deviations, **across)
    some = (deviations.count > 0).astype(found.var.dtype)
    values = total_of_groups(some + usable, **across)  # two for a group that holds several
    count, usable = (jnp.broadcast_to(a, found.mean.shape) for a in (unit * found.count, values >= 2))
    return Batch(pivot, found._replace(count=count), usable)
