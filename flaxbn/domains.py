"""Domains for any model: a domain is a `batch_stats` tree with a name, and the model knows nothing of it.

    stats = domains.replicate(variables["batch_stats"], ["mnist", "usps"])
    output, new = model.apply(domains.select(variables, stats, "usps"), batch, train=True, mutable=["batch_stats"])
    stats = {**stats, "usps": new["batch_stats"]}

For a model of flax.nnx the trees are `nnx.state(model, nnx.BatchStat)`, and `nnx.update(model, stats["usps"])` selects.
For batches of one domain each; where a batch mixes domains, use a layer with `num_domains`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flaxbn.arithmetic.moments import merge
from flaxbn.estimation.population import estimate_population_stats
from flaxbn.models.arguments import Model, takes_model, with_batch_stats
from flaxbn.models.leaves import dict_names

StatsByDomain = Mapping[str, Any]
"""For each name of a domain a `batch_stats` tree."""


def replicate(batch_stats: Any, names: Iterable[str]) -> dict[str, Any]:
    """The same statistics for each of `names`: the start of a training, or a new domain that begins as a copy.

    Examples:
        >>> import numpy as np
        >>> from flaxbn import domains
        >>> batch_stats = {"norm": {"mean": np.zeros(4, "float32"), "var": np.ones(4, "float32")}}
        >>> stats = domains.replicate(batch_stats, ["photos", "sketches"])
        >>> sorted(stats), stats["photos"]["norm"]["mean"].shape
        (['photos', 'sketches'], (4,))

    To add a domain later, `{**stats, **replicate(stats["old"], ["new"])}`; or estimate it on data of its own, without
    labels, by `estimate` (adaptive batch normalization; Li et al. 2016, "Revisiting Batch Normalization For Practical
    Domain Adaptation", section 3).

    Args:
        batch_stats: the statistics, which are copied.
        names: what the domains are called.

    Raises:
        TypeError: if a name is not a string, since checkpoints turn other keys into strings; or `batch_stats` are all
            variables.
        ValueError: if a name occurs twice, or there is none.
    """
    if isinstance(batch_stats, Mapping) and "batch_stats" in batch_stats:
        raise TypeError(
            f"`batch_stats` must be the collection itself: got variables of the collections {sorted(batch_stats)}. "
            'Pass `variables["batch_stats"]`.'
        )
    if not isinstance(names, Iterable):
        raise TypeError(f'`names` must be names of domains, `["one", "other"]`: got {type(names).__name__}.')
    names = [names] if isinstance(names, str) else list(names)
    _check_names(names)
    return {name: jax.tree.map(jnp.array, batch_stats) for name in names}


def select(variables: Mapping[str, Any], stats_by_domain: StatsByDomain, name: str) -> Any:
    """`variables` with the statistics of one domain, for `model.apply`.

    Of a model of flax.nnx, `nnx.merge(graphdef, select(state, stats, name))` is the model with these statistics, and
    `nnx.update(model, stats[name])` puts them into the model at hand.

    Examples:
        >>> from flaxbn import domains
        >>> stats = {"photos": {"norm": "of photos"}, "sketches": {"norm": "of sketches"}}  # trees of arrays, really
        >>> domains.select({"params": "shared"}, stats, "sketches")
        {'params': 'shared', 'batch_stats': {'norm': 'of sketches'}}

    Args:
        variables: those that all domains share, or the `nnx.State` of a model; statistics in them are replaced.
        stats_by_domain: the statistics of all domains.
        name: that of the domain.

    Raises:
        KeyError: if there is no such domain; the message lists those that there are.
    """
    if name not in stats_by_domain:
        raise KeyError(f"`name` must be a known domain: got {name!r}. Known are {sorted(stats_by_domain)}.")
    return with_batch_stats(variables, stats_by_domain[name])


@takes_model
def estimate(
    model: Model,
    variables: Mapping[str, Any],
    batches_by_domain: Mapping[str, Any],
    **options: Any,
) -> dict[str, Any]:
    """The population statistics of each domain, from data of its own and the weights that all share.

    Examples:
        >>> import flax.linen as nn, jax, numpy as np
        >>> from flaxbn import domains
        >>> model = nn.BatchNorm(use_running_average=True)
        >>> data = {"photos": np.float32([[1], [3]]), "sketches": np.float32([[5], [7]])}
        >>> variables = model.init(jax.random.key(0), data["photos"])
        >>> stats = domains.estimate(model, variables, data, batch_size=2)
        >>> {name: tree["mean"].tolist() for name, tree in stats.items()}
        {'photos': [2.0], 'sketches': [6.0]}

    Args:
        model: the model, with layers of Flax or of flaxbn; for one of flax.nnx, `*nnx.split(model)` stands in the
            place of `model, variables`.
        variables: its variables. The `batch_stats` in them give structure and dtypes, and the statistics of layers
            that `only` leaves out.
        batches_by_domain: for each name, what `estimate_population_stats` takes as `batches`.
        **options: those of `estimate_population_stats`, the same for each domain; `progress` counts anew for each.

    Returns:
        For each name, a `batch_stats` tree.

    Raises:
        TypeError: if data are given without names, or a name is not a string.
    """
    if not isinstance(batches_by_domain, Mapping):
        raise TypeError(
            f"`batches_by_domain` must be data by the name of their domain: got {type(batches_by_domain).__name__}. "
            'Write `{"one": one, "other": other}`.'
        )
    _check_names(list(batches_by_domain))
    return {
        name: estimate_population_stats(model, variables, batches, **options)
        for name, batches in batches_by_domain.items()
    }


def pool(moments_by_domain: Mapping[str, Any]) -> Any:
    """The moments of all domains together, by the law of total variance, each domain weighted by its count.

    Examples:
        >>> import flaxbn, numpy as np
        >>> from flaxbn import domains
        >>> photos, sketches = (flaxbn.Moments(np.float32(2), np.float32(mean), np.float32(1)) for mean in (2, 6))
        >>> pooled = domains.pool({"photos": {"norm": photos}, "sketches": {"norm": sketches}})["norm"]
        >>> float(pooled.count), float(pooled.mean), float(pooled.var)
        (4.0, 4.0, 5.0)

    Args:
        moments_by_domain: for each name, a tree as `population_moments` returns.
    """
    return merge(*moments_by_domain.values())


def stack(stats_by_domain: StatsByDomain, names: Sequence[str], axis: int = 0) -> Any:
    """The `batch_stats` of a model with `num_domains=len(names)`; domain i is `names[i]`.

    With `replicate` it turns the statistics of a plain model into those of a model with domains.

    Examples:
        >>> import numpy as np
        >>> from flaxbn import domains
        >>> batch_stats = {"norm": {"mean": np.zeros(4, "float32"), "var": np.ones(4, "float32")}}
        >>> names = ["photos", "sketches"]
        >>> domains.stack(domains.replicate(batch_stats, names), names)["norm"]["mean"].shape
        (2, 4)

    Args:
        stats_by_domain: for each name, the `batch_stats` of the plain model.
        names: the domains in the order of their numbers.
        axis: where the axis of domains goes: 0, or after the leading axes that `nn.scan` and `nn.vmap` add.
    """
    _check_names(list(names))
    trees = [select({}, stats_by_domain, name)["batch_stats"] for name in names]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *trees)


def unstack(batch_stats: Any, names: Sequence[str], axis: int = 0) -> dict[str, Any]:
    """The inverse of `stack`: for each name, the `batch_stats` of the plain model.

    Examples:
        >>> import numpy as np
        >>> from flaxbn import domains
        >>> stacked = {"norm": {"mean": np.float32([[0, 0], [5, 6]]), "var": np.ones((2, 2), "float32")}}
        >>> domains.unstack(stacked, ["photos", "sketches"])["sketches"]["norm"]["mean"].tolist()
        [5.0, 6.0]

    Args:
        batch_stats: those of a model with domains.
        names: the domains in the order of their numbers.
        axis: where the axis of domains is.

    Raises:
        ValueError: if the statistics are not of as many domains as there are names.
    """
    _check_names(list(names))
    sizes = {leaf.shape[axis] if leaf.ndim > axis else 0 for leaf in jax.tree.leaves(batch_stats)}
    if sizes != {len(names)}:
        raise ValueError(
            f"`batch_stats` must have {len(names)} domains along axis {axis}, as many as `names`: got axes of length "
            f"{sorted(sizes)}."
        )
    return {name: jax.tree.map(lambda a, i=i: jnp.take(a, i, axis), batch_stats) for i, name in enumerate(names)}


def weight_decay_mask(params: Any) -> Any:
    """Which parameters weight decay is for: True for kernels and embeddings, False for scales and biases.

    Decay pulls weights to 0; of a scale, which has nothing to make up for it, it takes what the layer has learned. The
    usual mask, `ndim > 1`, tells them apart no more where scales have two axes: with `domain_affine`, one for each
    domain, or stacked by `nn.scan` and `nn.vmap`. Here a parameter named `scale` or `bias` is not decayed, whatever its
    shape, nor is one with less than two axes.

    Examples:
        >>> import flaxbn, numpy as np, optax
        >>> params = {"dense": {"kernel": np.ones((4, 3)), "bias": np.ones(3)}, "norm": {"scale": np.ones((2, 3))}}
        >>> flaxbn.weight_decay_mask(params)
        {'dense': {'bias': False, 'kernel': True}, 'norm': {'scale': False}}
        >>> optimizer = optax.adamw(1e-3, mask=flaxbn.weight_decay_mask)

    Args:
        params: the parameters of a model, or their shapes.

    Returns:
        A tree of bools like `params`, for the `mask` of optax's optimizers, which also take the function itself.
    """

    def is_decayed(path: Any, leaf: Any) -> bool:
        return len(leaf.shape) > 1 and not {"scale", "bias"}.intersection(dict_names(path)[-1:])

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def _check_names(names: Sequence[Any]) -> None:
    """Names must be strings, each there once: a checkpoint turns other keys into strings, and then they are unknown."""
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise TypeError(f"Names of domains must be strings, as in checkpoints: got {wrong[0]!r}.")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"Names of domains must be given, each once: got {list(names)}.")
