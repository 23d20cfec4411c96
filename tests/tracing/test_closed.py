"""Arrays that a program closes over become its arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex

from flaxbn.tracing.closed import as_arguments, with_own_constants
from flaxbn.tracing.program import Program

X = np.arange(12, dtype=np.float32).reshape(4, 3)


def with_rule(times):
    found = jax.custom_jvp(times)
    found.defjvp(lambda primals, tangents: (times(primals[0]), times(tangents[0])))
    return found


def closing_over(how, array):
    """A function of x that multiplies by an array, from some place in its program."""

    def times(x):
        return x * array

    return {
        "itself": times,
        "jit": jax.jit(times),
        "jit in jit": jax.jit(lambda x: jax.jit(times)(x) + 1),
        "remat": jax.checkpoint(times),
        "custom_jvp": with_rule(times),
        "scan": lambda x: jax.lax.scan(lambda y, _: (times(y), None), x, length=2)[0],
        "cond": lambda x: jax.lax.cond(x[0, 0] == 0, times, jnp.sin, x),
    }[how]


@pytest.mark.parametrize("how", ["itself", "jit", "jit in jit", "remat", "custom_jvp", "scan", "cond"])
@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray])
def test_another_array_can_be_given(how, kind):
    first, second = (kind(np.full((4, 3), c, np.float32)) for c in (2, 3))
    closed = jax.make_jaxpr(closing_over(how, first))(X)
    program, constants = as_arguments(with_own_constants(Program(closed.jaxpr, closed.consts), [X]))
    assert len(constants) == 1
    assert program.consts == []
    run = jex.jaxpr_as_fun(jex.ClosedJaxpr(program.jaxpr, []))
    for array in (first, second):
        np.testing.assert_allclose(run(array, X)[0], closing_over(how, array)(X), rtol=1e-6)


def test_a_compiled_function_inside_a_loop_keeps_its_array():
    closed = jax.make_jaxpr(lambda x: jax.lax.scan(lambda y, _: (closing_over("jit", X)(y), None), x, length=2)[0])(X)
    program, constants = as_arguments(with_own_constants(Program(closed.jaxpr, closed.consts), [X]))
    (found,) = jex.jaxpr_as_fun(jex.ClosedJaxpr(program.jaxpr, []))(*constants, X)
    np.testing.assert_allclose(found, X**3, rtol=1e-6)
