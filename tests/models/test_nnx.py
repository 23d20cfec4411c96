"""Models of flax.nnx through `apply` and the checks: what runs, what is left alone, and what is said."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import nnx_models as zoo
import numpy as np
import optax
import pytest
from flax import nnx
from nnx_models import Block, Chain, D, Within, X

import flaxbn
from flaxbn import diagnostics

LAYERS = [nnx.BatchNorm, flaxbn.nnx.BatchNorm]
either = pytest.mark.parametrize("norm", LAYERS)


def in_training(model, x):
    """The output of training, with dropout off."""
    copy = nnx.clone(model)
    copy.train()
    copy.set_attributes(nnx.Dropout, deterministic=True, raise_if_not_found=False)
    return copy(x)


def call_of(cls):
    """The function that runs, and whether it stands in for another."""
    return vars(cls)["__call__"]


@pytest.fixture(autouse=True)
def _classes_are_as_they_were():
    before = {cls: call_of(cls) for cls in (*LAYERS, nnx.Dropout)}
    yield
    assert {cls: call_of(cls) for cls in before} == before


# ---- apply


@either
def test_batch_statistics_are_those_of_training_mode(norm):
    model = Chain(nnx.Rngs(0), norm)
    found = flaxbn.apply(*nnx.split(model), X, statistics="batch")
    # Two layers, whose variances are summed in another order.
    np.testing.assert_allclose(found, in_training(model, X), rtol=1e-5, atol=1e-5)


@either
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_running_statistics_are_those_of_evaluation(norm, mode):
    model = Chain(nnx.Rngs(0), norm)
    in_training(model, X)
    getattr(model, mode)()
    evaluated = nnx.clone(model)
    evaluated.eval()
    np.testing.assert_allclose(flaxbn.apply(*nnx.split(model), X), evaluated(X), rtol=1e-6, atol=1e-6)


@either
def test_apply_under_jit_and_grad(norm):
    model = Chain(nnx.Rngs(0), norm)

    def by_apply(model, x):
        return jnp.sum(flaxbn.apply(*nnx.split(model), x, statistics="batch") ** 2)

    def by_training(model, x):
        return jnp.sum(model(x) ** 2)

    found = nnx.jit(nnx.grad(by_apply))(model, X)
    model.train()
    model.dropout.deterministic = True
    expected = nnx.grad(by_training)(model, X)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # Biases before a layer have no gradient: what is left is rounding, of terms of the size of the others.
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-3)


def test_weights_in_masks_count_for_our_layer():
    weights = np.linspace(0.5, 2, len(X), dtype=np.float32)
    model = Within(nnx.Rngs(0), lambda block, x: block.norm(x, mask=jnp.linspace(0.5, 2, 90)), flaxbn.nnx.BatchNorm)
    found = flaxbn.estimate_population_stats(*nnx.split(model), X, batch_size=90)["block"]["norm"]["mean"][...]
    np.testing.assert_allclose(found, np.average(np.float64(X), axis=0, weights=weights), rtol=1e-5)


def test_bool_masks_of_the_stock_layer():
    model = Within(nnx.Rngs(0), lambda block, x: block.norm(x, mask=x[:, :1] > 0))
    found = flaxbn.estimate_population_stats(*nnx.split(model), X, batch_size=90)["block"]["norm"]["mean"][...]
    np.testing.assert_allclose(found, np.float64(X)[X[:, 0] > 0].mean(0), rtol=1e-5)


def test_flags_at_the_call_and_a_function_that_was_compiled_before():
    @nnx.jit
    def call(model, x):
        return x + nnx.tanh(model.norm(model.linear(x), use_running_average=False))

    model = Block(nnx.Rngs(0))
    call(model, X)
    found = flaxbn.estimate_population_stats(*nnx.split(model), X, batch_size=90, call=call)
    (expected,) = zoo.merge_all(zoo.of_chain([zoo.weights(model.linear)], [X]))
    np.testing.assert_allclose(found["norm"]["var"][...], expected["var"], rtol=2e-6)
    before = np.asarray(model.norm.mean[...])
    call(model, X)  # is again what it was, and updates
    assert np.any(before != model.norm.mean[...])


# ---- what is left alone


@either
def test_another_thread_trains_meanwhile(norm):
    """While the model is traced, and the classes stand aside."""
    layer, dropout = norm(D, momentum=0.5, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    expected = nnx.clone(layer)
    y = expected(X)
    seen = []

    def train():
        return layer(X), dropout(jnp.ones(1000))

    def call(model, x):
        seen.append(call_of(norm))
        with ThreadPoolExecutor(1) as pool:
            seen.append(pool.submit(train).result())
        return model(x)

    flaxbn.estimate_population_stats(*nnx.split(Chain(nnx.Rngs(0), norm)), X, batch_size=90, call=call)
    assert seen[0] is not call_of(norm)
    found, dropped = seen[1]
    np.testing.assert_array_equal(found, y)
    assert 0 < np.count_nonzero(dropped) < 1000
    np.testing.assert_array_equal(layer.mean[...], expected.mean[...])


def test_classes_are_restored_after_an_error_and_between_nested_traces():
    """The fixture looks at them."""
    model, inner = Chain(nnx.Rngs(0)), Block(nnx.Rngs(0))

    def fails(model, x):
        model(x)
        raise RuntimeError("in the model")

    def nested(model, x):
        return model(x) + flaxbn.apply(*nnx.split(inner), x, statistics="batch")

    with pytest.raises(RuntimeError, match="in the model"):
        flaxbn.apply(*nnx.split(model), X, statistics="batch", call=fails)
    found = flaxbn.apply(*nnx.split(model), X, statistics="batch", call=nested)
    expected = in_training(model, X) + in_training(inner, X)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# ---- mode


def test_independence_is_checked_in_the_mode_that_the_model_is_in():
    model = Block(nnx.Rngs(0))
    with pytest.raises(flaxbn.BatchDependenceError, match=r"output 0 of `call`.*evaluate with `model.eval\(\)`"):
        flaxbn.assert_batch_independent(*nnx.split(model), X[:6])
    model.eval()
    flaxbn.assert_batch_independent(*nnx.split(model), X[:6])
    with pytest.raises(flaxbn.BatchDependenceError, match="what BatchNorm 'norm' receives changes"):
        flaxbn.assert_batch_independent(*nnx.split(model), X[:6], call=lambda m, x: m(x - x.mean(0, keepdims=True)))


@either
def test_diagnose_takes_a_model_in_training_mode(norm):
    model = Chain(nnx.Rngs(0), norm)
    found = diagnostics.diagnose(*nnx.split(model), X, lambda y, batch: jnp.square(y).mean(-1), batch_size=10)
    assert [finding.trap for finding in found.findings][:1] == ["never estimated"]
    stats = flaxbn.estimate_population_stats(*nnx.split(model), X, batch_size=10)
    nnx.update(model, stats)
    rows = diagnostics.rows_of(*nnx.split(model), X)
    assert list(rows) == [("blocks", "0", "norm"), ("blocks", "1", "norm")]
    noise = diagnostics.batch_noise(*nnx.split(model), X, batch_size=10)
    assert [record.layer for record in noise] == ["blocks/0/norm", "blocks/1/norm"]


def test_layers_that_renormalize_do_not_have_small_batches():
    """Batches of two are too small for a plain layer."""
    traps = []
    for norm in (nnx.BatchNorm, flaxbn.nnx.BatchRenorm):
        model = Chain(nnx.Rngs(0), norm)
        nnx.update(model, flaxbn.estimate_population_stats(*nnx.split(model), X, batch_size=2))
        found = diagnostics.diagnose(*nnx.split(model), X, lambda y, batch: jnp.square(y).mean(-1), batch_size=2)
        traps.append([finding.trap for finding in found.findings])
    assert ("batches too small" in traps[0], "batches too small" in traps[1]) == (True, False)


# ---- errors


def run(*args, **options):
    return flaxbn.estimate_population_stats(*args, X, batch_size=45, **options)


def test_a_bare_module():
    message = r"An nnx model is given by its parts: got the Block itself. Pass `\*nnx.split\(model\)`.*`nnx.update"
    model = Block(nnx.Rngs(0))
    with pytest.raises(TypeError, match=message):
        run(model, None)
    with pytest.raises(TypeError, match=message):
        flaxbn.apply(model, X)
    with pytest.raises(TypeError, match=message):
        flaxbn.plan(model, X, batch_size=45)
    with pytest.raises(TypeError, match=message):
        flaxbn.domains.estimate(model, {"a": X}, batch_size=45)


def test_an_optimizer_is_no_model():
    model = Block(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    with pytest.raises(TypeError, match=r"must be split from an nnx.Module: got the parts of the class Optimizer"):
        run(*nnx.split(optimizer))
    with pytest.raises(TypeError, match=r"got the parts of a tree of several objects. Split the model by itself"):
        run(*nnx.split((model, optimizer)))


def test_variables_must_be_the_whole_state():
    graphdef, state = nnx.split(Block(nnx.Rngs(0)))
    with pytest.raises(TypeError, match=r"`variables` of an nnx model must be its nnx.State: got dict"):
        run(graphdef, nnx.to_pure_dict(state))
    _, _, stats = nnx.split(Block(nnx.Rngs(0)), nnx.Param, ...)
    with pytest.raises(ValueError, match=r"must be the whole state of the model.*without filters"):
        run(graphdef, stats)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_call_that_runs_the_model_from_outside(mode):
    model = Block(nnx.Rngs(0))
    getattr(model, mode)()
    message = "`call` must use the model that it is given: BatchNorm, which it runs, is no layer of that"
    with pytest.raises(ValueError, match=message):
        run(*nnx.split(model), call=lambda _, x: model(x))
    with pytest.raises(ValueError, match=message):
        flaxbn.apply(*nnx.split(model), X, statistics="batch", call=lambda _, x: model(x))


def test_a_call_that_changes_another_model():
    model, counter = Block(nnx.Rngs(0)), nnx.Variable(jnp.zeros(()))

    def call(model, x):
        counter[...] += 1
        return model(x)

    with pytest.raises(ValueError, match="`call` must change nothing but the model that it is given"):
        run(*nnx.split(model), call=call)


def test_a_while_loop():
    def loop(block, x):
        return nnx.while_loop(lambda c: jnp.sum(c[1]) < 0, lambda c: (c[0], c[0](c[1])), (block, x))[1]

    message = "must not lie inside `while`.*got BatchNorm 'block/norm'.*`nnx.scan` in the place of"
    with pytest.raises(ValueError, match=message):
        run(*nnx.split(Within(nnx.Rngs(0), loop)))


def test_random_keys_are_the_models_own():
    with pytest.raises(ValueError, match=r"`rngs` must be left out.*got \['noise'\].*nnx.reseed"):
        run(*nnx.split(Block(nnx.Rngs(0))), rngs={"noise": jax.random.key(0)})


def test_a_model_without_layers():
    model = nnx.Linear(D, D, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"must hold the 'mean' and 'var'.*that of Linear has none"):
        run(*nnx.split(model))
    with pytest.raises(ValueError, match=r"must run a batch-norm layer.*Linear ran none"):
        flaxbn.apply(*nnx.split(model), X, statistics="batch")
