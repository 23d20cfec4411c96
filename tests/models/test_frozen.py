"""Frozen statistics with dropout on, and layers that are chosen: against the model's own code."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nnx_models import Chain
from nnx_models import X as NNX_X

import flaxbn

X = np.random.default_rng(0).normal(2.0, 3.0, size=(12, 5)).astype(np.float32)
KEYS = {"dropout": jax.random.key(1)}


Renorm = partial(flaxbn.BatchRenorm, r_max=1.5, d_max=0.5)  # renormalizes from the first step on


class Backbone(nn.Module):
    """One flag flips batch normalization and dropout together."""

    norm: object = nn.BatchNorm
    frozen: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        for i in range(2):
            norm = self.norm(use_running_average=self.frozen or not train, name=f"norm{i}")
            x = nn.Dropout(0.5, deterministic=not train)(nn.relu(norm(nn.Dense(8)(x))))
        return x


def as_in_training(module, x):
    return module(x, train=True)


def variables_of(norm):
    """Statistics that are neither the initial ones nor those of a batch."""
    variables = jax.jit(Backbone(norm).init)(jax.random.key(0), X)
    stats = jax.tree.map(lambda a: a + 0.5, variables["batch_stats"])
    return {**variables, "batch_stats": stats}


@pytest.mark.parametrize("norm", [nn.BatchNorm, flaxbn.BatchNorm, Renorm])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_frozen_statistics_and_dropout_are_the_models_own_code(norm, transform):
    """Exactly: the same equations, so that gradients are the same, too."""
    variables = variables_of(norm)

    def outcome(run):
        def loss(params, x):
            y = run({**variables, "params": params}, x)
            return jnp.sum(y**3), y

        return transform(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(variables["params"], X)

    found = outcome(lambda v, x: flaxbn.apply(Backbone(norm), v, x, call=as_in_training, rngs=KEYS))
    expected = outcome(lambda v, x: Backbone(norm, frozen=True).apply(v, x, train=True, rngs=KEYS))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert 0 < np.count_nonzero(found[0][1]) < found[0][1].size / 2  # relu takes half of it, and dropout half of that


def test_dropout_needs_its_own_keys_and_a_call_that_turns_it_on():
    variables = variables_of(nn.BatchNorm)
    evaluated = Backbone().apply(variables, X)
    for options in ({"call": as_in_training}, {"rngs": KEYS}):
        np.testing.assert_allclose(flaxbn.apply(Backbone(), variables, X, **options), evaluated, rtol=1e-6)


def test_dropout_with_the_statistics_of_the_batch_is_training():
    variables = variables_of(nn.BatchNorm)
    found = flaxbn.apply(Backbone(), variables, X, statistics="batch", call=as_in_training, rngs=KEYS)
    expected, _ = Backbone().apply(variables, X, train=True, mutable=["batch_stats"], rngs=KEYS)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # variances by another formula


def test_other_keys_are_handed_to_the_model():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + jax.random.normal(self.make_rng("noise"), x.shape)
            return nn.BatchNorm(use_running_average=True)(x)

    keys = {"noise": jax.random.key(3)}
    variables = Noisy().init({"params": jax.random.key(0), **keys}, X)
    np.testing.assert_array_equal(
        flaxbn.apply(Noisy(), variables, X, rngs=keys), Noisy().apply(variables, X, rngs=keys)
    )


def test_a_name_that_nothing_draws_from():
    """Dropout would be off without a word; a model that draws from the name, or has no other dropout, may have it."""
    variables = variables_of(nn.BatchNorm)
    run = partial(flaxbn.apply, Backbone(), variables, X, call=as_in_training)
    with pytest.raises(ValueError, match=r"nothing draws from \['droput'\], and dropout .* from \['dropout'\] are off"):
        run(rngs={"droput": jax.random.key(1)})
    with_more = run(rngs={**KEYS, "params": jax.random.key(2)})
    np.testing.assert_array_equal(with_more, run(rngs=KEYS))
    norm = nn.BatchNorm(use_running_average=True)
    flaxbn.apply(norm, norm.init(jax.random.key(0), X), X, rngs={"noise": jax.random.key(1)})


def test_estimates_leave_dropout_off_whatever_keys_they_have():
    variables = variables_of(nn.BatchNorm)
    estimate = partial(flaxbn.estimate_population_stats, Backbone(), variables, X, batch_size=12)
    jax.tree.map(np.testing.assert_array_equal, estimate(call=as_in_training, rngs=KEYS), estimate())


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(x)
        attend = nn.MultiHeadDotProductAttention(1, dropout_rate=0.5, deterministic=not train)
        return attend(x[None], x[None])[0]


def test_attention_draws_by_itself():
    """Its dropout is no layer: it runs as `call` says, for which it must be given keys."""
    variables = jax.jit(Attention().init)(jax.random.key(0), X)
    found = flaxbn.apply(Attention(), variables, X, call=as_in_training, rngs=KEYS)
    assert not np.allclose(found, Attention().apply(variables, X))
    for run in (flaxbn.apply, partial(flaxbn.estimate_population_stats, batch_size=12)):
        with pytest.raises(flaxbn.CallError, match=r"InvalidRngError.*\n(.*\n)*.*turn that off in `call`.*`rngs="):
            run(Attention(), variables, X, call=as_in_training)


def test_only_some_layers_take_the_statistics_of_the_batch():
    variables = variables_of(nn.BatchNorm)
    found = flaxbn.apply(Backbone(), variables, X, statistics="batch", only=lambda path: path == "norm1")

    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(2):
                x = nn.relu(nn.BatchNorm(use_running_average=i == 0, name=f"norm{i}")(nn.Dense(8)(x)))
            return x

    expected, _ = Mixed().apply(variables, X, mutable=["batch_stats"])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # variances by another formula


def test_only_that_does_not_fit():
    variables = variables_of(nn.BatchNorm)
    with pytest.raises(ValueError, match=r"`only` must accept at least one .*it accepts none of 'norm0', 'norm1'"):
        flaxbn.apply(Backbone(), variables, X, statistics="batch", only=lambda path: "other" in path)
    with pytest.raises(ValueError, match="`only` names the layers that take the statistics of the batch"):
        flaxbn.apply(Backbone(), variables, X, only=lambda path: True)


def frozen_by_hand(model, key):
    """What an nnx model computes in training mode with frozen statistics, each of its streams with `key` folded in."""
    graphdef, state = nnx.split(model)
    bits = jax.random.bits(key)

    def with_key(leaf):
        folds = isinstance(leaf, nnx.RngKey)
        return leaf.replace(jax.random.fold_in(leaf[...], bits)) if folds else leaf

    state = jax.tree.map(with_key, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    copy = nnx.merge(graphdef, state)
    for _, module in nnx.iter_modules(copy):
        if isinstance(module, nnx.BatchNorm):
            module.use_running_average = True
    return copy(NNX_X)


def test_nnx_frozen_statistics_and_dropout_are_the_models_own_code():
    model = Chain(nnx.Rngs(0))
    model.train()
    nnx.update(model, jax.tree.map(lambda a: a + 0.5, nnx.state(model, nnx.BatchStat)))
    run = jax.jit(lambda state, key: flaxbn.apply(nnx.graphdef(model), state, NNX_X, rngs={"dropout": key}))
    for key in (jax.random.key(1), jax.random.key(2)):
        found = run(nnx.state(model), key)
        np.testing.assert_allclose(found, frozen_by_hand(model, key), atol=1e-5)  # of 6; compiled as a whole
        np.testing.assert_array_equal(
            flaxbn.apply(*nnx.split(model), NNX_X, rngs={"dropout": key}), frozen_by_hand(model, key)
        )
    model.eval()
    np.testing.assert_allclose(flaxbn.apply(*nnx.split(model), NNX_X, rngs=KEYS), model(NNX_X), rtol=1e-6)


def test_nnx_keys_that_no_dropout_layer_draws_from():
    with pytest.raises(ValueError, match=r"dropout layers, \['dropout'\]: got 'noise'.*nnx.reseed"):
        flaxbn.apply(*nnx.split(Chain(nnx.Rngs(0))), NNX_X, rngs={"noise": jax.random.key(0)})


def test_dropout_inside_a_scan():
    """Each step draws its own, as in the model's own code."""

    class Scanned(nn.Module):
        frozen: bool = False

        @nn.compact
        def __call__(self, x, train=False):
            def step(block, x, _):
                return block(x, train), None

            scan = nn.scan(
                step,
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True, "dropout": True},
                length=3,
            )
            return scan(MLPBlock(self.frozen), x, None)[0]

    class MLPBlock(nn.Module):
        frozen: bool

        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=self.frozen or not train)(nn.Dense(5)(x))
            return nn.Dropout(0.5, deterministic=not train)(x)

    variables = jax.jit(Scanned().init)(jax.random.key(0), X)
    found = flaxbn.apply(Scanned(), variables, X, call=as_in_training, rngs=KEYS)
    expected = Scanned(frozen=True).apply(variables, X, train=True, rngs=KEYS)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
