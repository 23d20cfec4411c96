"""Which programs count as equal, and so share what is compiled."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxbn.tracing.jaxpr import as_key, structure

X = jnp.ones((4, 3))


def key(f, *args):
    jaxpr = jax.make_jaxpr(f)(*(args or (X,))).jaxpr
    return structure([*jaxpr.constvars, *jaxpr.invars], jaxpr.eqns, jaxpr.outvars)


def custom(rule, constant):
    f = rule(lambda x: x * constant)
    if rule is jax.custom_jvp:
        f.defjvp(lambda p, t: (p[0] * constant, t[0] * constant))
    else:
        f.defvjp(lambda x: (x * constant, None), lambda _, g: (g * constant,))
    return f


def conv(x, stride):
    numbers = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(x[None], jnp.ones((3, 3, 3)), (stride,), [(2, 2)], dimension_numbers=numbers)


# Functions of a number, which they have in some place of their program.
PROGRAMS = {
    "literal": lambda c: lambda x: x * c,
    "literal inside jit": lambda c: jax.jit(lambda x: x * c),
    "numpy scalar": lambda c: lambda x: x * np.float32(c),
    "parameter": lambda c: lambda x: x ** int(c),
    "axis": lambda c: lambda x: jnp.flip(x, int(c) - 2),
    "rolled by": lambda c: lambda x: jnp.roll(x, int(c), 0),
    "window of a convolution": lambda c: partial(conv, stride=int(c)),
    "contracted axes": lambda c: lambda x: x[:3] @ x[:3] if c == 2 else x[:3] @ x[:3].T,
    "order of operands": lambda c: lambda x: jnp.exp(x) - x if c == 2 else x - jnp.exp(x),
    "which output": lambda c: lambda x: (jnp.exp(x), jnp.sin(x)) if c == 2 else (jnp.sin(x), jnp.exp(x)),
    "an operand again": lambda c: lambda x: jnp.exp(x) * x if c == 2 else jnp.exp(x) * jnp.exp(x),
    "length of a loop": lambda c: lambda x: jax.lax.scan(lambda y, _: (y * 2, None), x, length=int(c)),
    "direction of a loop": lambda c: lambda x: jax.lax.scan(lambda y, z: (y + z, y), x[0], x, reverse=c == 2),
    "literal in a loop": lambda c: lambda x: jax.lax.scan(lambda y, _: (y * c, None), x, length=3),
    "bound of a while loop": lambda c: lambda x: jax.lax.while_loop(lambda y: y.sum() < c, lambda y: y + 1, x),
    "branch": lambda c: lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y * c, lambda y: y, x),
    "order of branches": lambda c: lambda x: jax.lax.cond(x[0, 0] > 0, *(jnp.sin, jnp.cos)[:: 1 if c == 2 else -1], x),
    "remat": lambda c: jax.checkpoint(lambda x: x * c),
    "custom_jvp": lambda c: custom(jax.custom_jvp, c),
    "custom_vjp": lambda c: custom(jax.custom_vjp, c),
    "dtype": lambda c: lambda x: x.astype(jnp.bfloat16 if c == 2 else jnp.float16),
    "callback": lambda c: lambda x: jax.pure_callback({2.0: np.sin, 3.0: np.cos}[c], x, x),
    "precision": lambda c: lambda x: jnp.dot(x, x.T, precision="highest" if c == 2 else "default"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_that_differ_in_one_place_are_told_apart(name):
    make = PROGRAMS[name]
    assert key(make(2.0)) != key(make(3.0))


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "callback"])
def test_programs_traced_again_are_equal(name):
    """But for functions that they call back, which are compared by identity."""
    make = PROGRAMS[name]
    assert key(make(2.0)) == key(make(2.0))
    assert hash(key(make(2.0))) == hash(key(make(2.0)))


@pytest.mark.parametrize("rule", [jax.jit, jax.checkpoint, jax.custom_jvp, jax.custom_vjp])
def test_constants_inside_a_function_are_told_apart(rule):
    """Where jax keeps them inside of the function's program; otherwise they are arguments, given at each call."""

    def closed(c):
        constant = jnp.full((4, 3), c)
        f = custom(rule, constant) if rule in (jax.custom_jvp, jax.custom_vjp) else rule(lambda x: x * constant)
        jaxpr = jax.make_jaxpr(f)(X)
        assert len(jaxpr.consts) in (0, 1)
        return jaxpr

    first, second = closed(2.0), closed(3.0)
    keys = [structure([*j.jaxpr.constvars, *j.jaxpr.invars], j.jaxpr.eqns, j.jaxpr.outvars) for j in (first, second)]
    assert keys[0] != keys[1] or (first.consts and second.consts)


@pytest.mark.parametrize("shape", [(4, 3), (400, 3)])
def test_constants_of_a_closed_program_are_compared_by_value(shape):
    two, three, again = (
        jax.make_jaxpr(lambda x, a=a: x * a)(jnp.ones(shape))
        for a in (jnp.full(shape, 2.0), jnp.full(shape, 3.0), jnp.full(shape, 2.0))
    )
    assert all(closed.consts for closed in (two, three, again))
    assert as_key(two) != as_key(three)
    assert as_key(two) == as_key(two) == as_key(again)


def test_constants_that_were_freed_do_not_lend_their_keys():
    """200 programs one after the other, each with a constant in the memory of earlier ones."""

    def held(i):
        array = jnp.full((4, 3), float(i))
        return as_key(jax.make_jaxpr(jax.jit(lambda x: x * array))(X))

    assert len({held(i) for i in range(200)}) == 200


def test_random_keys_as_constants_are_compared_by_value():
    def held(seed):
        random = jax.random.key(seed)
        return as_key(jax.make_jaxpr(lambda x: jax.random.normal(random) * x)(X))

    assert held(0) == held(0) != held(1)


def test_what_is_kept_for_derivatives_does_not_matter():
    keys = {key(jax.checkpoint(jnp.sin, policy=jax.checkpoint_policies.save_only_these_names(n))) for n in "ab"}
    assert len(keys) == 1


def test_shapes_and_types_of_arguments_are_told_apart():
    keys = {key(jnp.sin, x) for x in (X, X[:2], X.astype(jnp.bfloat16), X.astype(jnp.complex64))}
    assert len(keys) == 4


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (1, 1.0),
        (1, True),
        ((1, 2), [1, 2]),
        ((1, (2, 3)), ((1, 2), 3)),
        ({"a": 1}, {"b": 1}),
        ({"a": 1}, {"a": 1.0}),
        (np.ones(2), np.ones(2)),
        (None, 0),
        (jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT),
    ],
)
def test_parameters_that_differ_have_different_keys(first, second):
    """Equal in Python is not enough: 1 and 1.0 are different programs. What cannot be hashed is itself alone."""
    assert as_key(first) != as_key(second)
    assert as_key(first) == as_key(first)


def test_literal_zeros_of_both_signs_are_told_apart():
    assert key(lambda x: x * 0.0) != key(lambda x: x * -0.0)


def test_parameters_of_both_zeros_are_told_apart():
    assert as_key(0.0) != as_key(-0.0)
