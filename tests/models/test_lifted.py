"""A batch-norm layer beside a lifted method without a layer in it: Flax hands its statistics through all the same."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import train
from oracle import assert_same_statistics, by_training_mode

import flaxbn

X = np.random.default_rng(0).normal(2.0, 3.0, (48, 4)).astype(np.float32)


def dense(module, x):
    return module.dense(x)


def custom_vjp(module, x):
    def forward(module, x):
        return nn.vjp(dense, module, x)

    return nn.custom_vjp(dense, forward_fn=forward, backward_fn=lambda pullback, g: pullback(g))(module, x)


def while_loop(module, x):
    if module.is_initializing():
        return dense(module, x)

    def body(module, carry):
        return carry[0] + 1, dense(module, carry[1])

    return nn.while_loop(lambda module, carry: carry[0] < 1, body, module, (0, x))[1]


def scanned(module, x, **variables):
    def body(module, x, _):
        return dense(module, x), None

    return nn.scan(body, **variables, split_rngs={"params": False}, length=2)(module, x, None)[0]


LIFTED = {
    "jit": nn.jit(dense),
    "remat": nn.remat(dense),
    "remat in jit": nn.jit(lambda module, x: nn.remat(dense)(module, x)),
    "custom_vjp": custom_vjp,
    "cond": lambda module, x: nn.cond(x.sum() > 0, dense, lambda module, x: 2 * dense(module, x), module, x),
    "switch": lambda module, x: nn.switch(jnp.int32(0), [dense, lambda module, x: -dense(module, x)], module, x),
    "while": while_loop,
    "scan, broadcast": lambda module, x: scanned(module, x, variable_broadcast=["params", "batch_stats"]),
    "scan, carried": lambda module, x: scanned(module, x, variable_broadcast="params", variable_carry="batch_stats"),
    "vmap": nn.vmap(dense, variable_axes={"params": None, "batch_stats": None}, split_rngs={"params": False}),
    "map_variables": lambda module, x: nn.map_variables(
        dense, "params", lambda v: v, init=module.is_initializing(), mutable=True
    )(module, x),
}


class Beside(nn.Module):
    """A layer whose input comes out of a lifted method."""

    how: str

    def setup(self):
        self.dense, self.norm = nn.Dense(4), nn.BatchNorm(momentum=0.0)

    def __call__(self, x, train=False):
        return self.norm(LIFTED[self.how](self, x), use_running_average=not train)


@pytest.mark.parametrize("how", LIFTED)
def test_the_layer_is_seen(how):
    model = Beside(how)
    variables = model.init(jax.random.key(0), X)
    expected, _ = model.apply(variables, X, train=True, mutable=["batch_stats"])
    found = flaxbn.apply(model, variables, X, statistics="batch")
    np.testing.assert_allclose(found, expected, atol=2e-6)  # ten roundings of values of size 1
    stats = flaxbn.estimate_population_stats(model, variables, X, batch_size=24)
    assert_same_statistics(stats, by_training_mode(model, variables, [X[::2], X[1::2]], train))


def test_its_initial_statistics_are_not_exported(tmp_path):
    model = Beside("remat")
    with pytest.raises(ValueError, match="those of 'norm' were never estimated"):
        flaxbn.export_inference(model, model.init(jax.random.key(0), X), X[:8], tmp_path / "model.zip")
