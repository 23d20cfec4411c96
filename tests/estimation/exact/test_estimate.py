"""Exact statistics: those of the whole set as one batch, however it is cut, ordered, kept or spread."""

import functools
import sys

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MODELS, Loop, Residual, initialized
from oracle import assert_same_statistics, by_training_mode, merged

import flaxbn

N = 65
RNG = np.random.default_rng(0)
# Sorted by class, and narrow: batches of a few samples in order are far from the whole.
X = (RNG.normal(size=(N, 3)) + np.arange(N)[:, None] // 16).astype(np.float32)
SEVENS = [X[i : i + 7] for i in range(0, N, 7)]
# One shape to compile.
THIRTEENS = list(X.reshape(5, 13, 3))
# The bound, some hundred roundings of float32: layers below add up what those above rounded.
EXACT = 1e-5


NET = Residual()
VARIABLES = initialized(NET, X)


def oracle(x, weights=None):
    """NET in float64 with the statistics of all samples, each of which counts by its weight."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), VARIABLES["params"])
    statistics = {}

    def layer(x, i):
        dense, norm = params[f"Dense_{i}"], params[f"BatchNorm_{i}"]
        x = x @ dense["kernel"] + dense["bias"]
        mean = np.average(x, axis=0, weights=weights)
        var = np.average((x - mean) ** 2, axis=0, weights=weights)
        statistics[f"BatchNorm_{i}"] = {"mean": mean, "var": var}
        return (x - mean) / np.sqrt(var + 1e-5) * norm["scale"] + norm["bias"]

    x = np.maximum(layer(x.astype(np.float64), 0), 0)
    x = x + np.maximum(layer(x, 1), 0)
    layer(x, 2)
    return statistics


WHOLE = oracle(X)


def exact(batches=THIRTEENS, model=NET, variables=VARIABLES, **options):
    return flaxbn.estimate_population_stats(model, variables, batches, method="exact", **options)


def precise(batches, model=NET, variables=VARIABLES, **options):
    return flaxbn.estimate_population_stats(model, variables, batches, **options)


def filled(model, x):
    """Variables as `initialized` makes them, without compiling an initialization."""
    rng = np.random.default_rng(8)

    def fill(path, a):
        name = path[-1].key
        if name == "kernel":
            return jnp.asarray(rng.normal(size=a.shape) / np.sqrt(a.shape[-2]), a.dtype)
        return jnp.full(a.shape, {"mean": 7, "var": 8, "scale": 1, "gain": 1.5}.get(name, 0), a.dtype)

    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.tree.map(jnp.asarray, x))
    return jax.tree_util.tree_map_with_path(fill, shapes)


def given_by_key(module, batch):
    return module(batch["x"])


def weight(batch):
    return batch["w"]


def test_the_oracle_is_one_batch_of_all_data():
    assert_same_statistics(precise([X]), WHOLE)
    assert_same_statistics(by_training_mode(NET, VARIABLES, [X], models.train), WHOLE)
    # It tells batches apart: precise statistics of the same batches are not within its tolerance.
    with pytest.raises(AssertionError):
        assert_same_statistics(precise(SEVENS), WHOLE, tolerance=1e-2)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_arrays_of_any_batch_size(batch_size):
    assert_same_statistics(exact(X, batch_size=batch_size), WHOLE, EXACT)


@pytest.mark.parametrize("given_as", ["list", "iterator", "generator"])
def test_batches_with_a_ragged_last_one(given_as):
    assert len(SEVENS[-1]) == 2
    batches = {"list": SEVENS, "iterator": iter(SEVENS), "generator": (batch for batch in SEVENS)}[given_as]
    assert_same_statistics(exact(batches), WHOLE, EXACT)


def test_a_shuffled_order():
    x = np.random.default_rng(1).permutation(X)
    assert_same_statistics(exact(list(x.reshape(5, 13, 3))), WHOLE, EXACT)


@settings(max_examples=10)
@given(st.data())
def test_any_split_and_order_give_the_same_statistics(data):
    order = data.draw(st.permutations(range(N)))
    batches, rest = [], X[np.array(order)]
    while len(rest):
        size = data.draw(st.sampled_from([s for s in (1, 2, 7) if s <= len(rest)]))
        batches, rest = [*batches, rest[:size]], rest[size:]
    assert_same_statistics(exact(batches), WHOLE, EXACT)


def test_a_stream_is_read_once():
    read = []

    def stream():
        for batch in SEVENS:
            read.append(len(batch))
            yield batch

    exact(stream())
    assert read == [len(batch) for batch in SEVENS]


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.bool_])
def test_integers_reach_a_layer(dtype):
    model, x = MODELS["root"], (X.round() + 3).astype(dtype)
    x[:9] = 0
    found = exact(x, model, filled(model, x), batch_size=13)
    assert_same_statistics(found, {"mean": x.mean(0), "var": x.var(0)}, EXACT)


def test_samples_are_cut_exactly():
    evenly = np.arange(28) * N // 28
    assert_same_statistics(exact(X, batch_size=7, num_samples=28), oracle(X[evenly]), EXACT)
    stream = iter(SEVENS)
    assert_same_statistics(exact(stream, num_samples=30), oracle(X[:30]), EXACT)
    assert len(list(stream)) == len(SEVENS) - 5


@pytest.mark.parametrize("name", MODELS)
def test_every_way_to_build_a_model(name):
    model = MODELS[name]
    variables = filled(model, models.X)
    found = exact(models.X, model, variables, batch_size=10)
    assert jax.tree.structure(found) == jax.tree.structure(variables["batch_stats"])
    assert_same_statistics(found, by_training_mode(model, variables, [models.X], models.train), EXACT)


@pytest.mark.parametrize("how", ["loop", "broadcast"])
def test_calls_of_one_layer_are_merged_with_a_warning(how):
    """Each call normalizes by statistics of its own, as in precise statistics."""
    model = models.Repeated(how)
    variables = filled(models.Repeated("loop"), models.X)
    if how != "loop":
        variables = {k: {"layers": v} for k, v in variables.items()}
    path = ("block",) if how == "loop" else ("layers", "block")
    x, means, variances = models.X.astype(np.float64), [], []
    for _ in range(3):
        x, mean, var = models.dense_normalized(variables, x, path)
        means.append(mean), variances.append(var)
    name = "/".join((*path, "norm"))
    with pytest.warns(UserWarning, match=f"'{name}': called more than once"):
        found = exact(models.X, model, variables, batch_size=10)
    for key in path:
        found = found[key]
    mean, var = merged([1, 1, 1], means, variances)
    assert_same_statistics(found["norm"], {"mean": mean, "var": var}, EXACT)


def test_recurrent_cells_merge_over_time():
    model = models.Recurrent()
    variables = filled(model, models.X)
    carry, means, variances = 0.0, [], []
    for t in reversed(range(3)):
        carry = 0.5 * carry + models.X[:, t].astype(np.float64)
        means.append(carry.mean(0)), variances.append(carry.var(0))
        carry = (carry - means[-1]) / np.sqrt(variances[-1] + 1e-5)
    with pytest.warns(UserWarning, match="called more than once"):
        found = exact(models.X, model, variables, batch_size=10)
    mean, var = merged([1, 1, 1], means, variances)
    assert_same_statistics(found["cell"]["norm"], {"mean": mean, "var": var}, EXACT)


def test_layers_fed_by_the_same_value():
    class Twins(nn.Module):
        @nn.compact
        def __call__(self, x):
            first = nn.BatchNorm(use_running_average=True, name="first")(x)
            second = nn.BatchNorm(use_running_average=True, name="second")(x)
            return nn.BatchNorm(use_running_average=True, name="product")(first * second)

    model = Twins()
    found = exact(model=model, variables=initialized(model, X))
    x = X.astype(np.float64)
    product = ((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)) ** 2
    for key, values in {"first": x, "second": x, "product": product}.items():
        assert_same_statistics(found[key], {"mean": values.mean(0), "var": values.var(0)}, EXACT)


def test_masks_in_the_model_select_positions():
    model, x = models.Masked(), models.X
    mask = np.random.default_rng(1).random(x.shape[:2]) < 0.6
    mask[:10] = False
    variables = filled(model, {"x": x, "mask": mask})
    found = exact({"x": x, "mask": mask}, model, variables, batch_size=10)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"]["Dense_0"])
    positions = (x.astype(np.float64) @ p["kernel"] + p["bias"])[mask]
    assert_same_statistics(found["norm"], {"mean": positions.mean(0), "var": positions.var(0)}, EXACT)


@pytest.mark.parametrize("given_as", ["arrays", "stream"])
def test_weights_repeat_samples_and_drop_padding(given_as):
    weights = np.random.default_rng(4).integers(0, 4, N)
    weights[13:26] = 0  # the second batch of the stream is nothing but padding
    expected = oracle(np.repeat(X, weights, axis=0))
    x = np.where(weights[:, None] > 0, X, np.nan)
    batches, options = {"x": x, "w": weights.astype(np.float32)}, {"batch_size": 13}
    if given_as == "stream":
        batches, options = [{k: a[i : i + 13] for k, a in batches.items()} for i in range(0, N, 13)], {}
    assert_same_statistics(exact(batches, call=given_by_key, sample_weight=weight, **options), expected, EXACT)


def test_weights_need_not_be_whole_numbers():
    weights = np.random.default_rng(5).random(N).astype(np.float32)
    found = exact({"x": X, "w": weights}, batch_size=13, call=given_by_key, sample_weight=weight)
    assert_same_statistics(found, oracle(X, weights), EXACT)


def test_only_leaves_layers_as_they_are_and_uses_them():
    found = exact(only=lambda path: path != "BatchNorm_0")
    chex.assert_trees_all_equal(found["BatchNorm_0"], VARIABLES["batch_stats"]["BatchNorm_0"])
    # Normalized by statistics that are not those of the data, hidden values are not of order 1.
    assert_same_statistics(found, precise([X], only=lambda path: path != "BatchNorm_0"), EXACT)


class DomainPair(nn.Module):
    """Two layers with statistics for each of three domains."""

    @nn.compact
    def __call__(self, batch):
        norm = functools.partial(flaxbn.BatchNorm, use_running_average=True, num_domains=3)
        x = norm(name="first")(batch["x"], domain=batch["d"])
        return norm(name="second")(jnp.tanh(x) + x[:, ::-1], domain=batch["d"])


def test_a_layer_that_saw_nothing_normalizes_by_what_is_stored():
    class Blind(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = flaxbn.BatchNorm(use_running_average=True, name="blind")(x, mask=jnp.zeros(x.shape[:1]))
            return nn.BatchNorm(use_running_average=True, name="norm")(y)

    model = Blind()
    found = exact(model=model, variables=filled(model, X), keep_unseen=True)
    x = (X.astype(np.float64) - 7) / np.sqrt(8 + 1e-5)
    assert_same_statistics(found["norm"], {"mean": x.mean(0), "var": x.var(0)}, EXACT)


@pytest.mark.parametrize("absent", [False, True])
def test_batches_of_mixed_domains(absent):
    model, d = DomainPair(), np.random.default_rng(2).integers(0, 2 if absent else 3, N).astype(np.int32)
    variables = initialized(model, {"x": X, "d": d})
    if absent:
        with pytest.raises(ValueError, match=r"'first' \(at \[2\]\), 'second' \(at \[2\]\) saw none.*keep_unseen"):
            exact({"x": X, "d": d}, model, variables, batch_size=13)
    found = exact({"x": X, "d": d}, model, variables, batch_size=13, keep_unseen=absent)
    for domain in range(3):
        x = X[d == domain].astype(np.float64)
        for name in ("first", "second"):
            stats = {k: found[name][k][domain] for k in ("mean", "var")}
            if domain == 2 and absent:
                chex.assert_trees_all_equal(stats, {k: variables["batch_stats"][name][k][2] for k in stats})
                continue
            assert_same_statistics(stats, {"mean": x.mean(0), "var": x.var(0)}, EXACT)
            x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
            x = np.tanh(x) + x[:, ::-1]


def test_renorm_counts_as_plain_batch_normalization():
    model = Residual(lambda momentum, **kwargs: flaxbn.BatchRenorm(momentum=0.5, **kwargs))
    stats = filled(model, X)["batch_stats"]
    params = {k.replace("BatchNorm", "BatchRenorm"): v for k, v in VARIABLES["params"].items()}
    found = exact(model=model, variables={"params": params, "batch_stats": stats})
    assert_same_statistics(found, {k.replace("BatchNorm", "BatchRenorm"): v for k, v in WHOLE.items()}, EXACT)
    assert found["BatchRenorm_0"]["steps"] == stats["BatchRenorm_0"]["steps"]


def test_half_precision_models():
    """Statistics that differ by a rounding of float32 round a few activations the other way, by 1/256."""
    model = Residual(dtype=jnp.bfloat16)
    x = X.astype(jnp.bfloat16)
    found = exact(x, model, batch_size=13)
    expected = precise([x], model)
    assert_same_statistics(found["BatchNorm_0"], expected["BatchNorm_0"], EXACT)
    # One activation of 65 that rounds the other way moves a mean by 1 / 256 / 65 of a standard deviation.
    assert_same_statistics(found, expected, 5 / 256 / 65)


@pytest.mark.parametrize(("given_as", "sample_weight"), [("arrays", None), ("stream", weight)])
def test_sharded_batches_give_the_same_statistics(devices, given_as, sample_weight):
    """Neither 22 or 21 samples nor a batch of 2 divide by 8."""
    sharding = flaxbn.data_sharding()
    assert len(sharding.device_set) == len(devices)
    w = np.ones(N, np.float32) if sample_weight is None else np.random.default_rng(6).random(N).astype(np.float32)
    batches, options = {"x": X, "w": w}, {"batch_size": 22}
    if given_as == "stream":
        batches, options = [{k: a[i : i + 21] for k, a in batches.items()} for i in range(0, N, 21)], {}
        assert len(batches[-1]["x"]) == 2
    found = exact(batches, call=given_by_key, sharding=sharding, sample_weight=sample_weight, **options)
    assert_same_statistics(found, oracle(X, w), EXACT)


def test_each_batch_gets_random_keys_of_its_own():
    model, rngs = models.Noisy(), {"noise": jax.random.key(3)}
    variables = model.init({"params": jax.random.key(0), **rngs}, X)
    found, again = (exact(X, model, variables, batch_size=13, rngs=rngs) for _ in range(2))
    assert np.all(found["norm"]["var"] > 0.1)
    chex.assert_trees_all_equal(found, again)
    # The keys of a batch are those that it has in the other method.
    assert_same_statistics(found["norm"], precise(X, model, variables, batch_size=13, rngs=rngs)["norm"], EXACT)


class ScannedCond(nn.Module):
    """A scan from its end: even steps have one layer, odd steps another; one behind sees what the first two give."""

    @nn.compact
    def __call__(self, x):
        class Body(nn.Module):
            @nn.compact
            def __call__(self, x, step):
                even, odd = (nn.BatchNorm(use_running_average=True, name=name) for name in ("even", "odd"))
                if self.is_initializing():
                    return odd(even(x)), x
                x = nn.cond(step % 2 == 0, lambda m, x: x + even(x) ** 2, lambda m, x: 2 * odd(x), self, x)
                return x, x

        axes = {"params": 0, "batch_stats": 0}
        layers = nn.scan(Body, variable_axes=axes, split_rngs={"params": True}, length=3, reverse=True)
        _, steps = layers(name="layers")(x, jnp.arange(3))
        return nn.BatchNorm(use_running_average=True, name="after")(steps[2] + 3 * steps[1])


def test_a_cond_on_the_step_of_a_scan_is_decided():
    model = ScannedCond()
    variables = filled(model, X)
    found = exact(X, model, variables, batch_size=13, keep_unseen=True)
    x, steps = X.astype(np.float64), {}
    for step, name, other in [(2, "even", "odd"), (1, "odd", "even"), (0, "even", "odd")]:
        stats = jax.tree.map(lambda a, step=step: a[step], found["layers"])
        mean, var = x.mean(0), x.var(0)
        assert_same_statistics(stats[name], {"mean": mean, "var": var}, EXACT)
        assert np.all(stats[other]["mean"] == 7)
        normalized = (x - mean) / np.sqrt(var + 1e-5)
        x = steps[step] = x + normalized**2 if name == "even" else 2 * normalized
    x = steps[2] + 3 * steps[1]
    assert_same_statistics(found["after"], {"mean": x.mean(0), "var": x.var(0)}, EXACT)


def test_more_calls_than_are_unrolled():
    x = np.ones((2, 6), np.float32)
    variables = filled(Loop(2), x)
    with pytest.raises(ValueError, match=r"at most 512 calls: BatchNorm 'layers/block/norm'.*513 times.*precise"):
        exact([x], Loop(513), variables)


def scaled(how, c):
    """`x + c x²` with `c` in some place of its program."""
    constant = jnp.full((1, 3), c)
    custom = jax.custom_jvp(lambda y: y * constant)
    custom.defjvp(lambda primals, tangents: (custom(primals[0]), custom(tangents[0])))
    return {
        "captured": jax.jit(lambda x: x + constant * x**2),
        "literal": lambda x: x + c * x**2,
        "custom rule": lambda x: x + custom(x**2),
    }[how]


@pytest.mark.parametrize("how", ["captured", "literal", "custom rule"])
def test_blocks_that_differ_in_a_constant_are_told_apart(how):
    """Equal ones share what is compiled (tests/tracing/test_jaxpr.py tells what counts as equal)."""
    blocks = [scaled(how, c) for c in (2.0, 3.0)]

    class Blocks(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(3):
                x = nn.BatchNorm(use_running_average=True, use_scale=False, use_bias=False, name=f"norm_{i}")(x)
                x = blocks[i](x) if i < 2 else x
            return x

    model = Blocks()
    found = exact(X[:14], model, filled(model, X), batch_size=7)
    x = X[:14].astype(np.float64)
    for i, c in enumerate((2, 3, 0)):
        assert_same_statistics(found[f"norm_{i}"], {"mean": x.mean(0), "var": x.var(0)}, EXACT)
        x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        x = x + c * x**2


def test_layers_that_reduce_other_axes_are_told_apart():
    class Axes(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i, axis in enumerate((1, 1, 1, 2, 1)):
                x = nn.BatchNorm(use_running_average=True, axis=axis, name=f"norm_{i}")(x) * 3 + 1
            return x

    model, x = Axes(), models.X[:, :, :3]
    found = exact(x, model, model.init(jax.random.key(0), x), batch_size=10)
    x = x.astype(np.float64)
    for i, kept in enumerate((1, 1, 1, 2, 1)):
        axes = tuple(axis for axis in range(3) if axis != kept)
        assert_same_statistics(found[f"norm_{i}"], {"mean": x.mean(axes), "var": x.var(axes)}, EXACT)
        x = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5) * 3 + 1


class LateSkip(nn.Module):
    """Equal blocks, and one value of the first that the last needs."""

    blocks: int = 6

    @nn.compact
    def __call__(self, x):
        first = None
        for i in range(self.blocks):
            x = nn.Dense(3, name=f"dense_{i}")(x)
            first = x if first is None else first
            x = nn.relu(nn.BatchNorm(use_running_average=True, name=f"norm_{i}")(x))
        return nn.BatchNorm(use_running_average=True, name="last")(x + first)


def compiled(caplog):
    names = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling")]
    return [name.removeprefix("Compiling ").split(" with")[0] for name in names]


@pytest.mark.usefixtures("cpu")
def test_equal_blocks_are_compiled_once_and_kept(caplog):
    model = LateSkip()
    variables = model.init(jax.random.key(0), X)
    changed = jax.tree.map(lambda a: a + 0.5, variables)
    with jax.log_compiles():
        exact([X[:31], X[31:62]], model, variables)
        # The first block, the second, which must not overwrite what the last layer needs, all others, the last layer.
        assert len([name for name in compiled(caplog) if "_measured" in name]) == 4
        caplog.clear()
        found = exact([2 * X[:31], X[31:62], X[:31]], LateSkip(), changed)
        assert compiled(caplog) == []
    assert_same_statistics(found, precise([np.concatenate([2 * X[:31], X[:62]])], model, changed), EXACT)


def test_a_limit_of_memory_compiles_no_block_twice(caplog):
    model = LateSkip()
    variables = model.init(jax.random.key(0), X)
    with jax.log_compiles():
        exact([X[:29], X[29:58]], model, variables, memory_limit=1)
    names = compiled(caplog)
    assert len([name for name in names if "_measured" in name]) <= 4
    assert 2 <= len([name for name in names if "advanced" in name]) <= 3


LIMITS = {1: [False, False, True], N * 4 * 4: [True, False, True], None: [True, True, True]}


@pytest.mark.parametrize("limit", LIMITS)
def test_results_do_not_depend_on_the_memory_limit(limit):
    """Four values of a sample live after the first layer, eight after the second."""
    planned = flaxbn.plan(NET, VARIABLES, THIRTEENS, memory_limit=limit)
    assert [call.kept for call in planned.calls] == LIMITS[limit]
    assert_same_statistics(exact(memory_limit=limit), WHOLE, EXACT)


@pytest.mark.parametrize("limit", LIMITS)
def test_users_arrays_are_left_alone(limit):
    """What later layers need no more is overwritten, but never what was given."""
    batches = [jnp.array(batch) for batch in THIRTEENS]
    before = jax.tree.map(np.array, (batches, VARIABLES))
    exact(batches, memory_limit=limit)
    exact(jnp.array(X), batch_size=13, memory_limit=limit)
    chex.assert_trees_all_equal((batches, VARIABLES), before)


def test_data_of_the_shape_of_what_is_made_is_left_alone():
    """The input itself is what lives on, and everything that is made could take its place."""

    class Skip(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.BatchNorm(use_running_average=True, name="first")(x)
            y = nn.BatchNorm(use_running_average=True, name="second")(jnp.tanh(y) + x)
            return nn.BatchNorm(use_running_average=True, name="third")(jnp.sin(y) * y)

    model = Skip()
    variables = model.init(jax.random.key(0), X)
    given = jnp.array(X[:7])
    found = exact([given, given, given], model, variables)
    np.testing.assert_array_equal(given, X[:7])
    assert_same_statistics(found, precise([X[:7]], model, variables), EXACT)


class Wide(nn.Module):
    """Many positions and two channels: all memory goes into the values that live."""

    @nn.compact
    def __call__(self, x):
        skip = 0 * x
        for i in range(4):
            x = jnp.tanh(nn.BatchNorm(use_running_average=True, name=f"norm_{i}")(x + skip))
            skip = x if i == 1 else skip
        return nn.BatchNorm(use_running_average=True, name="last")(x)


def peak_bytes(run):
    """The most bytes that new arrays hold, looked at whenever a function of the exact pass has returned."""
    ids, peak = set(map(id, held := jax.live_arrays())), 0

    def sample(frame, event, _):
        nonlocal peak
        if event == "return" and "exact" in frame.f_code.co_filename:
            peak = max(peak, sum(a.nbytes for a in jax.live_arrays() if id(a) not in ids))

    sys.setprofile(sample)
    try:
        run()
    finally:
        sys.setprofile(None)
    del held
    return peak


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("share", [1, 0.5, 0])
def test_live_arrays_stay_within_the_plan(share):
    """`share` of what one pass needs may be kept."""
    model, x = Wide(), np.random.default_rng(7).normal(size=(64, 512, 2)).astype(np.float32)
    variables = filled(model, x)
    full = flaxbn.plan(model, variables, x, batch_size=4)
    limit = None if share == 1 else max(int(share * full.largest_bytes), 1)
    planned = flaxbn.plan(model, variables, x, batch_size=4, memory_limit=limit)
    assert planned.peak_bytes == share * full.largest_bytes
    peak = peak_bytes(lambda: exact(x, model, variables, batch_size=4, memory_limit=limit))
    # On top come the batch under way before and after a layer, its data, and the moments of up to 256 batches.
    moments = 5 * 3 * 256 * 2 * 4
    assert planned.peak_bytes < peak <= 1.3 * planned.peak_bytes + 2 * full.largest_bytes / 16 + x[:4].nbytes + moments


def test_the_moments_of_parts_do_not_merge_but_for_the_first_layer():
    """A deep layer's input depends on the statistics of the layers above, which are those of all the data."""
    parts = [THIRTEENS[:2], THIRTEENS[2:]]
    moments = [flaxbn.population_moments(NET, VARIABLES, part, method="exact") for part in parts]
    merged_parts = flaxbn.merge(*moments)
    np.testing.assert_array_equal(merged_parts["BatchNorm_2"].count, N)
    found = flaxbn.to_batch_stats(merged_parts, VARIABLES["batch_stats"])
    assert_same_statistics(found["BatchNorm_0"], WHOLE["BatchNorm_0"], EXACT)
    for name in ("BatchNorm_1", "BatchNorm_2"):
        with pytest.raises(AssertionError):
            assert_same_statistics(found[name], WHOLE[name], 1e-2)


def test_nothing_else_changes():
    stats = jax.tree.map(lambda a: a.astype(jnp.bfloat16), VARIABLES["batch_stats"])
    stats["other"] = {"mean": jnp.ones(3), "sigma": jnp.ones(())}
    variables = {**VARIABLES, "batch_stats": stats}
    found = exact(variables=variables)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, stats)
    chex.assert_trees_all_equal(found["other"], stats["other"])


