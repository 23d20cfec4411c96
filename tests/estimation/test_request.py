"""What is asked of an estimate: where its variables lie, and that they are concrete."""

import jax
import numpy as np
import pytest
from flax import jax_utils
from jax.sharding import PartitionSpec
from meshes import EVERYWHERE, MESHES, NET, VARIABLES, X, estimate, on_mesh, oracle, split_over_model, strided
from oracle import assert_same_statistics

import flaxbn
from flaxbn.estimation.request import request


@pytest.fixture(params=MESHES)
def sharding(request, devices):
    return on_mesh(*MESHES[request.param])


def test_variables_split_over_model_axes_stay_split(sharding):
    """Each device is given its part of a kernel, and what lies elsewhere whole."""

    def placed(variables):
        options = dict.fromkeys(("call", "sample_weight", "only", "rngs"))
        return request(NET, variables, sharding=sharding, **options).variables["params"]["Dense_0"]["kernel"]

    kernel = placed(split_over_model(sharding))
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(4, 4)}
    np.testing.assert_array_equal(kernel, VARIABLES["params"]["Dense_0"]["kernel"])
    assert {shard.data.shape for shard in placed(VARIABLES).addressable_shards} == {(4, 8)}


def test_variables_on_another_mesh_are_brought_to_this_one(devices):
    other = on_mesh((2, 2), ("x", "model"), "x")
    found = estimate(variables=split_over_model(other), batch_size=25, sharding=flaxbn.data_sharding())
    assert_same_statistics(found, oracle(strided(25)), EVERYWHERE)


def in_jit(f):
    return jax.jit(f)(VARIABLES, X)


def in_pmap(f):
    return jax.pmap(f)(jax_utils.replicate(VARIABLES), X.reshape(8, 25, 4))


def in_shard_map(f):
    data, whole = PartitionSpec("data"), PartitionSpec()
    return jax.shard_map(f, mesh=flaxbn.data_sharding().mesh, in_specs=(whole, data), out_specs=whole)(VARIABLES, X)


@pytest.mark.parametrize("traced", ["variables", "data", "both"])
@pytest.mark.parametrize("transformed", [in_jit, in_pmap, in_shard_map])
def test_inside_a_transformation_the_error_says_what_to_write(devices, transformed, traced):
    def inside(variables, x):
        variables, x = VARIABLES if traced == "data" else variables, X if traced == "variables" else x
        return estimate(x, variables, batch_size=25)

    with pytest.raises(
        TypeError, match=r"concrete arrays.*[Oo]utside.*`jax.pmap`.*`sharding=flaxbn.data_sharding\(\)`"
    ):
        transformed(inside)
