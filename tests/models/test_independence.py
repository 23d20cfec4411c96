"""Models that mix the examples of a batch are found out, and no other model is."""

import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from models import MLP

import flaxbn

X = np.random.default_rng(0).normal(1.0, 2.0, size=(12, 5)).astype(np.float32)


def paired(x):
    """Each example with its neighbour; a last one that has none stays alone."""
    pairs = np.arange(len(x)) ^ 1
    return x + x[np.where(pairs < len(x), pairs, np.arange(len(x)))]


def grouped(x):
    """Less the mean of its group, examples 0 to 2, 3 to 5 and so on, as ghost batches have."""
    group = np.arange(len(x)) // 3
    same = (group[:, None] == group).astype(np.float32)
    return x - (same / same.sum(1, keepdims=True)) @ x


MIXING = {
    "mean over the batch": lambda x: x - x.mean(0, keepdims=True),
    "neighbour": lambda x: x + jnp.roll(x, 1, 0),
    "pairs": paired,
    "groups of three": grouped,
    "batch size": lambda x: x / len(x),
    "attention over the batch": lambda x: x + jax.nn.softmax(x @ x.T) @ x,
    "position in the batch": lambda x: x + jnp.arange(len(x), dtype=x.dtype)[:, None],
    "first example": lambda x: x - x[:1],
    "largest": lambda x: x / jnp.abs(x).max(),
}


class Mixing(nn.Module):
    """Mixes between the first layer and the second."""

    mix: object = staticmethod(lambda x: x)

    @nn.compact
    def __call__(self, x, train=False):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = self.mix(norm(name="first")(x) + 1)
        return norm(name="third")(jnp.tanh(norm(name="second")(x)))


MODEL = Mixing()
VARIABLES = MODEL.init(jax.random.key(0), X)
SECOND = r"(?s)what BatchNorm 'second' receives changes with the other examples.*mixes them.*precise"


def estimate(model, batches, **options):
    return flaxbn.estimate_population_stats(model, VARIABLES, batches, method="exact", **options)


@pytest.mark.parametrize("name", MIXING)
def test_mixing_before_a_layer_is_an_error_of_the_estimate(name):
    with pytest.raises(ValueError, match=SECOND):
        estimate(Mixing(MIXING[name]), X, batch_size=6)


@pytest.mark.parametrize("name", ["mean over the batch", "attention over the batch"])
def test_mixing_before_a_layer_is_an_error_of_the_check(name):
    with pytest.raises(ValueError, match=SECOND):
        flaxbn.assert_batch_independent(Mixing(MIXING[name]), VARIABLES, X)


def test_single_examples_are_joined():
    """No batch can be cut, so two of them are put together."""
    with pytest.raises(ValueError, match=SECOND):
        estimate(Mixing(MIXING["neighbour"]), X, batch_size=1)
    estimate(MODEL, X, batch_size=1)


def test_the_first_batch_of_more_than_one_example_is_cut():
    with pytest.raises(ValueError, match=SECOND):
        estimate(Mixing(MIXING["neighbour"]), [X[:1], X[1:2], X[2:8]])


def test_a_single_batch_is_cut():
    with pytest.raises(ValueError, match=SECOND):
        estimate(Mixing(MIXING["neighbour"]), [X])


def test_weights_are_those_of_the_examples():
    batch = {"x": np.where(np.arange(12)[:, None] % 4 == 1, np.nan, X).astype(np.float32)}
    batch["w"] = np.where(np.isnan(batch["x"][:, 0]), 0, np.arange(12)).astype(np.float32)
    options = {"call": lambda m, b: m(b["x"]), "sample_weight": lambda b: b["w"], "batch_size": 6}
    estimate(MODEL, batch, **options)
    with pytest.raises(ValueError, match=SECOND):
        estimate(Mixing(lambda x: x / len(x)), batch, **options)


def test_a_first_batch_of_weight_zero_hides_nothing():
    batch = {"x": X, "w": np.repeat(np.float32([0, 1]), 6)}
    batches = [{k: a[i : i + 6] for k, a in batch.items()} for i in (0, 6)]
    with pytest.raises(ValueError, match=SECOND):
        estimate(Mixing(MIXING["neighbour"]), batches, call=lambda m, b: m(b["x"]), sample_weight=lambda b: b["w"])


def test_sharded_batches_are_checked(devices):
    assert len(devices) == 8
    estimate(MODEL, X, batch_size=12, sharding=flaxbn.data_sharding())
    with pytest.raises(ValueError, match=SECOND):
        estimate(Mixing(MIXING["first example"]), X, batch_size=12, sharding=flaxbn.data_sharding())