class TwoInputs(nn.Module):
    @nn.compact
    def __call__(self, batch):
        x = nn.BatchNorm(use_running_average=True, name="first")(batch["x"])
        return nn.BatchNorm(use_running_average=True, name="second")(x + batch["y"])


@pytest.mark.parametrize("given_as", ["arrays", "stream"])
@pytest.mark.parametrize("key", ["x", "y"])
def test_statistics_that_are_not_finite_are_the_same_error(key, given_as):
    batch = {"x": X[:28].copy(), "y": X[28:56].copy()}
    batch[key][17] = np.nan
    batches, options = batch, {"batch_size": 7}
    if given_as == "stream":
        batches, options = [{k: a[i : i + 7] for k, a in batch.items()} for i in range(0, 28, 7)], {}
    model = TwoInputs()
    variables = initialized(model, batch)
    errors = []
    for estimate in (precise, exact):
        with pytest.raises(ValueError, match="'first'" if key == "x" else "'second'") as caught:
            estimate(batches, model, variables, **options)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    assert f"batch {2 if given_as == 'stream' else 17 % 4} " in errors[1]


def test_more_batches_than_a_chunk():
    """The moments of 256 batches are merged at a time."""
    model, x = MODELS["root"], np.random.default_rng(3).normal(size=(600, 2)).astype(np.float32)
    variables = filled(model, x)
    batches = list(x.reshape(300, 2, 2))
    assert_same_statistics(exact(batches, model, variables), {"mean": x.mean(0), "var": x.var(0)}, EXACT)
    batches[280] = batches[280] * np.nan
    with pytest.raises(ValueError, match=r"not in batch 280 "):
        exact(batches, model, variables)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"needs more than one value per channel.*\(1, 4\)", {"batches": [X[:1]]}),
        (ValueError, r'`memory_limit` is for `method="exact"`.*precise', {"memory_limit": 100, "method": "precise"}),
        (ValueError, r"`memory_limit` must be a positive integer: got 0", {"memory_limit": 0}),
        (ValueError, r"`memory_limit` must be a positive integer: got -1", {"memory_limit": -1}),
        (ValueError, r"`memory_limit` must be a positive integer: got 1.5", {"memory_limit": 1.5}),
        (ValueError, r"`memory_limit` must be a positive integer: got '1G'", {"memory_limit": "1G"}),
        (ValueError, r'`method` must be "precise" or "exact": got \'other\'', {"method": "other"}),
        (ValueError, r"at least one sample: saw none", {"batches": []}),
        (ValueError, r"at least one sample: saw none", {"batches": X[:0], "batch_size": 2}),
        (ValueError, r"`num_samples=300` samples: saw 65", {"num_samples": 300}),
        (ValueError, r"`num_samples=300` samples: saw 65", {"num_samples": 300, "batches": X, "batch_size": 2}),
        (TypeError, r"iterable of batches.*ndarray.*pass `batch_size`", {"batches": X}),
        (ValueError, r"must run a batch-norm layer.*ran none", {"call": lambda m, x: x}),
        (ValueError, r"one weight per sample, shape \(13,\): got \(\)", {"sample_weight": jnp.sum}),
    ],
)
def test_errors(error, message, arguments):
    options = {"model": NET, "variables": VARIABLES, "batches": THIRTEENS, "method": "exact"} | arguments
    with pytest.raises(error, match=f"(?s){message}"):
        flaxbn.estimate_population_stats(**options)


