"""Estimation on several devices: the statistics do not depend on how many, and how people train on them."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import jax_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from oracle import assert_same_statistics, merged

import flaxbn
from flaxbn.data import placement
from flaxbn.data.batches import abstract, strided_rows
from flaxbn.estimation.chunks import room
from flaxbn.estimation.compiled import shapes_of
from flaxbn.estimation.exact.segments import Segments
from flaxbn.estimation.precise import Pass, _shapes
from flaxbn.estimation.request import request
from flaxbn.estimation.reuse import Compiled
from flaxbn.tracing.flatten import unroll

N = 200
RNG = np.random.default_rng(0)
X = (RNG.normal(size=(N, 4)) + np.sort(RNG.integers(0, 4, N))[:, None]).astype(np.float32)
EVERYWHERE = 1e-5
"""What the same statistics are on any number of devices: sums of 200 float32 in another order, twice in depth."""


class Net(nn.Module):
    """Dense layers with batch normalization, which forget what they had seen."""

    axis_name: str | None = None
    features: tuple[int, ...] = (8, 6)

    @nn.compact
    def __call__(self, x, train=False):
        for features in self.features:
            x = nn.Dense(features)(x)
            norm = flaxbn.BatchNorm(use_running_average=not train, momentum=0.0, axis_name=self.axis_name)
            x = nn.relu(norm(x))
        return x


NET = Net()
VARIABLES = jax.jit(NET.init)(jax.random.key(0), X[:2])


def oracle(batches, weights=None):
    """Net in float64, each batch normalized by itself and all merged by hand."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), VARIABLES["params"])
    found = {f"BatchNorm_{i}": [] for i in range(2)}
    for k, batch in enumerate(batches):
        x, w = batch.astype(np.float64), np.ones(len(batch)) if weights is None else weights[k]
        for i, layer in enumerate(found.values()):
            x = x @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"]
            mean = np.average(x, axis=0, weights=w)
            var = np.average((x - mean) ** 2, axis=0, weights=w)
            layer.append((w.sum(), mean, var))
            x = np.maximum((x - mean) / np.sqrt(var + 1e-5), 0)
    return {name: dict(zip(("mean", "var"), merged(*zip(*layer)))) for name, layer in found.items()}


def strided(batch_size, samples=N):
    count = -(-samples // batch_size)
    return [X[k:samples:count] for k in range(count)]


def on_devices(count):
    mesh = Mesh(np.array(jax.devices()[:count]), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("data"))


def on_mesh(shape, names, split, kind=AxisType.Auto):
    mesh = Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), names, axis_types=(kind,) * len(names))
    return NamedSharding(mesh, PartitionSpec(split))


def split_over_model(sharding):
    """The variables with the kernels split over the axis "model" of the mesh, all else whole."""

    def put(leaf):
        spec = PartitionSpec(None, "model") if leaf.ndim == 2 else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(sharding.mesh, spec))

    return jax.tree.map(put, VARIABLES)


def estimate(batches=X, variables=VARIABLES, model=NET, **options):
    return flaxbn.estimate_population_stats(model, variables, batches, **options)


MESHES = {
    "model axis": ((4, 2), ("data", "model"), "data", AxisType.Auto),
    "explicit": ((4, 2), ("data", "model"), "data", AxisType.Explicit),
    "two data axes": ((2, 2, 2), ("a", "b", "model"), ("a", "b"), AxisType.Auto),
}


@pytest.fixture(params=MESHES)
def sharding(request, devices):
    return on_mesh(*MESHES[request.param])


@pytest.mark.parametrize(
    ("method", "given_as", "count"),
    [
        *(("precise", given_as, count) for given_as in ("arrays", "stream") for count in (1, 2, 8)),
        *(("exact", "arrays", count) for count in (1, 2, 8)),
        ("exact", "stream", 8),
    ],
)
def test_statistics_do_not_depend_on_the_number_of_devices(devices, method, given_as, count):
    """Batches of 25, which neither 2 nor 8 devices divide."""
    batches, options = (X, {"batch_size": 25}) if given_as == "arrays" else (iter(strided(25)), {})
    found = estimate(batches, method=method, sharding=on_devices(count), **options)
    expected = oracle(strided(25) if method == "precise" else [X])
    assert_same_statistics(found, expected, EVERYWHERE)
    with pytest.raises(AssertionError):  # the oracle tells the methods apart
        assert_same_statistics(found, oracle([X] if method == "precise" else strided(25)), EVERYWHERE)


