"""Estimates of nnx models against float64 numpy: whatever transformations their layers lie in."""

import flax
import jax
import jax.numpy as jnp
import nnx_models as zoo
import numpy as np
import pytest
from flax import nnx
from nnx_models import Block, Chain, D, Within, X, merge_all, of_chain, strided, weights
from oracle import assert_same_statistics

import flaxbn
from flaxbn import domains

BATCH = 25
METHODS = ("precise", "exact")
either = pytest.mark.parametrize("method", METHODS)


def estimate(model, batches=X, *, method="precise", **options):
    options = {"batch_size": BATCH} | options
    return nnx.to_pure_dict(flaxbn.estimate_population_stats(*nnx.split(model), batches, method=method, **options))


def batches_of(method):
    """What normalizes together."""
    return strided(BATCH) if method == "precise" else [X]


def along_axis(layers):
    return {name: np.stack([layer[name] for layer in layers]) for name in ("mean", "var")}


def tied(layers):
    """The moments of all calls of one layer."""
    return merge_all([[call for layer in layers for call in layer]])[0]


# ---- kinds of models

CASES = {
    "chain": Chain,
    "chain of ours": lambda rngs: Chain(rngs, flaxbn.nnx.BatchNorm),
    "scan": zoo.Scanned,
    "scan over blocks stacked in the call": zoo.StackedInCall,
    "scan, remat": lambda rngs: zoo.Scanned(rngs, nnx.remat),
    "scan, jit": lambda rngs: zoo.Scanned(rngs, nnx.jit),
}
RUNS = {
    "shared lanes": zoo.shared_lanes,
    "remat": zoo.remat,
    "cond": zoo.cond,
    "fori_loop": zoo.fori,
    "jit": zoo.compiled,
}


@either
@pytest.mark.parametrize("case", CASES)
def test_statistics_of_blocks_behind_each_other(case, method):
    model = CASES[case](nnx.Rngs(0))
    is_chain = isinstance(model, Chain | zoo.StackedInCall)
    linears = [weights(block.linear) for block in model.blocks] if is_chain else weights(model.blocks.linear)
    found = estimate(model, method=method)["blocks"]
    norms = along_axis([found[i]["norm"] for i in range(len(linears))]) if is_chain else found["norm"]
    assert_same_statistics(norms, along_axis(merge_all(of_chain(linears, batches_of(method)))))


@either
@pytest.mark.parametrize("run", RUNS)
def test_statistics_inside_transformations(run, method):
    model = Within(
        nnx.Rngs(0), RUNS[run], flaxbn.nnx.BatchRenorm if run in ("remat", "shared lanes") else nnx.BatchNorm
    )
    (expected,) = merge_all(of_chain([weights(model.block.linear)], batches_of(method)))
    assert_same_statistics(estimate(model, method=method)["block"]["norm"], expected)


@either
def test_members_have_statistics_of_their_own(method):
    model = zoo.Members(nnx.Rngs(0))
    expected = [merge_all(of_chain([linear], batches_of(method)))[0] for linear in weights(model.blocks.linear)]
    assert_same_statistics(estimate(model, method=method)["blocks"]["norm"], along_axis(expected))


def in_lanes(batches):
    """The statistics of the two layers of `zoo.Lanes`, of each batch, and its outputs, in float64."""
    layers, outputs = [[], []], []
    for x in batches:
        y = np.float64(x).reshape(-1, D)
        layers[0].append(zoo.moments(y))
        y = np.tanh(zoo.normalized(y, *layers[0][-1][1:]) * np.arange(1, 1 + D))
        layers[1].append(zoo.moments(y))
        outputs.append(zoo.normalized(y, *layers[1][-1][1:]).reshape(x.shape))
    return merge_all(layers), outputs


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("norm", [nnx.BatchNorm, flaxbn.nnx.BatchNorm])
def test_lanes_of_a_vmap_over_which_layers_synchronize(norm, own):
    """Each lane, with stored statistics of its own or shared ones, is normalized by those of all lanes."""
    model, x = zoo.Lanes(nnx.Rngs(0), norm, own=own), X.reshape(30, 3, D) * np.float32([[[1], [2], [3]]])
    output = flaxbn.apply(*nnx.split(model), x, statistics="batch")
    np.testing.assert_allclose(output, in_lanes([x])[1][0], atol=2e-6)  # a few roundings of values of size 3
    for method, batches in (("precise", strided(10, x)), ("exact", [x])):
        found = estimate(model, x, batch_size=10, method=method)
        for name, expected in zip(("first", "second"), in_lanes(batches)[0], strict=True):
            if own:
                expected = {key: np.broadcast_to(value, (3, D)) for key, value in expected.items()}
            assert_same_statistics(found[name], expected)


