"""What a program computes of arguments that stay the same is taken out of it, and it computes what it did."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from flaxbn.tracing.ahead import computed_ahead
from flaxbn.tracing.program import Program

WEIGHTS = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(8, 64)).astype(np.float32)


def evaluate(weights, bias, x):
    cast = weights.astype(jnp.bfloat16).T  # two equations, of which only the last is needed
    larger = jnp.broadcast_to(weights[0], (128, 64)).sum(0)  # would take more memory than it is made from
    small = bias.astype(jnp.bfloat16)
    return x.astype(jnp.bfloat16) @ cast + small[None], larger, weights


def taken_apart(function, fixed, *args):
    closed = jax.make_jaxpr(function)(*args)
    return computed_ahead(Program(closed.jaxpr, closed.consts), fixed)


def run(program, args):
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(program.jaxpr, program.consts))(*args)


def test_casts_of_weights_are_taken_out():
    args = WEIGHTS, np.ones(64, np.float32), X
    compute, rest = taken_apart(evaluate, 2, *args)
    (made,) = compute(*args[:2])
    np.testing.assert_array_equal(made, WEIGHTS.astype(jnp.bfloat16).T)
    before = [e.primitive.name for e in jax.make_jaxpr(evaluate)(*args).eqns]
    after = [e.primitive.name for e in rest.jaxpr.eqns]
    assert sorted([*after, "convert_element_type", "transpose"]) == sorted(before)
    for found, expected in zip(run(rest, (made, *args)), evaluate(*map(jnp.asarray, args)), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_what_depends_on_others_stays():
    compute, rest = taken_apart(lambda w, x: (w * x[:1]).astype(jnp.bfloat16), 1, WEIGHTS, X)
    assert compute(WEIGHTS) == []
    np.testing.assert_array_equal(run(rest, (WEIGHTS, X))[0], (WEIGHTS * X[:1]).astype(jnp.bfloat16))


def test_tokens_have_no_size():
    def ordered(w, x):
        jax.lax.after_all(jax.lax.create_token())
        return w.astype(jnp.bfloat16) + x

    _, rest = taken_apart(ordered, 1, WEIGHTS, X[:1])
    assert [e.primitive.name for e in rest.jaxpr.eqns][:2] == ["create_token", "after_all"]