@pytest.mark.parametrize(("method", "given_as"), [("precise", "arrays"), ("precise", "stream"), ("exact", "stream")])
def test_each_sample_counts_once(devices, method, given_as):
    """Padding of 7 in a batch of 25, and of 5 in one of 3."""
    for size in (25, 3):
        x = X[: 4 * size]
        batches, options = (x, {"batch_size": size}) if given_as == "arrays" else (np.split(x, 4), {})
        sharding = flaxbn.data_sharding()
        moments = flaxbn.population_moments(NET, VARIABLES, batches, method=method, sharding=sharding, **options)
        for layer in moments.values():
            np.testing.assert_array_equal(layer.count, len(x))
        # The first layer's statistics are those of all samples, however they are split.
        found = flaxbn.to_batch_stats(moments, VARIABLES["batch_stats"])
        assert_same_statistics(found, {"BatchNorm_0": oracle([x])["BatchNorm_0"]}, EVERYWHERE)


@pytest.mark.parametrize("method", ["precise", "exact"])
def test_padding_has_no_weight_where_samples_have_weights(devices, method):
    """Weights that are constant where they end: padding that repeated the last one would count."""
    weights = np.random.default_rng(1).integers(1, 4, N).astype(np.float32)
    found = estimate(
        {"x": X, "w": weights},
        batch_size=25,
        call=lambda module, batch: module(batch["x"]),
        sample_weight=lambda batch: batch["w"],
        method=method,
        sharding=flaxbn.data_sharding(),
    )
    parts, count = ([X], 1) if method == "exact" else (strided(25), 8)
    assert_same_statistics(found, oracle(parts, [weights[k::count] for k in range(count)]), EVERYWHERE)


@pytest.mark.parametrize("method", ["precise", "exact"])
def test_any_mesh_gives_the_same_statistics(sharding, method):
    expected = oracle(strided(25) if method == "precise" else [X])
    found = estimate(variables=split_over_model(sharding), batch_size=25, method=method, sharding=sharding)
    assert_same_statistics(found, expected, EVERYWHERE)


@pytest.mark.parametrize(("method", "given_as"), [("precise", "arrays"), ("exact", "stream")])
@pytest.mark.parametrize("mesh", ["model axis", "explicit"])
def test_data_may_lie_on_the_mesh_already(devices, mesh, method, given_as):
    sharding = on_mesh(*MESHES[mesh])
    x = jax.device_put(X, sharding)
    batches, options = (x, {"batch_size": 25}) if given_as == "arrays" else ([x], {})
    found = estimate(batches, split_over_model(sharding), method=method, sharding=sharding, **options)
    assert_same_statistics(found, oracle(strided(25) if given_as == "arrays" else [X]), EVERYWHERE)


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ("model axis", {}),
        ("model axis", {"normalization_batch": "device"}),
        ("explicit", {}),
        ("explicit", {"normalization_batch": "device"}),
        ("explicit", {"method": "exact"}),
    ],
    ids=str,
)
def test_within_set_mesh(devices, mesh, options):
    """A mesh that the caller has made the current one."""
    sharding = on_mesh(*MESHES[mesh])
    with jax.set_mesh(sharding.mesh):
        found = estimate([X], split_over_model(sharding), sharding=sharding, **options)
    expected = oracle(np.split(X, 4) if "normalization_batch" in options else [X])
    assert_same_statistics(found, expected, EVERYWHERE)


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


def test_random_numbers_do_not_depend_on_the_number_of_devices(devices):
    def call(module, x):
        return module(x + jax.random.normal(module.make_rng("noise"), x.shape))

    def found(count):
        rngs = {"noise": jax.random.key(7)}
        return estimate(X[:192], batch_size=48, call=call, rngs=rngs, sharding=on_devices(count))

    assert_same_statistics(found(8), jax.device_get(found(1)), EVERYWHERE)


# Each device normalizes by its own part of a batch.


def parts_of(batch, devices=8):
    """A batch padded to a multiple of the devices and cut, without padding: some devices may have nothing."""
    each = -(-len(batch) // devices)
    return [batch[i : i + each] for i in range(0, len(batch), each)]


def by_device(batches, sharding=None, **options):
    sharding = sharding or flaxbn.data_sharding()
    return estimate(batches, sharding=sharding, normalization_batch="device", **options)


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
        (r'must be "global" or "device": got \'local\'', {"normalization_batch": "local"}),
    ],
)
def test_errors_of_normalization_batch(message, options):
    options = {"sharding": flaxbn.data_sharding(), "normalization_batch": "device", **options}
    with pytest.raises(ValueError, match=message):
        estimate(batch_size=25, **options)


@pytest.mark.parametrize("method", ["precise", "exact"])
@pytest.mark.parametrize("count", [1, 8])
def test_a_batch_of_one_value_is_an_error_on_any_number_of_devices(devices, count, method):
    with pytest.raises(ValueError, match=r"more than one value"):
        estimate([X[:1]], sharding=on_devices(count), method=method)


