"""Where the statistics of a call are shared, and which positions of its input count."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from flaxbn.arithmetic.groups import Sharing, values_per_channel
from flaxbn.layers.arguments import Mode, Options, domain_of, feature_axes, position_weights


class Arranged(NamedTuple):
    """An input, and which of its positions share statistics.

    Attributes:
        x: the values.
        weights: the mask as weights of the rank of `x`, or None.
        sharing: what the statistics are sums over.
        row: where the whole batch is of one domain, its number: the layer runs on that row of what is stored.
    """

    x: Array
    weights: Array | None
    sharing: Sharing
    row: Array | None


def arrange(options: Options, mode: Mode, x: Array, mask: Any, domain: Any) -> Arranged:
    """Checks what a call is given, and finds out over what its statistics are sums.

    A batch of one domain runs as a plain layer does, on that domain's row. Only where members of a mapped axis bring
    batches of different domains must the sums be told apart, and the batch is one of mixed domains to each of them.
    """
    features = feature_axes(x.ndim, options.axis)
    axes = tuple(axis for axis in range(x.ndim) if axis not in features)
    _check_groups(options, mode, x.shape, features)
    weights = None if mask is None else position_weights(mask, x.shape, features)
    numbers = domain_of(domain, options.num_domains, x.shape, features)
    row = None
    if numbers is not None and not numbers.ndim:
        if mode.measures and _members_may_differ(options, mode, features):
            numbers = jnp.broadcast_to(numbers, x.shape[:1])
        else:
            row, numbers = numbers, None
    sharing = Sharing(axes) if numbers is None else Sharing(axes, numbers, options.num_domains)
    return Arranged(x, weights, sharing, row)


def _check_groups(options: Options, mode: Mode, shape: tuple[int, ...], features: tuple[int, ...]) -> None:
    """Groups are of examples, which lie along the leading axis, and all of one size."""
    size = options.group_size(mode)
    if size is None:
        return
    if not shape or 0 in features:
        raise ValueError(
            "With `virtual_batch_size` the leading axis of x must be that of examples: got feature axes "
            f"{features} for x of shape {shape}."
        )
    if shape[0] % size:
        raise ValueError(
            f"`virtual_batch_size` must divide the number of examples: got {size} for x of shape {shape}. Use batches "
            f"of a multiple of {size} examples: drop a smaller last one, or fill it up with examples that `mask` hides."
        )


def _members_may_differ(options: Options, mode: Mode, features: tuple[int, ...]) -> bool:
    """Whether members of `axis_name` may run different domains, which are then told apart by example."""
    if options.axis_name is None or mode.initializing:
        return False
    if 0 in features:
        raise ValueError(
            "With `num_domains` and `axis_name` the leading axis of x must be that of examples: got feature axes "
            f"{features}."
        )
    return True


def check_values(options: Options, mode: Mode, arranged: Arranged) -> None:
    """Where shapes tell that there is one value per channel, it is an error; masks and domains may leave fewer.

    Training would go on without one, on a constant.
    """
    if mode.initializing or options.accepts_single_value:
        return
    shape, axes, size = arranged.x.shape, arranged.sharing.axes, options.group_size(mode)
    if size is not None:
        values = values_per_channel((size, *shape[1:]), axes)
    else:
        values = values_per_channel(shape, axes, options.axis_name, options.axis_index_groups)
    if values == 1:
        groups = "" if size is None else f" and `virtual_batch_size={size}`"
        raise ValueError(
            f"{options.label} normalizes by batch statistics, which needs more than one value per channel: got an "
            f"input of shape {shape} with feature axis {options.axis}{groups}, so its output would be constant. Use a "
            "larger batch (drop a last batch of one), or `use_running_average=True` for evaluation."
        )
