"""The tap of a layer's call: where a reader of the traced model chooses the statistics to normalize by."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from flaxbn.layers.arguments import domain_of, feature_axes, position_weights
from flaxbn.tracing.primitive import is_bound, tap_p


def chosen_statistics(
    layer: Any, name: str, x: Array, mean: Array, var: Array, *, mask: Any, domain: Any, own_masks: bool
) -> tuple[Array, Array]:
    """The statistics that the call of a layer is to normalize by, which are chosen where the trace is interpreted.

    Args:
        layer: the layer, whose fields are those of `flax.linen.BatchNorm` or of ours.
        name: what it is called in messages.
        x: its input.
        mean, var: its stored statistics.
        mask: the mask of the call, or None.
        domain: the domain of the call, or None.
        own_masks: whether masks are weights of the shapes that our layers take; otherwise they are bool, and broadcast.
    """
    features = feature_axes(x.ndim, layer.axis)
    others = [] if mask is None else [_mask_weights(mask, x, features, own_masks=own_masks)]
    numbers = domain_of(domain, getattr(layer, "num_domains", None), x.shape, features)
    if numbers is not None:
        others.append(numbers)
    groups = layer.axis_index_groups
    params = {
        "axes": tuple(axis for axis in range(x.ndim) if axis not in features),
        "layer": name,
        "lanes": 0,
        "channel_rank": len(features),
        "axis_name": layer.axis_name if is_bound(layer.axis_name) else None,
        "axis_index_groups": None if groups is None else tuple(map(tuple, groups)),
        "has_weights": mask is not None,
        "has_domain": numbers is not None,
    }
    mean, var = tap_p.bind(x, mean, var, *others, **params)
    return mean, var


def _mask_weights(mask: Any, x: Array, features: tuple[int, ...], *, own_masks: bool) -> Array:
    if own_masks:
        return position_weights(mask, x.shape, features).astype(jnp.float32)
    mask = jnp.asarray(mask, bool)
    return mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape).astype(jnp.float32)