@pytest.mark.parametrize("size", [8, 9])
def test_a_part_of_one_value_is_an_error(devices, size):
    """As it is where each part is a batch of its own: 8 parts of 1; or 4 of 2 and one of 1, beside padding."""
    with pytest.raises(ValueError, match=r"more than one value"):
        estimate(parts_of(X[:size]))
    with pytest.raises(ValueError, match=r"more than one value"):
        by_device([X[:size]])


# Inside a transformation.


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


# How people train.


def test_trained_under_pmap(devices):
    """Each replica keeps the statistics of its own part; merged they are those of all."""

    @jax.pmap
    def step(variables, x):
        return NET.apply(variables, x, train=True, mutable=["batch_stats"])[1]

    replicated = jax_utils.replicate(VARIABLES)
    parts = X.reshape(8, 25, 4)
    merged_stats = flaxbn.merge_replicas(step(replicated, parts)["batch_stats"])
    assert_same_statistics(merged_stats, oracle(parts), EVERYWHERE)
    # The estimate of one replica's variables, normalized as it was trained, has nothing to add.
    single = {**jax_utils.unreplicate(replicated), "batch_stats": merged_stats}
    assert_same_statistics(by_device([X], variables=single), oracle(parts), EVERYWHERE)
    assert_same_statistics(estimate(variables=single, batch_size=25), oracle(strided(25)), EVERYWHERE)
    averaged = jax.tree.map(lambda a: a.mean(0), step(replicated, parts)["batch_stats"])
    with pytest.raises(AssertionError):
        assert_same_statistics(averaged, oracle(parts), 0.01)


def test_trained_under_shard_map_with_an_axis_name(devices):
    batches = flaxbn.data_sharding()

    def synchronized(variables, x):
        return Net(axis_name="data").apply(variables, x, train=True, mutable=["batch_stats"])[1]

    step = jax.jit(
        jax.shard_map(
            synchronized,
            mesh=batches.mesh,
            in_specs=(PartitionSpec(), PartitionSpec("data")),
            out_specs=PartitionSpec(),
        )
    )
    trained = {**VARIABLES, **step(VARIABLES, jax.device_put(X, batches))}
    assert_same_statistics(trained["batch_stats"], oracle([X]), EVERYWHERE)
    found = estimate([X], trained, sharding=batches)
    assert_same_statistics(found, oracle([X]), EVERYWHERE)


@pytest.mark.parametrize("mesh", ["one axis", "model axis"])
def test_trained_under_sharded_jit(devices, mesh):
    sharding = flaxbn.data_sharding() if mesh == "one axis" else on_mesh(*MESHES[mesh])
    variables = VARIABLES if mesh == "one axis" else split_over_model(sharding)

    @jax.jit
    def step(variables, x):
        return NET.apply(variables, x, train=True, mutable=["batch_stats"])[1]

    trained = {**variables, **step(variables, jax.device_put(X, sharding))}
    assert_same_statistics(trained["batch_stats"], oracle([X]), EVERYWHERE)
    found = estimate([X], trained, sharding=sharding)
    assert_same_statistics(found, oracle([X]), EVERYWHERE)


# What the devices do meanwhile.


def spent(x):
    """A tenth of a second or more of work on the device."""
    work = jnp.broadcast_to(x[:, :1], (len(x), 64))
    return jax.lax.fori_loop(0, 10_000, lambda _, a: jnp.sin(a) + 1e-3, work)[:, :1]


def slow_call(module, x):
    return module(x + 0 * spent(x))


@pytest.mark.parametrize(
    "options", [{}, {"sharding": True}, {"sharding": True, "normalization_batch": "device"}], ids=str
)
def test_a_stream_is_read_ahead_of_the_devices(devices, options, monkeypatch):
    """No result comes back between batches: the next one is asked for while the device works on the last.

    Where jax guards transfers, on accelerators, it sees none; on CPUs it does not, but waiting for results shows.
    """
    if "sharding" in options:
        options = {**options, "sharding": flaxbn.data_sharding()}
    done, waiting = [], []
    make = Pass.__init__

    def recorded(self, *args):
        make(self, *args)
        step = self.step
        self.step = lambda *args: done.append(step(*args)) or done[-1]

    def stream():
        with jax.transfer_guard_device_to_host("disallow"):
            for i in range(4):
                waiting.append([not count.is_ready() for _, count in done[-1:]])
                yield X[48 * i : 48 * (i + 1)]

    monkeypatch.setattr(Pass, "__init__", recorded)
    found = estimate(stream(), call=slow_call, **options)
    assert waiting == [[], [True], [True], [True]]
    assert np.all(np.isfinite(found["BatchNorm_1"]["var"]))