def test_parts_that_the_model_cannot_take_say_so():
    """A model that needs an even batch cannot be tried on parts; if it mixes its pairs, that is seen without them."""
    with pytest.raises(TypeError, match="reshape") as caught:
        estimate(Mixing(lambda x: x.reshape(-1, 2, 5).reshape(-1, 5)), X, batch_size=2)
    assert any("raised for parts of [1, 1] samples, which check" in note for note in caught.value.__notes__)
    with pytest.raises(ValueError, match=SECOND):
        estimate(Mixing(lambda x: x.reshape(-1, 2, 5)[:, ::-1].reshape(-1, 5) + x), X, batch_size=2)


def test_a_layer_that_is_not_estimated_is_not_checked():
    """What is behind it is: the first one that is estimated is named."""
    model = Mixing(MIXING["mean over the batch"])
    with pytest.raises(ValueError, match="BatchNorm 'third' receives changes"):
        estimate(model, X, batch_size=6, only=lambda path: path != "second")
    estimate(model, X, batch_size=6, only=lambda path: path == "first")


def test_mixing_behind_the_last_layer_is_no_matter_of_the_estimate():
    def call(module, x):
        return module(x).mean(0)

    estimate(MODEL, X, batch_size=6, call=call)


def test_precise_statistics_take_mixing_models():
    flaxbn.estimate_population_stats(Mixing(MIXING["neighbour"]), VARIABLES, X, batch_size=6)


@pytest.mark.parametrize("name", ["vmap", "several outputs", "cache"])
def test_models_of_all_kinds_are_independent(name):
    model = models.MODELS[name]
    shapes = jax.eval_shape(model.init, jax.random.key(0), models.X)
    variables = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), shapes)
    flaxbn.assert_batch_independent(model, variables, models.X)


HARD = {
    "dead channels": X * np.array([0, 1, 1, 0, 1], np.float32),
    "constant channels": X * np.array([0, 1, 1, 0, 1], np.float32) + np.array([3e4, 0, 0, 0.1, 0], np.float32),
    "a large mean": X + np.float32(2e3),
    "a small scale": X * np.float32(1e-15),
    "a large scale": X * np.float32(1e15),
    "equal examples": np.repeat(X[:1], 12, 0),
    "half precision": X.astype(jnp.bfloat16),
    "a large mean in half precision": (X + np.float32(2e3)).astype(jnp.bfloat16),
    "integers": np.round(X).astype(np.int32),
}


@pytest.mark.parametrize("name", HARD)
def test_hard_data_does_not_trip_the_estimate(name):
    estimate(MODEL, HARD[name], batch_size=6)


def test_two_examples_are_enough_for_the_check():
    flaxbn.assert_batch_independent(MODEL, VARIABLES, X[:2])


@pytest.mark.parametrize("name", ["constant channels", "a large mean in half precision", "integers"])
def test_hard_data_does_not_trip_the_check(name):
    flaxbn.assert_batch_independent(MODEL, VARIABLES, HARD[name])


def test_rounding_of_a_deep_network_in_half_precision_does_not_trip_the_check():
    model, x = (
        MLP((64,) * 3, dtype=jnp.bfloat16, outputs=3),
        np.random.default_rng(2).normal(size=(31, 64)).astype(np.float32),
    )
    variables = jax.jit(model.init)(jax.random.key(0), x)
    flaxbn.estimate_population_stats(model, variables, [x], method="exact")


def outputs(mixes):
    """A call whose second output is mixed behind the last layer."""
    return lambda module, x: {"hidden": module(x), "mixed": mixes(x + module(x))}


@pytest.mark.parametrize("name", ["batch size", "first example"])
def test_mixing_behind_the_last_layer_is_an_error_of_the_check(name):
    with pytest.raises(ValueError, match=r"output 1 of `call`, of shape \(12, 5\), changes with the other examples"):
        flaxbn.assert_batch_independent(MODEL, VARIABLES, X, call=outputs(MIXING[name]))


def test_a_permutation_of_examples_is_an_error_of_the_check():
    """It leaves all statistics as they are."""
    with pytest.raises(ValueError, match="output 0 of `call`"):
        flaxbn.assert_batch_independent(Mixing(lambda x: x[::-1]), VARIABLES, X)


def test_training_mode_is_an_error_of_the_check():
    def call(module, x):
        return module(x, train=True)

    with pytest.raises(ValueError, match=r"output 0 of `call`.*training mode.*use_running_average=True"):
        flaxbn.assert_batch_independent(MODEL, VARIABLES, X, call=call)


class LayerNormed(nn.Module):
    """No batch-norm layer."""

    mix: object = staticmethod(lambda x: x)

    @nn.compact
    def __call__(self, x):
        return nn.LayerNorm()(self.mix(nn.Dense(5)(x)))


def test_a_model_without_layers_is_checked_by_its_outputs():
    variables = LayerNormed().init(jax.random.key(0), X)
    flaxbn.assert_batch_independent(LayerNormed(), variables, X)
    with pytest.raises(ValueError, match="output 0 of `call`"):
        flaxbn.assert_batch_independent(LayerNormed(MIXING["neighbour"]), variables, X)


