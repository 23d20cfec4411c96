"""Population statistics: the numbers, the ways to give data, and the errors."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ConvNet, Flattened, MaskedLayer, Noisy, OneLayer, train
from oracle import assert_same_statistics, by_training_mode, merged, one_oracle

import flaxbn

N, CLASSES = 203, 4
LABELS = np.sort(np.random.default_rng(1).integers(0, CLASSES, N))
X = (np.random.default_rng(0).normal(size=(N, 5, 5, 2)) + LABELS[:, None, None, None]).astype(np.float32)


NET = ConvNet()
VARIABLES = jax.jit(NET.init)(jax.random.key(0), X[:2])


ONE = OneLayer(flaxbn.BatchNorm)
ONE_VARIABLES = ONE.init(jax.random.key(0), X[:2])
ROUNDING = 1e-6  # eight roundings of float32, whatever hypothesis draws; a lost sample of 128 changes more


def convolved(x, kernel, bias, padding):
    """A 3 x 3 convolution in float64 by its definition."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    return np.einsum("bhwcij,ijco->bhwo", windows, kernel) + bias


def precise_oracle(batches):
    """NET in float64 with batch statistics, all batches merged by hand."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), VARIABLES["params"])
    statistics = {f"BatchNorm_{i}": [] for i in range(4)}
    for batch in batches:
        x = batch.astype(np.float64)
        for i, found in enumerate(statistics.values()):
            conv, norm = params[f"Conv_{i}"], params[f"BatchNorm_{i}"]
            x = convolved(x, conv["kernel"], conv["bias"], padding=0 if x.shape[1] > 3 else 1)
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
            found.append((x.size / 4, mean, var))
            x = np.maximum((x - mean) / np.sqrt(var + 1e-5) * norm["scale"] + norm["bias"], 0)
    return {k: dict(zip(("mean", "var"), merged(*zip(*v)))) for k, v in statistics.items()}


def test_arrays_match_the_oracle():
    count = -(-N // 32)
    expected = precise_oracle([X[k::count] for k in range(count)])
    found = flaxbn.estimate_population_stats(NET, VARIABLES, X, batch_size=32)
    assert_same_statistics(found, expected)
    # The oracle tells batch sizes apart, so it would tell another split apart, too.
    with pytest.raises(AssertionError):
        assert_same_statistics(found, precise_oracle([X[i : i + 32] for i in range(0, N, 32)]))


def test_streams_match_the_oracle_with_a_smaller_last_batch():
    batches = [X[i : i + 40] for i in range(0, N, 40)]
    assert len(batches[-1]) == 3
    found = flaxbn.estimate_population_stats(NET, VARIABLES, iter(batches))
    assert_same_statistics(found, precise_oracle(batches))
    assert_same_statistics(found, by_training_mode(ConvNet(), VARIABLES, batches, _train))


def _train(module, x):
    """Training mode without dropout."""
    with nn.intercept_methods(lambda f, a, k, c: a[0] if isinstance(c.module, nn.Dropout) else f(*a, **k)):
        return module(x, train=True)


@pytest.mark.parametrize("sizes", [[2, 2, 4, 8, 16, 32, 64], [64, 32, 16, 8, 4, 2, 2], [128]])
def test_any_split_gives_a_single_layer_the_same_statistics(sizes):
    batches = np.split(X[:128], np.cumsum(sizes)[:-1])
    found = flaxbn.estimate_population_stats(ONE, ONE_VARIABLES, batches)
    assert_same_statistics(found, one_oracle(X[:128]), tolerance=ROUNDING)


@settings(max_examples=8)
@given(st.integers(1, 40), st.integers(0, 100))
def test_batch_size_and_order_do_not_matter_to_a_single_layer(batch_size, seed):
    x = np.random.default_rng(seed).permutation(X[:41])
    found = flaxbn.estimate_population_stats(ONE, ONE_VARIABLES, x, batch_size=batch_size)
    assert_same_statistics(found, one_oracle(X[:41]), tolerance=ROUNDING)


def test_a_large_mean_over_many_batches():
    x = (np.random.default_rng(2).normal(size=(100_000, 4)) + 1e4).astype(np.float32)
    variables = ONE.init(jax.random.key(0), x[:2])
    found = flaxbn.estimate_population_stats(ONE, variables, x, batch_size=64)
    exact = one_oracle(x)["norm"]
    np.testing.assert_allclose(found["norm"]["var"], exact["var"], rtol=1e-5)
    # float32 holds 1e4 to half of 1/1024; the standard deviation is 1.
    np.testing.assert_allclose(found["norm"]["mean"], exact["mean"], atol=1.01 / 1024)


def test_more_batches_than_a_chunk():
    x = np.random.default_rng(3).normal(size=(1200, 2)).astype(np.float32)
    variables = ONE.init(jax.random.key(0), x)
    expected = one_oracle(x)
    assert_same_statistics(flaxbn.estimate_population_stats(ONE, variables, x, batch_size=2), expected, 5e-7)
    stream = (x[i : i + 2] for i in range(0, 1200, 2))
    assert_same_statistics(flaxbn.estimate_population_stats(ONE, variables, stream), expected, 5e-7)


def test_the_moments_of_parts_merge():
    parts = [flaxbn.population_moments(NET, VARIABLES, [X[i : i + 50]]) for i in range(0, 200, 50)]
    merged_parts = flaxbn.merge(*parts)
    found = flaxbn.to_batch_stats(merged_parts, VARIABLES["batch_stats"])
    assert_same_statistics(found, precise_oracle([X[i : i + 50] for i in range(0, 200, 50)]))
    np.testing.assert_array_equal(merged_parts["BatchNorm_0"].count, 200 * 9)


def test_sorted_data_is_strided():
    found = flaxbn.estimate_population_stats(NET, VARIABLES, X, batch_size=32)
    whole = precise_oracle([X])
    ratios = [np.asarray(found[k]["var"] / whole[k]["var"]) for k in whole]
    assert max(np.abs(r - 1).max() for r in ratios) < 0.05
    in_order = precise_oracle([X[i : i + 32] for i in range(0, N, 32)])
    assert max(np.abs(in_order[k]["var"] / whole[k]["var"] - 1).max() for k in whole) > 0.1


@pytest.mark.parametrize("given_as", ["arrays", "stream"])
def test_weights_repeat_samples_and_drop_padding(given_as):
    weights = np.random.default_rng(4).integers(0, 4, N).astype(np.float32)
    repeated = precise_oracle([np.repeat(X, weights.astype(int), axis=0)])
    x = np.where(weights[:, None, None, None] > 0, X, np.nan)
    batches = {"x": x, "w": weights}
    options = {"batch_size": N}
    if given_as == "stream":
        batches, options = [batches], {}
    found = flaxbn.estimate_population_stats(
        NET, VARIABLES, batches, call=lambda m, b: m(b["x"]), sample_weight=lambda b: b["w"], **options
    )
    assert_same_statistics(found, repeated)


def test_weights_multiply_the_mask_of_a_layer():
    rng = np.random.default_rng(5)
    mask, weights = rng.random((N, 5, 5)), rng.random(N)
    batch = {"x": X, "mask": mask.astype(np.float32), "w": weights.astype(np.float32)}
    model = MaskedLayer()
    variables = model.init(jax.random.key(0), batch)
    found = flaxbn.estimate_population_stats(
        model, variables, batch, batch_size=17, sample_weight=lambda b: b["w"], call=lambda m, b: m(b)
    )
    weight = (mask * weights[:, None, None]).reshape(-1)
    values = X.reshape(-1, 2).astype(np.float64)
    mean = np.average(values, axis=0, weights=weight)
    expected = {"mean": mean, "var": np.average((values - mean) ** 2, axis=0, weights=weight)}
    assert_same_statistics(found["norm"], expected)


def test_only_leaves_layers_as_they_are_and_uses_them():
    frozen = jax.tree.map(lambda a: a + 0.5, VARIABLES["batch_stats"])
    variables = {**VARIABLES, "batch_stats": frozen}
    found = flaxbn.estimate_population_stats(NET, variables, X, batch_size=N, only=lambda path: path != "BatchNorm_0")
    chex.assert_trees_all_equal(found["BatchNorm_0"], frozen["BatchNorm_0"])
    hidden = NET.apply(variables, X, capture_intermediates=True)[1]["intermediates"]["Conv_1"]["__call__"][0]
    expected = one_oracle(np.asarray(hidden))["norm"]
    assert_same_statistics(found["BatchNorm_1"], expected)
    assert set(flaxbn.population_moments(NET, variables, X, batch_size=N, only=lambda p: p == "BatchNorm_2")) == {
        "BatchNorm_2"
    }


def test_nothing_else_changes():
    model = ConvNet(flaxbn.BatchRenorm)
    variables = model.init(jax.random.key(0), X[:2])
    stats = jax.tree.map(lambda a: a.astype(jnp.bfloat16), variables["batch_stats"])
    stats["BatchRenorm_0"]["steps"] = jnp.int32(3)
    stats["other"] = {"mean": jnp.ones(3), "sigma": jnp.ones(())}
    variables = {**variables, "batch_stats": stats}
    before = jax.tree.map(np.array, variables)
    found = flaxbn.estimate_population_stats(model, variables, X, batch_size=32)
    chex.assert_trees_all_equal(variables, before)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, stats)
    chex.assert_trees_all_equal(found["other"], stats["other"])
    assert found["BatchRenorm_0"]["steps"] == 3


def test_dropout_is_off_even_in_training_mode():
    def training(module, x):
        return module(x, train=True)

    chex.assert_trees_all_equal(
        flaxbn.estimate_population_stats(NET, VARIABLES, X, batch_size=32, call=training),
        flaxbn.estimate_population_stats(NET, VARIABLES, X, batch_size=32),
    )


def test_each_batch_gets_random_keys_of_its_own():
    model, rngs = Noisy(), {"noise": jax.random.key(3)}
    variables = model.init({"params": jax.random.key(0), **rngs}, X)
    moments = flaxbn.population_moments(model, variables, X, batch_size=32, rngs=rngs)
    again = flaxbn.population_moments(model, variables, X, batch_size=32, rngs=rngs)
    assert np.all(moments["norm"].var > 0.1)
    chex.assert_trees_all_equal(moments, again)


TRACES = []


def counted(module, x):
    TRACES.append(x.shape)
    return module(x)


def test_compiled_passes_are_reused():
    TRACES.clear()
    for scale in (1.0, 2.0):
        variables = jax.tree.map(lambda a, s=scale: a * s, VARIABLES)
        flaxbn.estimate_population_stats(ConvNet(), variables, X[:96], batch_size=32, call=counted)
        flaxbn.estimate_population_stats(ConvNet(), variables, [X[:32], X[32:64]], call=counted)
    assert TRACES == [(32, 5, 5, 2)]


def test_models_that_cannot_be_hashed():
    class Offset(nn.Module):
        offset: object

        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True, name="norm")(x + self.offset.reshape(1, 1, 1, 2))

    for offset in (np.ones(2, np.float32), 2 * np.ones(2, np.float32)):
        model = Offset(offset)
        variables = model.init(jax.random.key(0), X)
        found = flaxbn.estimate_population_stats(model, variables, X, batch_size=N)
        assert_same_statistics(found, one_oracle(X + offset), 5e-7)


@pytest.mark.parametrize("given_as", ["arrays", "stream"])
def test_sharded_batches_give_the_same_statistics(devices, given_as):
    """203 samples in batches of 26 or 25 divide by 8 never: all are padded."""
    sharding = flaxbn.data_sharding()
    assert len(sharding.device_set) == len(devices)
    count = -(-N // 26)
    batches, options = X, {"batch_size": 26}
    if given_as == "stream":
        batches, options = [X[k::count] for k in range(count)], {}
    found = flaxbn.estimate_population_stats(NET, VARIABLES, batches, sharding=sharding, **options)
    assert_same_statistics(found, precise_oracle([X[k::count] for k in range(count)]))


def test_half_precision_data_is_measured_in_float32():
    x = (X + 30).astype(jnp.bfloat16)
    found = flaxbn.estimate_population_stats(ONE, ONE_VARIABLES, x, batch_size=32)
    # Batches, their merge and the result each round a mean of 30 to 1e-6, which is 6e-7 standard deviations.
    assert_same_statistics(found, one_oracle(np.asarray(x, np.float32)), 3e-6)


def test_complex_input():
    x = X + 1j * X[::-1]
    variables = ONE.init(jax.random.key(0), x)
    found = flaxbn.estimate_population_stats(ONE, variables, x, batch_size=32)["norm"]
    values = x.reshape(-1, 2).astype(np.complex128)
    np.testing.assert_allclose(found["mean"], values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found["var"], values.var(0), rtol=1e-6)
    with pytest.raises(TypeError, match=r"mean of 'norm' must be complex.*float32.*complex64"):
        flaxbn.estimate_population_stats(ONE, ONE_VARIABLES, x, batch_size=32)


def test_what_is_stored_beside_statistics_keeps_its_type():
    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x):
            offset = self.variable("batch_stats", "offset", lambda: jnp.array(1, jnp.int32)).value
            key = self.variable("batch_stats", "key", lambda: jax.random.key(3)).value
            x = x + jnp.arange(4.0)[offset] + jax.random.uniform(key)
            return nn.BatchNorm(use_running_average=True, name="norm")(x)

    model = Counting()
    variables = model.init(jax.random.key(0), X)
    found = flaxbn.estimate_population_stats(model, variables, X, batch_size=32)
    shifted = X + np.float32(1 + jax.random.uniform(jax.random.key(3)))
    assert_same_statistics(found["norm"], one_oracle(shifted)["norm"])
    assert found["offset"].dtype == jnp.int32


def test_a_method_that_changes_is_traced_again():
    class Trainer:
        shift = 0.0

        def forward(self, module, x):
            return module(x + self.shift)

    trainer = Trainer()
    for shift in (0.0, 5.0):
        trainer.shift = shift
        found = flaxbn.estimate_population_stats(ONE, ONE_VARIABLES, X, batch_size=N, call=trainer.forward)
        assert_same_statistics(found, one_oracle(X + np.float32(shift)))


def test_options_of_jax_are_part_of_what_is_compiled():
    """Moments are float64 on the host; what is computed in float32 shows by its rounding, of about 1e-8."""
    x = X.astype(np.float64)
    first = flaxbn.population_moments(ONE, ONE_VARIABLES, x, batch_size=N)["norm"]
    with jax.enable_x64(True):
        second = flaxbn.population_moments(ONE, ONE_VARIABLES, x, batch_size=N)["norm"]
    errors = [np.max(np.abs(found.var - x.var((0, 1, 2)))) for found in (first, second)]
    assert errors[1] < 1e-13 < 1e-9 < errors[0]


def test_call_may_return_anything():
    found = flaxbn.estimate_population_stats(ONE, ONE_VARIABLES, X, batch_size=N, call=lambda m, x: (m(x), "x", None))
    assert_same_statistics(found, one_oracle(X))


def test_results_lie_where_the_old_ones_did(devices):
    free = flaxbn.estimate_population_stats(ONE, ONE_VARIABLES, X, batch_size=32)
    assert not jax.tree.leaves(free)[0].committed
    held = jax.device_put(ONE_VARIABLES, devices[3])
    found = flaxbn.estimate_population_stats(ONE, held, X, batch_size=32)
    assert jax.tree.leaves(found)[0].devices() == {devices[3]}


def test_statistics_that_overflow_their_storage_are_an_error():
    stats = jax.tree.map(lambda a: a.astype(jnp.float16), ONE_VARIABLES["batch_stats"])
    with pytest.raises(ValueError, match=r"'norm' must be finite.*its var overflows float16"):
        flaxbn.estimate_population_stats(ONE, {**ONE_VARIABLES, "batch_stats": stats}, X * 1000, batch_size=32)


def test_many_positions_are_counted():
    counted = jax.eval_shape(lambda x: flaxbn.measure(x, (0, 1)), jax.ShapeDtypeStruct((2**16, 2**16, 1), jnp.float32))
    assert counted.count.shape == (1,)


def estimate(batches=X, model=ONE, variables=ONE_VARIABLES, **options):
    return flaxbn.estimate_population_stats(model, variables, batches, **options)


@pytest.mark.parametrize("method", ["precise", "exact"])
def test_strict_promotion_of_types(method):
    with jax.numpy_dtype_promotion("strict"):
        found = flaxbn.estimate_population_stats(ONE, ONE_VARIABLES, X[:40], batch_size=20, method=method)
    assert_same_statistics(found, by_training_mode(ONE, ONE_VARIABLES, [X[:40]], train))


def test_names_cannot_be_cut():
    batches = {"x": X[:4], "site": np.array(["a", "b", "a", "b"])}
    with pytest.raises(TypeError, match=r"(?s)numbers where `batch_size`.*got <U1 at batches\['site'\].*iterable"):
        flaxbn.estimate_population_stats(ONE, ONE_VARIABLES, batches, batch_size=2, call=lambda m, b: m(b["x"]))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"iterable of batches.*ndarray.*\(203, 5, 5, 2\).*pass `batch_size`", {}),
        (TypeError, r"iterable of batches.*dict", {"batches": {"x": X}}),
        (TypeError, r"iterable of batches.*tuple", {"batches": (X, LABELS)}),
        (TypeError, r"iterable of batches.*int", {"batches": 3}),
        (TypeError, r"pytree of arrays.*got list", {"batches": [X, X], "batch_size": 2}),
        (
            TypeError,
            r"pytree of arrays.*`batch_size` is given: got list_iterator.*Leave",
            {"batches": iter([X]), "batch_size": 2},
        ),
        (ValueError, r"`batch_size` must be a positive integer: got 0", {"batch_size": 0}),
        (ValueError, r"`num_samples` must be a positive integer: got 1.5", {"batch_size": 2, "num_samples": 1.5}),
        (ValueError, r"at least one sample: saw none", {"batches": []}),
        (ValueError, r"at least one sample: saw none", {"batches": X[:0], "batch_size": 2}),
        (ValueError, r"`num_samples=300` samples: saw 203", {"batch_size": 2, "num_samples": 300}),
        (ValueError, r"`num_samples=300` samples: saw 203", {"batches": [X], "num_samples": 300}),
        (ValueError, r"common leading.*\(203,\), \(202,\)", {"batches": (LABELS, LABELS[1:]), "batch_size": 2}),
        (ValueError, r"axis -1 for an input of rank 0", {"batches": [np.float32(1)]}),
        (ValueError, r'`method` must be "precise" or "exact": got \'other\'', {"batch_size": 2, "method": "other"}),
        (ValueError, r"must run a batch-norm layer.*OneLayer ran none", {"batch_size": 2, "call": lambda m, x: x}),
        (TypeError, r"must be a flax.linen.Module: got function", {"model": lambda x: x, "batch_size": 2}),
        (ValueError, r"must hold the collection 'batch_stats': got \['params'\]", {"variables": {"params": 1}}),
        (ValueError, r"`only` must accept.*none of 'norm'", {"batch_size": 2, "only": lambda path: False}),
        (ValueError, r"one weight per sample, shape \(2,\): got \(\)", {"batch_size": 2, "sample_weight": jnp.sum}),
        (
            ValueError,
            r"batch axis.*BatchNorm 'norm' has shape \(200, 2\).*`only`",
            {"model": Flattened(), "batch_size": 8, "sample_weight": len, "num_samples": 8},
        ),
        (
            ValueError,
            r"'norm' normalizes by batch statistics.*more than one value.*\(1, 2\)",
            {"batches": [X[:2, 0, 0], X[:1, 0, 0]]},
        ),
    ],
)
def test_errors(error, message, arguments):
    with pytest.raises(error, match=f"(?s){message}"):
        estimate(**arguments)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_statistics_that_are_not_finite_name_layer_and_batch(stream, value):
    x = X[:24].copy()
    x[17] = value
    with pytest.raises(ValueError, match=rf"'norm' are not in batch {4 if stream else 5} "):
        estimate([x[i : i + 4] for i in range(0, 24, 4)]) if stream else estimate(x, batch_size=4)


def test_a_layer_that_is_not_run_is_an_error():
    stats = {**ONE_VARIABLES["batch_stats"], "head": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}
    variables = {**ONE_VARIABLES, "batch_stats": stats}
    with pytest.raises(ValueError, match=r"'head' saw none.*`only`"):
        estimate(variables=variables, batch_size=8)
    found = estimate(variables=variables, batch_size=8, only=lambda path: path != "head")
    chex.assert_trees_all_equal(found["head"], stats["head"])


def test_inside_a_transformation_is_an_error():
    with pytest.raises(TypeError, match=r"concrete arrays.*outside of `jax.jit`"):
        jax.jit(lambda v: estimate(variables=v, batch_size=8))(ONE_VARIABLES)


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        ({"other": flaxbn.Moments(*np.ones((3, 2)))}, "at 'other', where `batch_stats` holds nothing"),
        ({"norm": flaxbn.Moments(*np.ones((3, 4)))}, r"shape \(4,\) at 'norm'.*holds a mean of shape \(2,\)"),
        ({"norm": np.ones(2)}, "got ndarray at 'norm'"),
        ({"norm": flaxbn.Moments(*np.zeros((3, 2)))}, "'norm' saw none"),
    ],
)
def test_moments_that_do_not_fit_are_errors(moments, message):
    with pytest.raises(ValueError, match=message):
        flaxbn.to_batch_stats(moments, ONE_VARIABLES["batch_stats"])
