"""The usual augmentation of small photographs: shifted by up to four pixels, and half of them mirrored."""

import functools

import jax
import jax.numpy as jnp

PADDING = 4


def augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Each image padded by `PADDING` black pixels, cut to its size at a random place, and mirrored or not.

    He et al. 2016, "Deep residual learning for image recognition", section 4.2.

    Args:
        key: decides both for all images.
        images: [B, H, W, C].
    """
    places, mirrored = jax.random.split(key)
    corners = jax.random.randint(places, (len(images), 2), 0, 2 * PADDING + 1)
    padded = jnp.pad(images, ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0)))
    cut = jax.vmap(functools.partial(_cut, shape=images.shape[1:]))(padded, corners)
    return jnp.where(jax.random.bernoulli(mirrored, shape=(len(images), 1, 1, 1)), cut[:, :, ::-1], cut)


def _cut(image: jax.Array, corner: jax.Array, *, shape: tuple[int, int, int]) -> jax.Array:
    return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), shape)