@either
def test_samples_of_weight_0_take_no_part_in_lanes(method):
    model, x = zoo.Lanes(nnx.Rngs(0), own=True), X.reshape(30, 3, D)
    padded = np.concatenate([x, np.full((2, 3, D), np.nan, np.float32)])
    weight = lambda x: jnp.isfinite(x).all((1, 2))  # noqa: E731
    found = estimate(model, padded, batch_size=32, method=method, sample_weight=weight)
    expected = {key: np.broadcast_to(value, (3, D)) for key, value in in_lanes([x])[0][1].items()}
    assert_same_statistics(found["second"], expected)


def test_groups_of_lanes_are_an_error():
    model = zoo.Lanes(nnx.Rngs(0), own=True, axis_index_groups=((0, 1), (2,)))
    message = r"BatchNorm 'first' synchronizes within groups of the axis 'lanes', which the model maps itself"
    with pytest.raises(ValueError, match=message):
        estimate(model, X.reshape(30, 3, D), batch_size=30)


@either
@pytest.mark.parametrize("how", ["carried", "broadcast"])
def test_a_block_that_is_run_again_has_the_statistics_of_all_its_calls(how, method):
    model = zoo.Repeated(nnx.Rngs(0), how)
    expected = tied(of_chain([weights(model.block.linear)] * 3, batches_of(method)))
    with pytest.warns(UserWarning, match="block/norm"):
        found = estimate(model, method=method)
    assert_same_statistics(found["block"]["norm"], expected)


@either
def test_tied_layers_are_one_and_named_once(method):
    model = zoo.Tied(nnx.Rngs(0))
    expected = tied(of_chain([weights(linear) for linear in model.linears], batches_of(method)))
    with pytest.warns(UserWarning, match="'again'") as record:
        found = estimate(model, method=method)
    assert len(record) == 1
    assert list(found) == ["again"]
    assert_same_statistics(found["again"], expected)


@either
def test_layers_that_call_super(method):
    model = Within(nnx.Rngs(0), lambda block, x: block.norm(x), zoo.CallsSuper)
    model.train()
    (expected,) = merge_all([[zoo.moments(2 * np.float64(x)) for x in batches_of(method)]])
    assert_same_statistics(estimate(model, method=method)["block"]["norm"], expected)


@either
def test_a_linen_module_inside(method):
    layers = [[], []]
    for x in batches_of(method):
        layers[0].append(zoo.moments(x))
        y = zoo.normalized(np.float64(x), *layers[0][-1][1:]) * [1, 2, 3, 4] + x
        layers[1].append(zoo.moments(3 * y))
    found = estimate(zoo.LinenInside(nnx.Rngs(0)), method=method)
    for one, other in zip((found["norm"], found["inner"]["BatchNorm_0"]), merge_all(layers), strict=True):
        assert_same_statistics(one, other)


@either
def test_an_nnx_module_inside_a_linen_one(method):
    model = zoo.InsideLinen()
    variables = model.init(jax.random.key(0), X[:3])
    stats = flaxbn.estimate_population_stats(model, variables, X, batch_size=BATCH, method=method)
    linear = variables["params"]["block"]["linear"]
    linear = [np.asarray(jax.tree.leaves(linear[name])[0], np.float64) for name in ("kernel", "bias")]
    (expected,) = merge_all(of_chain([linear], batches_of(method)))
    found = stats["block"]["norm"]
    assert_same_statistics({name: jax.tree.leaves(found[name])[0] for name in ("mean", "var")}, expected)


# ---- data


def test_iterators():
    model = Within(nnx.Rngs(0), lambda block, x: block(x))
    (expected,) = merge_all(of_chain([weights(model.block.linear)], [X[:40], X[40:80], X[80:]]))
    found = estimate(model, iter([X[:40], X[40:80], X[80:]]), batch_size=None)
    assert_same_statistics(found["block"]["norm"], expected)


