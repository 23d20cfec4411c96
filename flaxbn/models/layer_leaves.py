"""The statistics and affine parameters of batch-norm layers in the variables of a model, of either of Flax's APIs."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from flaxbn.data.placement import placed_as
from flaxbn.layers.names import layer_path
from flaxbn.models.leaves import leaf_names
from flaxbn.models.places import Path, named_pairs
from flaxbn.models.recognized import statistics_names

AFFINE = ("scale", "bias")


class LayerLeaves:
    """The leaves of Linen variables or of an nnx state, by their paths; and the layers among them, by their own."""

    def __init__(self, variables: Any) -> None:
        leaves, self._structure = jax.tree.flatten(variables)
        self._names = leaf_names(variables, self._structure)
        self.leaves: dict[Path, Any] = dict(zip(self._names, leaves))
        is_linen = isinstance(variables, Mapping) and "batch_stats" in variables
        self._statistics: Path = ("batch_stats",) if is_linen else ()
        self._params: Path = ("params",) if is_linen else ()
        held = [path for path in self._names if path[: len(self._statistics)] == self._statistics]
        pairs = named_pairs({path: np.shape(self.leaves[path]) for path in held}, statistics_names())
        self.layers = {layer_path(path[len(self._statistics) :]): path[len(self._statistics) :] for path in pairs}
        self._pairs = {
            layer: dict(zip(("mean", "var"), pairs[(*self._statistics, *p)])) for layer, p in self.layers.items()
        }
        if not self.layers:
            raise ValueError(
                "`variables` must hold the statistics of a batch-norm layer, a 'mean' and a 'var': those of a Linen "
                "model in the collection 'batch_stats', or the state of an nnx model (`nnx.split(model)[1]`)."
            )

    def path(self, layer: str, name: str) -> Path:
        """Where a layer's statistic or parameter lies."""
        if name in self._pairs[layer]:
            return self._pairs[layer][name]
        root = self._params if name in AFFINE else self._statistics
        return (*root, *self.layers[layer], name)

    def shape(self, layer: str) -> tuple[int, ...]:
        """That of the layer's mean."""
        return np.shape(self.leaves[self.path(layer, "mean")])

    def replaced(self, new: Mapping[Path, np.ndarray]) -> Any:
        """The variables with other leaves, of the dtypes and at the places of the old ones."""
        old = [self.leaves[path] for path in new]
        with np.errstate(over="ignore"):
            values = [value.astype(leaf.dtype) for value, leaf in zip(new.values(), old)]
        bad = [path for path, value in zip(new, values) if not np.isfinite(value).all()]
        if bad:
            raise ValueError(
                "Statistics and parameters must be finite, in the dtype in which they are stored: "
                f"'{'/'.join(bad[0])}' is not, in {np.dtype(self.leaves[bad[0]].dtype)}."
            )
        leaves = self.leaves | dict(zip(new, placed_as(values, old)))
        return jax.tree.unflatten(self._structure, [leaves[path] for path in self._names])
