"""Layers whose momentum is a schedule: step by step against float64 numpy, and what is stored beside the average."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from formulas import moments

import flaxbn
import flaxbn.nnx as ours
from flaxbn import BatchNorm, BatchRenorm, Debiased, cumulative, domains

C, N = 2, 16
BATCHES = (np.random.default_rng(0).normal(size=(12, N, C)) * [1.0, 3.0] + [0.5, -4.0]).astype(np.float32)
STATISTICS = np.array([moments(x)[1:] for x in BATCHES])  # (batches, 2, C)


@chex.assert_max_traces(20)
def update(layer, variables, x, options):
    return {**variables, **layer.apply(variables, x, False, mutable=["batch_stats"], **options)[1]}


step = jax.jit(update, static_argnums=0)


def start(layer, **options):
    return jax.tree.map(np.asarray, layer.init(jax.random.key(0), BATCHES[0], False, **options))


def run(layer, batches=BATCHES, held=None, **options):
    """What is stored after each batch, (batches, 2, ...)."""
    held, found = held or start(layer, **options), []
    for x in batches:
        held = step(layer, held, x, options)
        found.append((held["batch_stats"]["mean"], held["batch_stats"]["var"]))
    return np.array(found), held


def torch_average(statistics):
    """PyTorch with `momentum=None`: new = old + (batch - old) / num_batches_tracked."""
    average, found = np.zeros_like(statistics[0]), []
    for count, batch in enumerate(statistics, 1):
        average = average + (batch - average) / count
        found.append(average)
    return np.array(found)


def haiku_average(statistics, m):
    hidden, found = np.zeros_like(statistics[0]), []
    for count, batch in enumerate(statistics, 1):
        hidden = m * hidden + (1 - m) * batch
        found.append(hidden / (1 - m**count))
    return np.array(found)


@pytest.mark.parametrize("layer", [BatchNorm, BatchRenorm])
def test_cumulative_is_torch_s_momentum_none(layer):
    found, held = run(layer(momentum=cumulative))
    np.testing.assert_allclose(found, torch_average(STATISTICS), rtol=1e-5)
    assert held["batch_stats"]["steps"] == len(BATCHES)
    assert held["batch_stats"]["steps"].dtype == jnp.float32


@pytest.mark.parametrize("m", [0.9, 0.999])
def test_debiased_is_haiku_s_average(m):
    found, _ = run(BatchNorm(momentum=Debiased(m)))
    np.testing.assert_allclose(found, haiku_average(STATISTICS, m), rtol=1e-5)


def test_after_one_step_the_output_of_evaluation_is_that_of_training():
    """Dividing the stored variance, which begins at 1, by `1 - m^t` makes the deviation 0.20 (Equinox)."""
    layer, x = BatchNorm(momentum=Debiased(0.96), epsilon=0.0), BATCHES[0] / BATCHES[0].std(0)
    held = step(layer, start(layer), x, {})
    deviations = np.std(layer.apply(held, x, True), 0)
    np.testing.assert_allclose(deviations, 1.0, rtol=1e-5)
    divided = (0.96 * 1.0 + 0.04 * np.var(x, 0)) / (1 - 0.96)
    np.testing.assert_allclose(np.std(x, 0) / np.sqrt(divided), 0.20, rtol=1e-3)


def test_any_function_of_the_steps():
    layer = BatchNorm(momentum=lambda steps: jnp.where(steps < 3, 0.5, 0.9))
    found, _ = run(layer, BATCHES[:6])
    mean, expected = np.zeros(C), []
    for t, (batch, _) in enumerate(STATISTICS[:6]):
        m = 0.5 if t < 3 else 0.9
        mean = m * mean + (1 - m) * batch
        expected.append(mean)
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-5, atol=1e-6)


def test_a_fixed_momentum_stores_no_steps():
    assert set(start(BatchNorm())["batch_stats"]) == {"mean", "var"}
    assert set(start(BatchNorm(momentum=cumulative))["batch_stats"]) == {"mean", "var", "steps"}


def test_only_real_updates_move_the_steps():
    layer = BatchNorm(momentum=cumulative)
    _, held = run(layer, BATCHES[:2])
    for x, options in ((BATCHES[2] * np.nan, {}), (BATCHES[2], {"mask": np.zeros(N)})):
        after = step(layer, held, x, options)
        jax.tree.map(np.testing.assert_array_equal, after, held)
    _, new = layer.apply(held, BATCHES[2], True, mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, new["batch_stats"], held["batch_stats"])


def test_a_channel_that_is_left_out_at_first_keeps_a_part_of_its_initial_value():
    """Steps are those of the layer: after the second update the initial mean of 0 still has half of the weight."""
    layer, mask = BatchNorm(momentum=cumulative), np.ones((N, C), bool)
    mask[:, 1] = False
    held = step(layer, start(layer), BATCHES[0], {"mask": mask})
    assert held["batch_stats"]["mean"][1] == 0
    held = step(layer, held, BATCHES[1], {})
    np.testing.assert_allclose(held["batch_stats"]["mean"][0], STATISTICS[:2, 0, 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(held["batch_stats"]["mean"][1], STATISTICS[1, 0, 1] / 2, rtol=1e-5)


def test_each_domain_counts_its_own_updates():
    """Domain 1 comes three batches later, and is the plain average of its own all the same; domain 2 never comes."""
    layer, held = BatchNorm(momentum=cumulative, num_domains=3), None
    held = start(layer, domain=0)
    numbers = [0, 0, 0, 1, 0, 1]
    for x, number in zip(BATCHES, numbers):
        held = step(layer, held, x, {"domain": number if number == 0 else np.full(N, number)})
    for number in range(2):
        own = STATISTICS[[k for k, n in enumerate(numbers) if n == number]].mean(0)
        found = [held["batch_stats"][name][number] for name in ("mean", "var")]
        np.testing.assert_allclose(found, own, rtol=1e-5)
    np.testing.assert_array_equal(held["batch_stats"]["steps"], [4, 2, 0])
    np.testing.assert_array_equal([held["batch_stats"][name][2] for name in ("mean", "var")], [[0] * C, [1] * C])


def test_a_checkpoint_without_steps():
    """Its statistics are replaced by the first batch, but where `set_steps` says how many batches they are of."""
    held = start(BatchNorm())
    held["batch_stats"] = {"mean": np.full(C, 7, np.float32), "var": np.full(C, 2, np.float32)}
    layer = BatchNorm(momentum=cumulative)
    np.testing.assert_allclose(run(layer, BATCHES[:1], held)[0][0], STATISTICS[0], rtol=1e-5)
    told = {**held, "batch_stats": flaxbn.set_steps(held["batch_stats"], 9)}
    found, after = run(layer, BATCHES[:1], told)
    np.testing.assert_allclose(found[0], 0.9 * np.array([[7] * C, [2] * C]) + 0.1 * STATISTICS[0], rtol=1e-5)
    assert after["batch_stats"]["steps"] == 10


def test_one_number_of_steps_is_that_of_all_domains():
    layer = BatchNorm(momentum=cumulative, num_domains=2)
    held = start(layer, domain=0)
    held["batch_stats"]["steps"] = np.float32(3)
    after = step(layer, held, BATCHES[0], {"domain": 1})["batch_stats"]
    np.testing.assert_array_equal(after["steps"], [3, 4])
    np.testing.assert_allclose(after["mean"][1], STATISTICS[0, 0] / 4, rtol=1e-5)


def test_a_target_network_follows_inside_a_scan():
    layer = BatchNorm(momentum=Debiased(0.9))

    def one(carry, x):
        online, target = carry
        online = update(layer, online, x, {})
        return (online, optax.incremental_update(online, target, 0.25)), None

    held = start(layer)
    (_, target), _ = jax.lax.scan(one, (held, held), BATCHES)
    expected, average = 0.0, np.array([[0.0] * C, [1.0] * C])
    for count, statistics in enumerate(haiku_average(STATISTICS, 0.9), 1):
        expected = 0.25 * count + 0.75 * expected
        average = 0.25 * statistics + 0.75 * average
    stats = target["batch_stats"]
    np.testing.assert_allclose(stats["steps"], expected, rtol=1e-6)
    np.testing.assert_allclose([stats["mean"], stats["var"]], average, rtol=1e-5)


def test_tools_keep_the_steps():
    layer = BatchNorm(momentum=cumulative, use_running_average=True)
    _, held = run(layer.clone(use_running_average=None), BATCHES[:3])
    stats = held["batch_stats"]
    estimated = flaxbn.estimate_population_stats(layer, held, BATCHES[0], batch_size=N)
    assert estimated["steps"] == 3
    np.testing.assert_allclose(estimated["mean"], STATISTICS[0, 0], rtol=1e-5)
    twice = jax.tree.map(lambda a: jnp.stack([a, a]), stats)
    assert flaxbn.merge_replicas({**twice, "steps": jnp.float32([3, 5])})["steps"] == 5
    stacked = domains.stack(domains.replicate(stats, ["a", "b"]), ["a", "b"])
    assert stacked["steps"].shape == (2,)
    with_domains = BatchNorm(momentum=cumulative, num_domains=2)
    after = step(with_domains, {**held, "batch_stats": stacked}, BATCHES[3], {"domain": 1})
    found = domains.unstack(after["batch_stats"], ["a", "b"])["b"]["mean"]
    np.testing.assert_allclose(found, STATISTICS[:4, 0].mean(0), rtol=1e-5)


def test_equal_layers_trace_once():
    assert BatchNorm(momentum=Debiased(0.9)) == BatchNorm(momentum=Debiased(0.9))
    assert BatchNorm(momentum=Debiased(0.9)) != BatchNorm(momentum=Debiased(0.8))

    @chex.assert_max_traces(1)
    def traced(layer, variables, x):
        return layer.apply(variables, x, False, mutable=["batch_stats"])[1]

    compiled = jax.jit(traced, static_argnums=0)
    held = start(BatchNorm(momentum=Debiased(0.9)))
    for x in BATCHES[:3]:
        held = {**held, **compiled(BatchNorm(momentum=Debiased(0.9)), held, x)}
    assert held["batch_stats"]["steps"] == 3


def test_the_layer_of_nnx_has_steps_where_momentum_is_a_schedule():
    stock, plain = (nnx.state(cls(C, rngs=nnx.Rngs(0))) for cls in (nnx.BatchNorm, ours.BatchNorm))
    assert jax.tree.structure(plain) == jax.tree.structure(stock)
    layer = ours.BatchNorm(C, momentum=cumulative, rngs=nnx.Rngs(0))
    assert isinstance(layer.steps, nnx.BatchStat)
    nnx.update(layer, stock)  # which has none, and leaves them as they are
    for x in BATCHES[:4]:
        layer(x)
    found = [layer.mean[...], layer.var[...]]
    np.testing.assert_allclose(found, STATISTICS[:4].mean(0), rtol=1e-5)
    nnx.update(layer, flaxbn.set_steps(nnx.state(layer, nnx.BatchStat), 0))
    layer(BATCHES[4])
    np.testing.assert_allclose([layer.mean[...], layer.var[...]], STATISTICS[4], rtol=1e-5)


def test_with_ghost_batches_a_step_is_a_batch():
    layer = BatchNorm(momentum=cumulative, virtual_batch_size=4)
    found, held = run(layer, BATCHES[:3])
    np.testing.assert_allclose(found, torch_average(STATISTICS[:3]), rtol=1e-5)
    assert held["batch_stats"]["steps"] == 3


# ---- errors


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan")])
def test_a_schedule_that_leaves_0_to_1_is_an_error(value):
    layer = BatchNorm(momentum=lambda steps: value)
    with pytest.raises(ValueError, match=r"`momentum` must return a number in \[0, 1\].* returned"):
        step(layer, start(layer), BATCHES[0], {})


@pytest.mark.parametrize("momentum", [None, "cumulative", Debiased])
@pytest.mark.parametrize("make", [BatchNorm, lambda **options: ours.BatchNorm(C, rngs=nnx.Rngs(0), **options)])
def test_what_is_no_momentum_is_an_error(momentum, make):
    with pytest.raises(TypeError, match=r"`momentum` must be a number in .*None in PyTorch is `flaxbn.cumulative`"):
        make(momentum=momentum)
