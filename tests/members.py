"""Eight members of a mapped axis that see different parts of the data, and the three ways to map over them."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

MEMBERS, N, C = 8, 6, 3
GROUPS = [[0, 3, 5, 6], [1, 2, 4, 7]]
SPLIT = PartitionSpec("i")


def data(offset=0.0):
    """Members differ in their means, so the variance between them matters."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(MEMBERS, N, C)) * [1.0, 0.5, 3.0] + 2 * rng.normal(size=(MEMBERS, 1, C))
    return (x + offset).astype(np.float32)


def weights():
    """From an empty member to a full one, some with weights that are no integers."""
    w = np.float32(np.arange(N) < np.arange(MEMBERS)[:, None])
    return w * np.linspace(0.5, 2.0, N, dtype=np.float32)


@functools.cache
def mesh():
    return Mesh(np.array(jax.devices()[:MEMBERS]), ("i",))


def by_vmap(f):
    return jax.jit(jax.vmap(f, axis_name="i"))


def by_pmap(f):
    return jax.pmap(f, axis_name="i")


def by_shard_map(f, check_vma=True):
    def member(*arguments):
        return jax.tree.map(lambda a: a[None], f(*(a[0] for a in arguments)))

    return jax.jit(jax.shard_map(member, mesh=mesh(), in_specs=SPLIT, out_specs=SPLIT, check_vma=check_vma))


every_map = pytest.mark.parametrize("mapped", [by_vmap, by_pmap, by_shard_map])


# The other two maps do not know groups: shard_map only without its check.
grouping_maps = pytest.mark.parametrize("mapped", [by_pmap, functools.partial(by_shard_map, check_vma=False)])
