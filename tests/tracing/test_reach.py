"""Which arguments reach an output other than through a tap, through every kind of equation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxbn.tracing.primitive import bind_tap, owned_p
from flaxbn.tracing.reach import Reach

X = np.ones((4, 3), np.float32)


def tapped(x, mean, var):
    return bind_tap(x, mean, var, (1,), layer="a layer")[0]


@jax.custom_jvp
def custom(x, mean):
    return x * mean


custom.defjvp(lambda primals, tangents: (custom(*primals), tangents[0]))


def scanned(x, a, b):
    """`a` is carried, and reaches the sum after a step; `b` is handed out step by step."""

    def body(carry, b):
        held, total = carry
        return (held, total + held), b

    (_, total), ys = jax.lax.scan(body, (a, x), jnp.broadcast_to(b, (2, *b.shape)))
    return total, ys


def delayed(x, a):
    """`a` is two steps behind what comes out."""
    zero = jnp.zeros_like(x)
    return jax.lax.scan(lambda c, _: ((a, c[0], c[1]), None), (zero, zero, x), None, length=3)[0][2]


def counted(x, a):
    """`a` decides how long a loop is."""
    return jax.lax.while_loop(lambda c: c[1] < a[0], lambda c: (c[0] * 2, c[1] + 1), (x, jnp.float32(0)))[0]


def decided(x, a, b):
    return jax.lax.cond(a[0] > 0, lambda b: b, lambda b: x[0] * 2, b)


# What is traced, of arguments x, a and b; and which of a and b reach each output.
PROGRAMS = {
    "arithmetic": (lambda x, a, b: (x + a[None], b), ["a", "b"]),
    "tap": (lambda x, a, b: (tapped(x, a, b), x), ["", ""]),
    "input of a tap": (lambda x, a, b: (tapped(x * a[None], b, b), x * a[None]), ["", "a"]),
    "jit, one by one": (lambda x, a, b: jax.jit(lambda a, b: (a, x + b[None]))(a, b), ["a", "b"]),
    "remat": (lambda x, a, b: (jax.checkpoint(lambda a: jnp.sin(a) * 2)(a), x), ["a", ""]),
    "custom rule": (lambda x, a, b: (custom(x, a[None]), custom(x, x)), ["a", ""]),
    "scan": (lambda x, a, b: scanned(x[0], a, b), ["a", "b"]),
    "scan, delayed": (lambda x, a, b: (delayed(x[0], a), x), ["a", ""]),
    "while": (lambda x, a, b: (counted(x, a), x), ["a", ""]),
    "cond": (lambda x, a, b: (decided(x, a, b), x), ["ab", ""]),
    "tap in scan": (lambda x, a, b: (jax.lax.scan(lambda c, _: (tapped(x, c, b), None), a, None, 2)[0], x), ["a", ""]),
    "vmap of tap": (lambda x, a, b: (jax.vmap(tapped, (0, None, None))(jnp.stack([x, x]), a, b), x), ["", ""]),
    "other": (lambda x, a, b: jax.lax.custom_linear_solve(lambda v: v * 2, a, lambda _, v: v / 2)[None], ["a"]),
}


def reach(function, leaking=False):
    jaxpr = jax.make_jaxpr(function)(X, X[0], X[0]).jaxpr
    taps = {id(eqn) for eqn in jaxpr.eqns} if leaking else ()
    return Reach(jaxpr, [frozenset(), frozenset("a"), frozenset("b")], taps)


@pytest.mark.parametrize("name", PROGRAMS)
def test_marks_follow_values(name):
    function, expected = PROGRAMS[name]
    assert ["".join(sorted(marks)) for marks in reach(function).outputs] == expected


def test_a_tap_may_leak():
    assert reach(PROGRAMS["tap"][0], leaking=True).outputs[0] == {"a", "b"}


def test_what_is_owned_is_known_wherever_it_is_said():
    def program(x, a, b):
        @jax.jit
        def inner(b):
            owned_p.bind(b)
            return b * 2

        jax.vmap(owned_p.bind)(jnp.stack([a, a]))
        return jax.checkpoint(inner)(b)

    assert reach(program).owned == {"a", "b"}
    np.testing.assert_array_equal(jax.jit(program)(X, X[0], X[0]), 2 * X[0])