@either
def test_samples_of_weight_0_may_hold_nan(method):
    model = Chain(nnx.Rngs(0))
    padded = np.concatenate([X, np.full((10, D), np.nan, np.float32)])
    found = estimate(model, padded, batch_size=100, method=method, sample_weight=lambda b: jnp.isfinite(b).all(1))
    for i, expected in enumerate(merge_all(of_chain([weights(b.linear) for b in model.blocks], [X]))):
        assert_same_statistics(found["blocks"][i]["norm"], expected)


@either
def test_batches_split_over_devices_with_padding(method, devices):
    model = Chain(nnx.Rngs(0))
    found = estimate(model, X[:89], batch_size=100, method=method, sharding=flaxbn.data_sharding())
    for i, expected in enumerate(merge_all(of_chain([weights(b.linear) for b in model.blocks], [X[:89]]))):
        assert_same_statistics(found["blocks"][i]["norm"], expected, 1e-5)  # sums in parts, twice in depth


class Noisy(nnx.Module):
    """Normalizes random numbers."""

    def __init__(self, rngs, members=None):
        self.norm = nnx.BatchNorm(1, rngs=rngs)
        self.stream = rngs.noise.fork() if members is None else rngs.noise.split(members)

    def __call__(self, x):
        stream = self.stream
        key = stream() if not stream.key.ndim else nnx.vmap(lambda stream: stream())(stream)[0]
        return self.norm(jax.random.normal(key, (len(x), 1)))


@pytest.mark.parametrize("members", [None, 3])
@either
def test_each_batch_draws_other_random_numbers(method, members):
    """Of one key, or of several along an axis: 45 equal batches of two would have the variance of two numbers."""
    model = Noisy(nnx.Rngs(0, noise=1), members)
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.RngCount))
    (var,) = estimate(model, batch_size=2, method=method)["norm"]["var"]
    assert 0.6 < var < 1.5  # of 90 independent ones: 1, with a standard error of 0.15
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model, nnx.RngCount))


# ---- what is returned, and what is left alone


def test_the_result_updates_the_model():
    model = Chain(nnx.Rngs(0))
    stats = flaxbn.estimate_population_stats(*nnx.split(model), X, batch_size=BATCH)
    assert isinstance(stats, nnx.State)
    assert {type(leaf) for _, leaf in nnx.to_flat_state(stats)} == {nnx.BatchStat}
    nnx.update(model, stats)
    np.testing.assert_array_equal(model.blocks[1].norm.var[...], stats["blocks"][1]["norm"]["var"][...])


@either
def test_the_model_stays_as_it_is(method):
    model = Chain(nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    state = jax.tree.map(np.copy, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey))))
    attributes = set(vars(model.blocks[0].norm))
    estimate(model, method=method)
    assert nnx.graphdef(model) == graphdef
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey))), state)
    assert set(vars(model.blocks[0].norm)) == attributes
    assert (model.blocks[0].norm.use_running_average, model.dropout.deterministic) == (False, False)


@pytest.mark.parametrize("make", [Chain, zoo.Scanned, zoo.LinenInside])
def test_trees_in_the_place_of_graphs(make):
    """The mode in which modules are plain pytrees."""
    before = flax.config.nnx_graph_mode
    expected = estimate(make(nnx.Rngs(0)))
    try:
        flax.config.update("nnx_graph_mode", False)
        found = estimate(make(nnx.Rngs(0)))
    finally:
        flax.config.update("nnx_graph_mode", before)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("kind", [{"ref": True}, {"hijax": True}])
def test_kinds_of_variables(kind):
    plain = Chain(nnx.Rngs(0))
    with nnx.var_defaults(**kind):
        model = Chain(nnx.Rngs(0))
    stats = flaxbn.estimate_population_stats(*nnx.split(model), X, batch_size=BATCH)
    nnx.update(model, stats)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(stats), estimate(plain))
    np.testing.assert_array_equal(model.blocks[1].norm.var[...], stats["blocks"][1]["norm"]["var"][...])


# ---- parts, domains, plan, replicas


