"""Random keys for each batch, device and process."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def fold_in(keys: Any, number: Any) -> Any:
    """A tree of keys, each of them with a number folded in; of an array of keys, each by itself."""

    def fold(key: Array) -> Array:
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or not key.ndim:
            return jax.random.fold_in(key, number)
        return jax.vmap(lambda one: jax.random.fold_in(one, number))(key.ravel()).reshape(key.shape)

    return jax.tree.map(fold, keys)