def test_outputs_that_are_not_of_examples_are_let_through():
    def call(module, x):
        y = module(x)
        return y, y.sum(), jnp.ones((7, 2)), y.argmax(-1), "name", None

    flaxbn.assert_batch_independent(MODEL, VARIABLES, X, call=call)


def test_whole_numbers_must_be_the_same():
    def call(module, x):
        return jnp.argsort(module(x)[:, 0])

    with pytest.raises(ValueError, match=r"output 0 of `call`, of shape \(12,\)"):
        flaxbn.assert_batch_independent(MODEL, VARIABLES, X, call=call)


def test_outputs_that_are_not_finite_are_compared():
    """Infinite values, as masks of logits are, neither differ from themselves nor hide what else differs."""

    def masked(y):
        return y.at[:, 0].set(-jnp.inf).at[:, 1].set(jnp.nan)

    flaxbn.assert_batch_independent(MODEL, VARIABLES, X, call=lambda m, x: masked(m(x)))
    with pytest.raises(ValueError, match="output 0 of `call`"):
        flaxbn.assert_batch_independent(MODEL, VARIABLES, X, call=lambda m, x: masked(m(x) / len(x)))


def test_infinite_outputs_do_not_hide_others():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(ValueError, match="output 0 of `call`"):
            flaxbn.assert_batch_independent(
                MODEL, VARIABLES, X, call=lambda m, x: (m(x) / len(x)).at[:, 0].set(-jnp.inf)
            )


def test_variables_are_left_alone():
    def call(module, x):
        return module(x, train=True)[:0]

    before = jax.tree.map(np.array, VARIABLES)
    flaxbn.assert_batch_independent(MODEL, VARIABLES, X, call=call)
    jax.tree.map(np.testing.assert_array_equal, VARIABLES, before)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"at least two examples.*got one", {"batch": X[:1]}),
        (ValueError, r"common leading sample axis: got \(12, 5\), \(11, 5\)", {"batch": (X, X[1:])}),
        (TypeError, r"must be a flax.linen.Module: got function", {"model": lambda x: x}),
    ],
)
def test_errors(error, message, arguments):
    with pytest.raises(error, match=message):
        flaxbn.assert_batch_independent(**{"model": MODEL, "variables": VARIABLES, "batch": X, **arguments})


def test_rounding_in_batches_of_two_is_no_mixing():
    x = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    model = MLP((512,) * 4)  # some channel of two examples has next to no variance
    variables = jax.jit(model.init)(jax.random.key(0), x[:2])
    flaxbn.estimate_population_stats(model, variables, x, batch_size=2, method="exact")


class Tokens(nn.Module):
    """A layer whose input is the same for all batches."""

    @nn.compact
    def __call__(self, x):
        tokens = self.param("tokens", nn.initializers.normal(), (7, 4))
        return x + nn.BatchNorm(use_running_average=True)(tokens).sum()


def test_a_layer_that_no_data_reaches_is_no_mixing():
    x = np.ones((6, 4), np.float32)
    variables = Tokens().init(jax.random.key(0), x)
    tokens = np.asarray(variables["params"]["tokens"], np.float64)
    found = flaxbn.estimate_population_stats(Tokens(), variables, x, batch_size=3, method="exact")
    np.testing.assert_allclose(found["BatchNorm_0"]["var"], tokens.var(0), rtol=1e-5)
    flaxbn.assert_batch_independent(Tokens(), variables, x)


def test_outputs_that_compare_examples_are_mixed():
    x = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    model = nn.BatchNorm(use_running_average=True)
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"output 0 of `call`, of shape \(7, 7\), changes"):
        flaxbn.assert_batch_independent(model, variables, x, call=lambda m, x: m(x) @ m(x).T)


def test_single_examples_of_different_sizes_are_not_joined():
    batches = [np.ones((1, size, 3), np.float32) * size for size in (4, 5, 6)]
    model = nn.BatchNorm(use_running_average=True)
    variables = model.init(jax.random.key(0), batches[0])
    found = flaxbn.estimate_population_stats(model, variables, batches, method="exact")
    np.testing.assert_allclose(found["mean"], (16 + 25 + 36) / 15, rtol=1e-6)


def test_products_are_computed_at_the_highest_precision():
    """Of the whole batch and of its parts: in TF32 rounding would look like mixing."""
    model, x = MLP(), np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    variables, precisions = jax.jit(model.init)(jax.random.key(0), x), []

    def call(module, x):
        (product,) = [eqn for eqn in jax.make_jaxpr(lambda x: x @ x.mT)(x).eqns if eqn.primitive.name == "dot_general"]
        precisions.append(product.params["precision"])
        return module(x)

    flaxbn.assert_batch_independent(model, variables, x, call=call)
    highest = jax.lax.Precision.HIGHEST
    assert len(precisions) >= 3
    assert set(precisions) == {(highest, highest)}
    assert jax.config.jax_default_matmul_precision is None
