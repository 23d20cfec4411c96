"""What an equation of a traced program is."""

import jax
import jax.numpy as jnp
import pytest

from flaxbn.tracing.kinds import asks_host


def callback(x):
    return jax.pure_callback(lambda a: a, x, x, vmap_method="sequential")


def printed(x):
    jax.debug.print("{}", x)
    return x


def noted(x):
    jax.debug.callback(lambda a: None, x)
    return x


def asking(x):
    return jax.experimental.io_callback(lambda a: a, x, x)


def with_rule(f):
    ruled = jax.custom_jvp(lambda x: f(x))
    ruled.defjvps(lambda tangent, out, x: tangent)
    return ruled


INSIDE = {
    "directly": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "vmap": jax.vmap,
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, a: (c, f(a)), 0, x),
    "cond": lambda f: lambda x: jax.lax.cond(x[0] > 0, f, lambda a: a, x),
    "while": lambda f: lambda x: jax.lax.while_loop(lambda a: a[0] > 0, f, x),
    "custom_jvp": with_rule,
}


@pytest.mark.parametrize("function", [callback, printed, noted, asking])
@pytest.mark.parametrize("inside", INSIDE)
def test_a_function_of_the_host_is_seen(function, inside):
    if function is asking and inside == "vmap":
        pytest.skip("its order would not be kept")
    wrapped = INSIDE[inside](function)
    assert asks_host(jax.make_jaxpr(wrapped)(jnp.ones(3)).jaxpr)


@pytest.mark.parametrize("inside", INSIDE)
def test_other_functions_are_none(inside):
    assert not asks_host(jax.make_jaxpr(INSIDE[inside](jnp.sin))(jnp.ones(3)).jaxpr)