@pytest.mark.parametrize("size", [48, 50])
@pytest.mark.parametrize("sharded", [False, True])
def test_batches_made_on_devices_are_not_read_back(devices, sharded, size):
    """A batch that the device still works on, an augmentation for example, is not waited for, padded or not."""
    made = jax.jit(lambda x: x + 0 * spent(x))
    sharding = flaxbn.data_sharding() if sharded else None
    for _ in range(2):  # the first compiles
        batch = made(X[:size])
        with jax.transfer_guard_device_to_host("disallow"):
            placed, present = placement.placed(batch, sharding)
        waited = batch.is_ready()
        np.testing.assert_array_equal(np.asarray(placed)[:size], batch)
    assert not waited
    assert (present is not None) == (sharded and size == 50)


COLLECTIVE = r"= \S.* (?:all-reduce|all-gather|collective-permute|reduce-scatter|all-to-all)(?:-start)?\("


def collectives(hlo):
    """How many there are in all, and how many in loops: in their bodies, and in what these call."""
    computations, name = {}, None
    for line in hlo.splitlines():
        start = re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line)
        name = start[1] if start else name
        computations.setdefault(name, []).append(line)
    texts = {name: "\n".join(lines) for name, lines in computations.items()}
    inside = set(re.findall(r"body=%?([\w.-]+)", hlo))
    while True:
        called = {c for i in inside for c in re.findall(r"%?([\w.-]+)", texts[i].split("\n", 1)[1]) if c in texts}
        if called <= inside:
            break
        inside |= called
    count = {name: len(re.findall(COLLECTIVE, text)) for name, text in texts.items()}
    return sum(count.values()), sum(count[name] for name in inside)


def lowered(step, batches, normalization_batch, model=NET, variables=VARIABLES):
    """What a pass over `batches` batches of 24 samples compiles to, as a scan or in one step of a stream."""
    sharding = flaxbn.data_sharding()
    options = {"sharding": sharding, "normalization_batch": normalization_batch}
    asked = request(model, variables, call=None, sample_weight=None, only=None, rngs=None, **options)
    source, (closed,) = Compiled(Pass, asked.options).find(_shapes(asked, abstract(X, 24), None))
    if step:
        args = (closed, asked.variables, asked.rngs, jax.device_put(X[:24], sharding), None, 0)
        buffer = room(jax.eval_shape(source.sharded_moments, *args), source.chunk)
        return source.step.lower(buffer, 0, *args).compile().as_text()
    steps = jax.device_put(X[strided_rows(24 * batches, 24)[0]], placement.by_step(sharding))
    return source.scan.lower(closed, asked.variables, asked.rngs, steps, None, None, 0).compile().as_text()


def test_devices_by_themselves_do_not_communicate_within_the_pass(devices):
    few, many = (collectives(lowered(False, batches, "device")) for batches in (2, 8))
    assert few == many
    assert few[1] == 0
    total, inside = collectives(lowered(False, 2, "global"))  # where there are some, they are seen
    assert 0 < inside <= total


def test_devices_by_themselves_do_not_communicate_in_a_step_of_a_stream(devices):
    assert collectives(lowered(True, 1, "device"))[0] == 0
    assert collectives(lowered(True, 1, "global"))[0] > 0


def test_each_layer_communicates_a_fixed_number_of_times(devices):
    """Over the global batch: one collective for each layer and batch."""
    inside = []
    for depth in (1, 2, 3):
        model = Net(features=(4,) * depth)
        variables = model.init(jax.random.key(0), X[:2])
        inside.append(collectives(lowered(False, 3, "global", model, variables))[1])
    assert inside == [1, 2, 3]


def test_exact_calls_communicate_once_for_each_batch(devices):
    sharding = flaxbn.data_sharding()
    options = {"call": None, "sample_weight": None, "only": None, "rngs": None, "sharding": sharding}
    asked = request(NET, VARIABLES, normalization_batch="global", **options)
    shapes = shapes_of(asked.variables, abstract(X, 24), asked.rngs, present=None)
    source, (closed,) = Compiled(Segments, asked.options, unroll).find(shapes)
    values, shared = {source.inputs[0]: jax.device_put(X[:24], sharding)}, source.shared(closed, asked.variables)
    for segment in source.segments:
        given = [shared[v] for v in segment._shared]
        read = [values[v] for v in segment._read]
        arguments = [None] * len(read), read, given, None, segment.empty(), 0
        assert collectives(segment._measure.lower(*arguments).compile().as_text())[0] == 1
        moments, made, _ = segment.measure(values, shared, {}, None, segment.empty(), 0)
        values |= made
        shared |= segment.statistics(moments.mean[0], moments.var[0])


def test_a_sharding_of_other_processes_is_an_error(monkeypatch):
    monkeypatch.setattr(NamedSharding, "is_fully_addressable", property(lambda self: False))
    with pytest.raises(ValueError, match=r"must lie on devices of this process.*`flaxbn.data_sharding\(\)`"):
        estimate(batch_size=25, sharding=on_devices(1))
