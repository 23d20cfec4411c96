"""Programs that compute with the size of a batch, and programs that do not."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from flaxbn.tracing.sizes import beside_shapes


def reads_size(function, width=4):
    one, other = (jax.make_jaxpr(function)(jnp.zeros((n, 6, width))) for n in (4, 5))
    return beside_shapes(one.jaxpr) != beside_shapes(other.jaxpr)


INDEPENDENT = {
    "product": lambda x: x @ jnp.ones((4, 2)),
    "convolution": lambda x: jax.lax.conv_general_dilated(
        x, jnp.ones((3, 4, 2)), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    ),
    "pooling": lambda x: nn.avg_pool(x, (2,), (2,)),
    "relu": nn.relu,
    "mean over positions": lambda x: x.mean(1),
    "reshape": lambda x: x.reshape(len(x), -1).reshape(-1, 4),
    "slice": lambda x: x[:, 1:3, ::2],
    "softmax": lambda x: nn.softmax(x, 1),
    "scan over positions": lambda x: jax.lax.scan(lambda c, v: (c + v, c), x[:, 0], x.swapaxes(0, 1))[1],
    "jit": jax.jit(lambda x: jnp.where(x > 0, x, 0.1 * x)),
    "concatenation": lambda x: jnp.concatenate([x, jnp.zeros((len(x), 1, 4))], 1),
}
READING = {
    "mean over the batch": lambda x: x - x.mean(0, keepdims=True),
    "division": lambda x: x / len(x),
    "division in a compiled function": jax.jit(lambda x: x / len(x)),
    "power": lambda x: jax.lax.integer_pow(x, len(x)),
    "branch": lambda x: x + 1 if len(x) > 4 else x,
    "scan over the batch": lambda x: jax.lax.scan(lambda c, v: (c + v, c), x[0], x)[1],
}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_what_does_not_read_the_size(name):
    assert not reads_size(INDEPENDENT[name])


@pytest.mark.parametrize("name", READING)
def test_what_reads_the_size(name):
    assert reads_size(READING[name])