def test_moments_of_parts_merge_into_those_of_the_whole():
    model = Within(nnx.Rngs(0), lambda block, x: block.norm(x))
    parts = [flaxbn.population_moments(*nnx.split(model), part, batch_size=45) for part in (X[:45], X[45:])]
    merged = flaxbn.merge(*parts)
    stats = flaxbn.to_batch_stats(merged, nnx.state(model, nnx.BatchStat))
    assert_same_statistics(nnx.to_pure_dict(stats)["block"]["norm"], merge_all([[zoo.moments(X)]])[0])
    assert isinstance(stats, nnx.State)


def test_domains_share_the_weights():
    model = Block(nnx.Rngs(0))
    data = {"plain": X, "doubled": 2 * X}
    stats = domains.estimate(*nnx.split(model), data, batch_size=90)
    doubled = nnx.to_pure_dict(stats["doubled"])["norm"]
    assert_same_statistics(doubled, merge_all(of_chain([weights(model.linear)], [2 * X]))[0])
    graphdef, state = nnx.split(model)
    chosen = nnx.merge(graphdef, domains.select(state, stats, "doubled"))
    np.testing.assert_array_equal(chosen.norm.mean[...], stats["doubled"]["norm"]["mean"][...])
    np.testing.assert_array_equal(chosen.linear.kernel[...], model.linear.kernel[...])
    copies = domains.replicate(nnx.state(model, nnx.BatchStat), ["a", "b"])
    stacked = domains.stack({**copies, "b": stats["plain"]}, ["a", "b"])
    assert stacked["norm"]["mean"].shape == (2, D)
    again = domains.unstack(stacked, ["a", "b"])["b"]
    np.testing.assert_array_equal(again["norm"]["var"][...], stats["plain"]["norm"]["var"][...])


def test_a_plan_names_the_layers():
    plan = flaxbn.plan(*nnx.split(Chain(nnx.Rngs(0))), X, batch_size=BATCH)
    assert [call.layer for call in plan.calls] == ["blocks/0/norm", "blocks/1/norm"]
    assert (plan.samples, plan.batches) == (90, 4)


def test_replicas_merge():
    state = nnx.state(nnx.BatchNorm(1, rngs=nnx.Rngs(0)), nnx.BatchStat)
    replicas = jax.tree.map(lambda a: jnp.stack([a, a + 4]), state)
    replicas["var"] = replicas["var"].replace(jnp.ones((2, 1)))
    merged = flaxbn.merge_replicas(replicas)
    assert (merged["mean"][...].tolist(), merged["var"][...].tolist()) == ([2.0], [5.0])


# ---- what is compiled is used again


TRACED = []


def counted(model, x):
    TRACED.append(x.shape)
    return model(x)


def compiled(caplog):
    return [text for text in caplog.messages if text.startswith("Finished XLA compilation")]


@either
def test_second_estimates_neither_trace_nor_compile(method, caplog):
    model = Chain(nnx.Rngs(0))
    options = {"method": method, "call": counted, "check_independence": False}
    before = len(TRACED)
    estimate(model, **options)
    assert len(TRACED) > before
    before = len(TRACED)
    with jax.log_compiles():
        caplog.clear()
        estimate(model, **options)
        estimate(Chain(nnx.Rngs(1)), **options)
    assert len(TRACED) == before
    assert not compiled(caplog)


def test_another_mode_is_traced_once_and_compiled_never(caplog):
    model = Chain(nnx.Rngs(0))
    estimate(model, call=counted)
    model.eval()
    before = len(TRACED)
    with jax.log_compiles():
        caplog.clear()
        estimate(model, call=counted)
        traced = len(TRACED) - before
        estimate(model, call=counted)
    assert 0 < traced == len(TRACED) - before
    assert not compiled(caplog)


def test_other_attributes_are_another_model():
    """`1 == True`, but not for what is compiled."""

    class Sign(nnx.Module):
        def __init__(self, rngs, number):
            self.norm, self.number = nnx.BatchNorm(D, rngs=rngs), number

        def __call__(self, x):
            return self.norm(-x if self.number is True else x)

    found = [estimate(Sign(nnx.Rngs(0), n), batch_size=90)["norm"]["mean"][...] for n in (1, True)]
    np.testing.assert_allclose(found[0], -found[1], rtol=1e-6)
