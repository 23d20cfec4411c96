"""What a batch of a precise pass starts: on accelerators every kernel counts, and none for what is known before."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxbn
from flaxbn.data.batches import abstract
from flaxbn.estimation import request as module
from flaxbn.estimation.batch_pass import Pass, key_of_pass
from flaxbn.estimation.request import request
from flaxbn.estimation.reuse import Compiled
from flaxbn.tracing.jaxpr import opened, subjaxprs

X = np.random.default_rng(0).normal(3.0, 2.0, (64, 4, 4, 32)).astype(np.float32)


class Wide(nn.Module):
    """A layer that is summed in blocks on an accelerator, and one whose sums are taken at once."""

    dtype: object = None

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, dtype=self.dtype)(nn.Dense(256, dtype=self.dtype)(x))
        return nn.BatchNorm(use_running_average=True, dtype=self.dtype)(nn.Dense(8, dtype=self.dtype)(nn.relu(x)))


VARIABLES = jax.jit(Wide().init)(jax.random.key(0), X[:2])


@pytest.fixture
def accelerator(monkeypatch):
    """Every device counts as one."""
    monkeypatch.setattr(module, "on_accelerator", lambda tree: True)


def equations_in_loop(jaxpr, inside=False):
    for eqn in jaxpr.eqns:
        if inside:
            yield eqn
        for inner in subjaxprs(eqn):
            yield from equations_in_loop(opened(inner), inside or eqn.primitive.name in ("while", "scan"))


def compiled_pass(model):
    """The pass over batches of 32, and what it takes first."""
    options = dict.fromkeys(("call", "sample_weight", "only", "sharding", "rngs"))
    asked = request(model, VARIABLES, **options)
    compiled, (closed,) = Compiled(Pass, asked.options).find(key_of_pass(asked, abstract(X, 32), None))
    return compiled, (closed, asked.variables, asked.rngs)


def loop(model):
    """The equations of the loop over batches."""
    compiled, first = compiled_pass(model)
    places = np.arange(64).reshape(2, 32)
    traced = jax.make_jaxpr(compiled.scan)(*first, X, places, None, None, 0)
    return list(equations_in_loop(traced.jaxpr))


def test_weights_are_cast_before_the_loop():
    cast = [e.outvars[0].aval.shape for e in loop(Wide(jnp.bfloat16)) if e.primitive.name == "convert_element_type"]
    assert (32, 256) not in cast
    assert (32, 4, 4, 32) in cast  # the batch


def test_nothing_is_computed_to_know_shapes(monkeypatch):
    """Not the weights that a loop will cast, either, one operation after the other."""
    compiled, first = compiled_pass(Wide(jnp.bfloat16))
    given, ahead = [], compiled._ahead
    monkeypatch.setattr(compiled, "_like", None)  # another test may have asked
    monkeypatch.setattr(compiled, "_ahead", lambda *leaves: given.extend(leaves) or ahead(*leaves))
    compiled.moments_like(*first, [X[:32]], None, 0)
    assert given
    assert all(isinstance(leaf, jax.core.Tracer) for leaf in given)


def test_sums_of_an_accelerator(accelerator):
    """Both of a layer at once, or those of 16 blocks before one barrier; the samples behind one, too."""
    names = [(e.primitive.name, len(e.outvars)) for e in loop(Wide())]
    assert names.count(("reduce", 2)) == 1
    assert sorted(count for name, count in names if name == "optimization_barrier") == [1, 1, 2]


@pytest.mark.parametrize(
    ("dtype", "batches"),
    [(None, {"batches": X, "batch_size": 32}), (jnp.bfloat16, {"batches": [X[::2], X[1::2]]})],
    ids=["float32", "bfloat16"],
)
def test_statistics_are_the_same(monkeypatch, batches, dtype):
    expected = flaxbn.estimate_population_stats(Wide(dtype), VARIABLES, **batches)
    monkeypatch.setattr(module, "on_accelerator", lambda tree: True)
    found = flaxbn.estimate_population_stats(Wide(dtype), VARIABLES, **batches)
    tolerance = 1e-5 if dtype is None else 2e-2  # bfloat16 rounds what the second layer sees
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    x = X.reshape(-1, 32).astype(np.float64) @ np.asarray(VARIABLES["params"]["Dense_0"]["kernel"], np.float64)
    if dtype is None:  # 1e-6: deviations of float32 products of 32 numbers
        np.testing.assert_allclose(found["BatchNorm_0"]["var"], x.var(0), rtol=2e-6)