class Uneven(nn.Module):
    """Pairs take one layer less."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, name="first")(x)
        return x if len(x) == 2 else nn.BatchNorm(use_running_average=True, name="second")(x)


def test_batches_that_call_other_layers_are_an_error():
    message = (
        r"same batch-norm layers in the same order.*'first', BatchNorm 'second',.*another shape.*BatchNorm 'first'"
    )
    with pytest.raises(ValueError, match=message):
        exact(SEVENS, Uneven(), filled(Uneven(), X))


def test_a_layer_that_is_not_run_is_an_error():
    stats = {**VARIABLES["batch_stats"], "head": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}
    variables = {**VARIABLES, "batch_stats": stats}
    with pytest.raises(ValueError, match=r"'head' saw none.*`only`"):
        exact([X[:13]], variables=variables)
    chex.assert_trees_all_equal(exact([X[:13]], variables=variables, keep_unseen=True)["head"], stats["head"])


def test_a_branch_that_data_decides_is_an_error():
    model = models.Branches()
    with pytest.raises(ValueError, match=r"BatchNorm '(large|small)/norm' must not lie inside a `cond`.*precise"):
        exact(models.BATCHES, model, filled(model, models.X))


def test_a_layer_inside_while_is_an_error():
    model = models.InsideWhile()
    with pytest.raises(ValueError, match=r"must not lie inside `while`.*block/norm"):
        exact(models.BATCHES, model, filled(model, models.X))
