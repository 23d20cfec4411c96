"""Evaluation with chosen statistics, under transformations."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from models import MLP

import flaxbn

X = np.random.default_rng(0).normal(2.0, 3.0, size=(12, 5)).astype(np.float32)


def make(norm=nn.BatchNorm, dropout=0.0):
    return MLP((5, 5), norm, 0.99, nn.tanh, dropout)


NETS = {"stock": make(), "ours": make(flaxbn.BatchNorm)}
VARIABLES = make().init(jax.random.key(0), X)


def in_training(variables, x, model=NETS["stock"]):
    return model.apply(variables, x, train=True, mutable=["batch_stats"])[0]


def with_batch(variables, x, model=NETS["stock"], **options):
    return flaxbn.apply(model, variables, x, statistics="batch", **options)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_batch_statistics_are_those_of_training(name, transform):
    found = transform(lambda v, x: with_batch(v, x, NETS[name]))(VARIABLES, X)
    np.testing.assert_allclose(found, in_training(VARIABLES, X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NETS)
def test_gradients_are_those_of_training(name):
    def loss(apply):
        return jax.grad(lambda params, x: jnp.sum(apply({**VARIABLES, "params": params}, x) ** 3), argnums=(0, 1))

    found = loss(lambda v, x: with_batch(v, x, NETS[name]))(VARIABLES["params"], X)
    expected = loss(in_training)(VARIABLES["params"], X)
    # Gradients of biases ahead of a normalization are 0, up to the rounding of their terms, which are of order 10.
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-4, atol=1e-4), found, expected)


def test_each_lane_of_vmap_is_a_batch():
    lanes = np.stack([X, X[::-1] * 2 + 1])
    found = jax.vmap(lambda x: with_batch(VARIABLES, x))(lanes)
    expected = np.stack([in_training(VARIABLES, x) for x in lanes])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_gradients_pass_remat():
    class Rematerialized(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.remat(MLP, static_argnums=(2,))((5, 5), activation=nn.tanh, name="net")(x, train)

    variables = {k: {"net": v} for k, v in VARIABLES.items()}
    found = jax.grad(lambda x: jnp.sum(with_batch(variables, x, Rematerialized()) ** 3))(X)
    expected = jax.grad(lambda x: jnp.sum(in_training(VARIABLES, x) ** 3))(X)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_running_statistics_are_the_default_and_dropout_is_off():
    found = flaxbn.apply(make(dropout=0.5), VARIABLES, X, call=lambda m, x: m(x, train=True))
    np.testing.assert_allclose(found, NETS["stock"].apply(VARIABLES, X), rtol=1e-6)


def test_nothing_is_updated():
    before = jax.tree.map(np.array, VARIABLES)
    with_batch(VARIABLES, X, call=lambda m, x: m(x, train=True))
    jax.tree.map(np.testing.assert_array_equal, VARIABLES, before)


def test_call_may_return_anything():
    found = with_batch(VARIABLES, {"x": X}, call=lambda m, b: {"y": m(b["x"]), "none": None, "n": (1, b["x"].sum())})
    np.testing.assert_allclose(found["y"], in_training(VARIABLES, X), rtol=1e-5, atol=1e-6)
    assert found["none"] is None
    assert found["n"][0] == 1


def test_a_captured_value_may_be_traced():
    def loss(temperature):
        return jnp.sum(with_batch(VARIABLES, X, call=lambda m, x: m(x) * temperature))

    np.testing.assert_allclose(jax.grad(loss)(3.0), in_training(VARIABLES, X).sum(), rtol=1e-4, atol=1e-4)


def test_half_precision_statistics_are_not_rounded_to_storage():
    stats = jax.tree.map(lambda a: a.astype(jnp.bfloat16), VARIABLES["batch_stats"])
    found = with_batch({**VARIABLES, "batch_stats": stats}, X)
    np.testing.assert_allclose(found, in_training(VARIABLES, X), rtol=1e-5, atol=1e-6)


def test_a_model_with_a_differentiation_rule_around_a_layer_has_no_gradient():
    class Clipped(nn.Module):
        @nn.compact
        def __call__(self, x):
            def forward(module, x):
                return nn.vjp(lambda m, x: m(x), module, x)

            def backward(residual, cotangent):
                _, cotangent = residual(cotangent)
                return jax.tree.map(jnp.zeros_like, residual(cotangent)[0]), jnp.clip(cotangent, -1, 1)

            norm = nn.BatchNorm(use_running_average=True)
            return nn.custom_vjp(lambda m, x: m(x), forward, backward)(norm, x)

    model = Clipped()
    variables = model.init(jax.random.key(0), X)
    found = with_batch(variables, X, model)
    np.testing.assert_allclose(found.mean(0), np.zeros(5), atol=1e-6)
    with pytest.raises(NotImplementedError, match=r"differentiation rule of its own"):
        jax.grad(lambda x: jnp.sum(with_batch(variables, x, model) ** 2))(X)


def test_differentiating_inside_call_is_an_error():
    def call(module, x):
        return jax.grad(lambda x: jnp.sum(module(x)))(x)

    with pytest.raises(NotImplementedError, match=r"BatchNorm_0.*must not differentiate the model"):
        with_batch(VARIABLES, X, call=call)


def test_other_statistics_are_an_error():
    with pytest.raises(ValueError, match='must be "running" or "batch": got \'population\''):
        flaxbn.apply(NETS["stock"], VARIABLES, X, statistics="population")


def test_one_value_per_channel_is_an_error():
    with pytest.raises(ValueError, match=r"BatchNorm_0.*more than one value per channel.*\(1, 5\)"):
        with_batch(VARIABLES, X[:1])


@pytest.mark.parametrize("name", NETS)
def test_layers_that_synchronize_do_so(name):
    model = make(functools.partial(NETS[name].norm, axis_name="data"))
    parts = X.reshape(3, 4, 5)
    found = jax.vmap(lambda x: with_batch(VARIABLES, x, model), axis_name="data")(parts)
    np.testing.assert_allclose(found.reshape(12, 5), in_training(VARIABLES, X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("synchronized", [True, False])
def test_under_shard_map(devices, checked, statistics, synchronized):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices[:2])
    model = make(functools.partial(flaxbn.BatchNorm, axis_name="data" if synchronized else None))

    def evaluate(x):
        return flaxbn.apply(model, VARIABLES, x, statistics=statistics)

    specs = {"in_specs": P("data"), "out_specs": P("data"), "check_vma": checked}
    found = jax.jit(jax.shard_map(evaluate, mesh=mesh, **specs))(X)
    expected = np.concatenate([in_training(VARIABLES, part) for part in (X[:6], X[6:])])
    if synchronized:
        expected = in_training(VARIABLES, X)
    if statistics == "running":
        expected = NETS["stock"].apply(VARIABLES, X)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_another_model_inside_call_keeps_its_statistics():
    teacher_variables = jax.tree.map(lambda a: a + 2, VARIABLES)

    def call(module, x):
        return module(x), NETS["stock"].apply(teacher_variables, x)

    student, teacher = with_batch(VARIABLES, X, call=call)
    np.testing.assert_allclose(student, in_training(VARIABLES, X), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(teacher, NETS["stock"].apply(teacher_variables, X), rtol=1e-5, atol=1e-6)


def test_what_is_no_array_is_passed_on():
    found = with_batch(
        VARIABLES, {"x": X, "scale": True}, call=lambda m, b: {"y": m(b["x"]) if b["scale"] else 0, "n": "x"}
    )
    assert found["n"] == "x"
    np.testing.assert_allclose(found["y"], in_training(VARIABLES, X), rtol=1e-5, atol=1e-6)
