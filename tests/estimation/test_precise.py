"""One pass in which each device may normalize by its own part of a batch, and what the devices tell each other."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import collectives, programs, runs_layers
from jax.sharding import NamedSharding, PartitionSpec
from meshes import (
    EVERYWHERE,
    MESHES,
    X,
    by_device,
    estimate,
    on_devices,
    on_mesh,
    oracle,
    parts_of,
    spent,
    split_over_model,
    strided,
)
from models import MLP
from oracle import assert_same_statistics

import flaxbn
from flaxbn.estimation.batch_pass import TOGETHER


@pytest.fixture(params=MESHES)
def sharding(request, devices):
    return on_mesh(*MESHES[request.param])


def assert_normalized_by_parts(found, batches, devices=8):
    parts = [part for batch in batches for part in parts_of(batch, devices)]
    assert_same_statistics(found, oracle(parts), EVERYWHERE)
    with pytest.raises(AssertionError):  # the oracle tells parts from batches
        assert_same_statistics(found, oracle(batches), EVERYWHERE)


def test_devices_normalize_by_their_own_part_of_arrays(devices):
    assert_normalized_by_parts(by_device(X[:192], batch_size=48), strided(48, 192))


def test_devices_normalize_by_their_own_part_of_a_stream(devices):
    assert_normalized_by_parts(by_device(iter(np.split(X[:192], 4))), np.split(X[:192], 4))


def test_parts_that_do_not_divide(devices):
    """Batches of 34 and 33 in parts of 5: the seventh device has 4 or 3 samples, and the last only padding."""
    assert_normalized_by_parts(by_device(X[:100], batch_size=34), strided(34, 100))


def test_parts_of_a_stream_that_do_not_divide(devices):
    """18 samples in parts of 3: two devices have only padding."""
    batches = [X[:18], X[18:52], X[52:70]]
    assert_normalized_by_parts(by_device(batches), batches)


def test_parts_are_as_batches_of_their_own(devices):
    found = by_device([X[:18]])
    assert_same_statistics(found, jax.device_get(estimate(parts_of(X[:18]))), EVERYWHERE)


def test_devices_normalize_by_themselves_on_any_mesh(sharding):
    """Four parts, each on two devices of the model axis."""
    found = by_device(X, sharding, batch_size=25, variables=split_over_model(sharding))
    assert_normalized_by_parts(found, strided(25), devices=4)


def test_one_part_is_the_whole_batch(devices):
    whole = NamedSharding(flaxbn.data_sharding().mesh, PartitionSpec())
    for sharding in (whole, on_devices(1)):
        assert_same_statistics(by_device(X, sharding, batch_size=25), oracle(strided(25)), EVERYWHERE)


def test_weights_with_devices_by_themselves(devices):
    weights = np.random.default_rng(1).integers(1, 4, 100).astype(np.float32)
    found = by_device([{"x": X[:100], "w": weights}], call=lambda m, b: m(b["x"]), sample_weight=lambda b: b["w"])
    assert_same_statistics(found, oracle(parts_of(X[:100]), parts_of(weights)), EVERYWHERE)


def test_each_device_has_random_keys_of_its_own(devices):
    def call(module, x):
        return module(0 * x + jax.random.normal(module.make_rng("noise")))

    rngs = {"noise": jax.random.key(3)}
    found = by_device([X[:64]], call=call, rngs=rngs)
    assert np.all(found["BatchNorm_0"]["var"] > 1e-3)


def test_statistics_that_are_not_finite_name_the_batch_on_any_device(devices):
    x = X[:192].copy()
    x[130] = np.nan
    with pytest.raises(ValueError, match=r"'BatchNorm_0' are not in batch 2 "):
        by_device(np.split(x, 3))
    with pytest.raises(ValueError, match=r"'BatchNorm_0' are not in batch 1 "):
        by_device(x, batch_size=64)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"say by `sharding` how batches are split.*`sharding=flaxbn.data_sharding\(\)`", {"sharding": None}),
        (r'those of the whole set.*leave `normalization_batch` at "global", got \'device\'', {"method": "exact"}),
        (r'must be "global", "device", or a positive integer: got \'local\'', {"normalization_batch": "local"}),
    ],
)
def test_errors_of_normalization_batch(message, options):
    options = {"sharding": flaxbn.data_sharding(), "normalization_batch": "device", **options}
    with pytest.raises(ValueError, match=message):
        estimate(batch_size=25, **options)


@pytest.mark.parametrize("size", [8, 9])
def test_a_part_of_one_value_is_an_error(devices, size):
    """As it is where each part is a batch of its own: 8 parts of 1; or 4 of 2 and one of 1, beside padding."""
    with pytest.raises(ValueError, match=r"more than one value"):
        estimate(parts_of(X[:size]))
    with pytest.raises(ValueError, match=r"more than one value"):
        by_device([X[:size]])


@pytest.mark.parametrize(
    ("together", "options"),
    [(TOGETHER, {}), (1, {"sharding": True}), (1, {"sharding": True, "normalization_batch": "device"})],
    ids=str,
)
def test_a_stream_is_read_ahead_of_the_devices(devices, together, options):
    """No result comes back between batches: the next one is asked for while the device works on the last.

    Without `sharding` it works on groups, and begins when there is a first one.

    Where jax guards transfers, on accelerators, it sees none; on CPUs it does not, but waiting for results shows.
    """
    if "sharding" in options:
        options = {**options, "sharding": flaxbn.data_sharding()}
    busy, size = [], 48 if together == 1 else 24
    jax.block_until_ready([array for array in jax.live_arrays() if not array.is_deleted()])

    def stream():
        with jax.transfer_guard_device_to_host("disallow"):
            for i in range(together + 3):
                busy.append(any(not (array.is_deleted() or array.is_ready()) for array in jax.live_arrays()))
                yield X[size * i : size * (i + 1)]

    found = estimate(stream(), call=slow_call, **options)
    assert busy[together:] == [True, True, True]
    assert np.all(np.isfinite(found["BatchNorm_1"]["var"]))


def slow_call(module, x):
    return module(x + 0 * spent(x))


def compiled(features, batches, **options):
    """The programs that run the layers of a model of these features, in a pass over batches of 24 samples."""
    model = MLP(features, flaxbn.BatchNorm)
    variables = model.init(jax.random.key(0), X[:2])
    estimate_all = functools.partial(estimate, batches, variables, model, sharding=flaxbn.data_sharding(), **options)
    return list(map(collectives, filter(runs_layers, programs(estimate_all))))


def test_devices_by_themselves_do_not_communicate_within_the_pass(devices):
    """What a program says of all batches is said once: not in its loop over batches."""
    options = {"normalization_batch": "device", "batch_size": 24}
    few, many = (compiled((8, 5), X[: 24 * batches], **options) for batches in (2, 8))
    assert few == many
    assert [inside for _, inside in few] == [0]
    ((total, inside),) = compiled((8, 5), X[:48], batch_size=24)  # where there are some, they are seen
    assert 0 < inside <= total


def test_devices_by_themselves_do_not_communicate_in_a_step_of_a_stream(devices):
    assert {total for total, _ in compiled((8, 4), [X[:24]], normalization_batch="device")} == {0}
    assert min(total for total, _ in compiled((8, 4), [X[:24]])) > 0


def test_each_layer_communicates_a_fixed_number_of_times(devices):
    """Over the global batch: one collective for each layer and batch."""
    for depth in (1, 2, 3):
        ((_, inside),) = compiled((4,) * depth, X[:72], batch_size=24)
        assert inside == depth


@pytest.mark.parametrize("method", ["precise", "exact"])
def test_a_real_layer_beside_a_complex_one(method):
    class Modulus(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            options = {"use_running_average": not train, "momentum": 0.0}
            x = flaxbn.BatchNorm(**options, name="complex")(x)
            return flaxbn.BatchNorm(**options, name="real")(jnp.abs(x))

    rng = np.random.default_rng(0)
    x = (rng.normal(2, 1, (32, 3)) + 1j * rng.normal(size=(32, 3))).astype(np.complex64)
    variables = Modulus().init(jax.random.key(0), x)
    found = flaxbn.estimate_population_stats(Modulus(), variables, x, batch_size=32, method=method)
    expected, y = x.mean(0, dtype=np.complex128), x.astype(np.complex128)
    y = np.abs((y - expected) / np.sqrt((np.abs(y - expected) ** 2).mean(0) + 1e-5))
    np.testing.assert_allclose(found["complex"]["mean"], expected, rtol=1e-6)
    assert_same_statistics(found["real"], {"mean": y.mean(0), "var": y.var(0)})
