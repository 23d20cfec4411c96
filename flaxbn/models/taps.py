"""The tap of a layer's call: where a reader of the traced model chooses the statistics to normalize by."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from flaxbn.layers.arguments import domain_of, feature_axes, position_weights
from flaxbn.models.recognized_calls import flax_mask
from flaxbn.tracing.primitive import bind_tap


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
    return bind_tap(
        x,
        mean,
        var,
        features,
        layer=name,
        weights=None if mask is None else _mask_weights(mask, x, features, own_masks=own_masks),
        domain=domain_of(domain, getattr(layer, "num_domains", None), x.shape, features),
        axis_name=layer.axis_name,
        axis_index_groups=layer.axis_index_groups,
    )


def _mask_weights(mask: Any, x: Array, features: tuple[int, ...], *, own_masks: bool) -> Array:
    if own_masks:
        return position_weights(mask, x.shape, features).astype(jnp.float32)
    return flax_mask(mask, x.ndim)
