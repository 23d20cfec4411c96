"""Layers with batch renormalization against algorithm 1 of Ioffe 2017, written out in float64 numpy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from formulas import EPSILON, batch_norm, batch_norm_gradient, moments, wide

import flaxbn
from flaxbn import BatchNorm, BatchRenorm, paper_d_max, paper_r_max

N, C = 16, 3
SCALE, BIAS = np.float32([1.5, 0.7, -1.0]), np.float32([0.2, -0.4, 1.0])
RUNNING = np.float32([0.5, -1.0, 2.0]), np.float32([4.0, 0.25, 1.5])
FREE = 1e6


def data(offset=0.0, seed=0):
    x = np.random.default_rng(seed).normal(size=(N, C)) * [1.0, 0.5, 3.0] + [0.3, 0.8, -0.4]
    return (x + offset).astype(np.float32)


def variables(mean=RUNNING[0], var=RUNNING[1], **steps):
    return {"params": {"scale": SCALE, "bias": BIAS}, "batch_stats": {"mean": mean, "var": var, **steps}}


def train(layer, variables, x, **kwargs):
    y, new = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"], **kwargs)
    return y, new["batch_stats"]


def algorithm_1(x, running, r_max, d_max):
    """The paper's r, d and output, with its gamma and beta ours."""
    x, mean, var = wide(x, *running)
    mean_b, sigma_b, sigma = x.mean(0), np.sqrt(x.var(0) + EPSILON), np.sqrt(var + EPSILON)
    r = np.clip(sigma_b / sigma, 1 / r_max, r_max)
    d = np.clip((mean_b - mean) / sigma, -d_max, d_max)
    return r, d, ((x - mean_b) / sigma_b * r + d) * SCALE + BIAS


@pytest.mark.parametrize(("r_max", "d_max"), [(1.0, 0.0), (1.5, 0.5), (3.0, 5.0), (FREE, FREE), (1.2, FREE)])
def test_output_and_update_are_algorithm_1(r_max, d_max):
    x = data()
    y, stats = train(BatchRenorm(r_max=r_max, d_max=d_max, momentum=0.75), variables(), x)
    np.testing.assert_allclose(y, algorithm_1(x, RUNNING, r_max, d_max)[2], rtol=1e-5, atol=2e-6)
    _, mean, var = moments(x)
    np.testing.assert_allclose(stats["mean"], RUNNING[0] + 0.25 * (mean - RUNNING[0]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats["var"], RUNNING[1] + 0.25 * (var - RUNNING[1]), rtol=1e-5)


@pytest.mark.parametrize(("r_max", "d_max"), [(1.0, 0.0), (1.2, 0.3), (FREE, FREE)])
def test_gradient_holds_r_and_d_constant(r_max, d_max):
    x, cotangent = data(), data(seed=1)
    layer = BatchRenorm(r_max=r_max, d_max=d_max)

    def output(x, params):
        return train(layer, variables() | {"params": params}, x)[0]

    found_x, found = jax.jit(lambda x, p: jax.vjp(output, x, p)[1](cotangent))(x, variables()["params"])
    r, d, _ = algorithm_1(x, RUNNING, r_max, d_max)
    expected = batch_norm_gradient(x, SCALE, cotangent, r=r, d=d)
    for one, other in zip((found_x, found["scale"], found["bias"]), expected):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6 * np.abs(other).max())


def test_without_room_it_is_batch_norm_in_value_and_gradient():
    x, cotangent = data(10.0), data(seed=1)
    y, vjp = jax.vjp(lambda x: train(BatchRenorm(r_max=1, d_max=0), variables(), x)[0], x)
    np.testing.assert_allclose(y, batch_norm(x, SCALE, BIAS), rtol=1e-5, atol=2e-6)
    expected = batch_norm_gradient(x, SCALE, cotangent)[0]
    np.testing.assert_allclose(vjp(cotangent)[0], expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("offset", [0.0, 10.0, 1e3, 1e4])
def test_unclipped_it_is_the_running_statistics_before_the_update(offset):
    x, running = data(offset), (RUNNING[0] + np.float32(offset), RUNNING[1])
    y, _ = train(BatchRenorm(r_max=FREE, d_max=FREE), variables(*running), x)
    # "Exactly": a few roundings of numbers of the size of the output, whatever the offset.
    np.testing.assert_allclose(y, batch_norm(x, SCALE, BIAS, statistics=running), rtol=2e-6, atol=4e-6)


def test_the_running_statistics_are_those_before_the_update():
    y, stats = train(BatchRenorm(r_max=FREE, d_max=FREE, momentum=0.0), variables(), data())
    assert np.abs(y - batch_norm(data(), SCALE, BIAS, statistics=(stats["mean"], stats["var"]))).max() > 0.1
    np.testing.assert_allclose(y, batch_norm(data(), SCALE, BIAS, statistics=RUNNING), rtol=2e-6, atol=4e-6)


def test_a_mask_gives_the_correction_of_what_counts():
    x, mask = data(), np.arange(N) % 4 > 0
    y, _ = train(BatchRenorm(r_max=1.5, d_max=0.5), variables(), np.where(mask[:, None], x, np.nan), mask=mask)
    np.testing.assert_allclose(y[mask], algorithm_1(x[mask], RUNNING, 1.5, 0.5)[2], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "options", [{"use_scale": False}, {"use_bias": False}, {"use_scale": False, "use_bias": False}]
)
def test_the_correction_applies_without_scale_or_bias(options):
    layer = BatchRenorm(r_max=1.5, d_max=0.5, **options)
    both = variables()
    both["params"] = {k: v for k, v in both["params"].items() if options.get(f"use_{k}", True)}
    x = data()
    r, d, _ = algorithm_1(x, RUNNING, 1.5, 0.5)
    expected = (batch_norm(x) * r + d) * both["params"].get("scale", 1.0) + both["params"].get("bias", 0.0)
    np.testing.assert_allclose(train(layer, both, x)[0], expected, rtol=1e-5, atol=2e-6)


def test_evaluation_is_batch_norm():
    y = BatchRenorm().apply(variables(steps=jnp.int32(30_000)), data(), use_running_average=True)
    np.testing.assert_allclose(y, batch_norm(data(), SCALE, BIAS, statistics=RUNNING), rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("steps", [np.float32(np.nan), np.zeros((7,), np.int32), np.int32(2**31 - 1)])
def test_evaluation_never_reads_the_steps(steps):
    y = BatchRenorm().apply(variables(steps=steps), data(), use_running_average=True)
    np.testing.assert_allclose(y, batch_norm(data(), SCALE, BIAS, statistics=RUNNING), rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("step", [0, 15_000, 40_000])
def test_the_layer_follows_the_ramp_at_the_stored_step(step):
    running = (RUNNING[0] * 10, RUNNING[1] / 50)  # far off: both bounds bite
    y, stats = train(BatchRenorm(), variables(*running, steps=jnp.int32(step)), data())
    expected = algorithm_1(data(), running, float(paper_r_max(step)), float(paper_d_max(step)))[2]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-6)
    assert stats["steps"] == step + 1


def test_own_schedules_see_the_steps_before_this_update():
    layer = BatchRenorm(r_max=lambda n: 1.0 + n, d_max=lambda n: 0.1 * n)
    y, _ = train(layer, variables(steps=jnp.int32(2)), data())
    np.testing.assert_allclose(y, algorithm_1(data(), RUNNING, 3.0, 0.2)[2], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("stored", "after"),
    [
        (np.float32(3.0), np.float32(4)),
        (np.float32(0.035), np.float32(1.035)),
        (np.int32(7), np.int32(8)),  # an older checkpoint's
        (np.int32(2**24), np.int32(2**24 + 1)),
        (jnp.bfloat16(256), np.float32(257)),  # where bfloat16 stands still
        (np.float16(2048), np.float32(2049)),
    ],
)
def test_steps_are_floats_and_integers_stay_integers(stored, after):
    _, stats = train(BatchRenorm(), variables(steps=stored), data())
    assert (stats["steps"], stats["steps"].dtype, stats["steps"].shape) == (after, after.dtype, ())


@pytest.mark.parametrize("steps", [None, np.float32(3)])
def test_a_target_network_follows_inside_a_scan(steps):
    """Polyak averaging of all variables, `steps` among them, against the recursion in float64."""
    online = variables() if steps is None else variables(steps=steps)
    online["batch_stats"].setdefault("steps", np.float32(0))

    def step(carry, _):
        online, target = carry
        online = {**online, "batch_stats": train(BatchRenorm(), online, data())[1]}
        return (online, optax.incremental_update(online, target, 0.25)), None

    (online, target), _ = jax.lax.scan(step, jax.tree.map(jnp.asarray, (online, online)), None, length=20)
    expected = count = 0.0 if steps is None else float(steps)
    for _ in range(20):
        count += 1
        expected = 0.25 * count + 0.75 * expected
    assert online["batch_stats"]["steps"] == count
    np.testing.assert_allclose(target["batch_stats"]["steps"], expected, rtol=1e-6)


def test_all_variables_can_be_differentiated():
    def loss(variables):
        y, _ = BatchRenorm().apply(variables, data(), use_running_average=False, mutable=["batch_stats"])
        return jnp.sum(jnp.asarray(y) ** 2)

    gradient = jax.grad(loss)(jax.tree.map(jnp.asarray, variables(steps=np.float32(30_000))))
    assert gradient["batch_stats"]["steps"] == 0


def test_steps_missing_in_a_checkpoint_read_as_0():
    y, stats = train(BatchRenorm(), variables(), data())
    assert stats["steps"] == 1
    np.testing.assert_allclose(y, batch_norm(data(), SCALE, BIAS), rtol=1e-5, atol=2e-6)  # the ramp is at 0


def test_init_creates_steps_at_0():
    for running in (False, True):
        stats = BatchRenorm().init(jax.random.key(0), data(), use_running_average=running)["batch_stats"]
        assert stats["steps"] == 0
        assert stats["steps"].dtype == jnp.float32


def test_only_real_updates_move_the_steps():
    layer, held = BatchRenorm(), variables(steps=jnp.int32(7))
    nothing = jnp.zeros(N)
    assert train(layer, held, data(), mask=nothing)[1]["steps"] == 7
    assert train(layer, held, data() * np.float32(np.inf))[1]["steps"] == 7
    assert train(layer, held, data(), update_running_average=False)[1]["steps"] == 7
    _, new = layer.apply(held, data(), use_running_average=True, mutable=["batch_stats"])
    assert new["batch_stats"]["steps"] == 7
    one_channel = np.zeros((N, C), bool)
    one_channel[:, 1] = True
    assert train(layer, held, data(), mask=one_channel)[1]["steps"] == 8


def test_steps_survive_pmean(devices):
    def step(variables, x):
        _, stats = train(BatchRenorm(axis_name="i"), variables, x)
        return jax.lax.pmean(stats, "i")

    x = np.stack([data(seed=k) for k in range(8)])
    stats = variables(steps=jnp.float32(0))["batch_stats"]
    for expected in (1, 2, 3):
        found = jax.pmap(step, axis_name="i", in_axes=(None, 0))(variables() | {"batch_stats": stats}, x)
        stats = jax.tree.map(lambda a: np.asarray(a[0]), found)
        np.testing.assert_array_equal(np.asarray(found["steps"]), expected)


@pytest.mark.parametrize("d_max", [2.0, 1])
def test_one_value_is_allowed_where_d_max_is_positive(d_max):
    x = data()[:1]
    y, _ = train(BatchRenorm(r_max=FREE, d_max=FREE), variables(), x)
    np.testing.assert_allclose(y, batch_norm(x, SCALE, BIAS, statistics=RUNNING), rtol=2e-6, atol=4e-6)
    y, _ = train(BatchRenorm(d_max=d_max), variables(steps=jnp.int32(10**6)), x)
    np.testing.assert_allclose(y, algorithm_1(x, RUNNING, 3.0, d_max)[2], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("d_max", [0.0, 0, paper_d_max, lambda step: 2.0])
def test_one_value_is_an_error_otherwise(d_max):
    with pytest.raises(ValueError, match="more than one value per channel"):
        train(BatchRenorm(d_max=d_max), variables(), data()[:1])


@pytest.mark.parametrize("clipped", [True, False])
def test_a_constant_channel_has_finite_gradients(clipped):
    x = data()
    x[:, 1] = 3.0
    layer = BatchRenorm() if clipped else BatchRenorm(r_max=FREE, d_max=FREE)
    running = variables(RUNNING[0], np.float32([1.0, 0.0, 1.0]))
    gradient = jax.grad(lambda v, x: jnp.sum(train(layer, v, x)[0] ** 2), (0, 1), allow_int=True)(running, x)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_the_fake_variance_of_the_copied_class_is_avoided():
    """At var = epsilon = 1e-3 folding r and d into a variance and adding epsilon again gives 3.54 for 5."""
    x = np.float32([[-1.0], [1.0]]) * np.float32(np.sqrt(1e-3))
    layer = BatchRenorm(r_max=5.0, d_max=0.0, epsilon=1e-3, use_scale=False, use_bias=False)
    held = {"batch_stats": {"mean": np.zeros(1, np.float32), "var": np.full(1, 1e-6, np.float32)}}
    r = np.sqrt(2e-3 / (1e-6 + 1e-3))
    y, _ = train(layer, held, x)
    np.testing.assert_allclose(y, x / np.sqrt(2e-3) * r, rtol=1e-5)


def test_complex_input_is_an_error():
    with pytest.raises(TypeError, match=r"BatchRenorm takes real input.*complex64.*Use BatchNorm"):
        train(BatchRenorm(), variables(), data().astype(np.complex64))


@pytest.mark.parametrize(("name", "value"), [("r_max", 0.99), ("r_max", np.nan), ("d_max", -1e-3)])
def test_bounds_that_cannot_be_are_an_error(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be at least [01], or a schedule: got"):
        BatchRenorm(**{name: value})


def test_equal_models_compare_equal_and_trace_once():
    assert BatchRenorm() == BatchRenorm()
    assert hash(BatchRenorm()) == hash(BatchRenorm())
    assert BatchRenorm(r_max=2.0) != BatchRenorm()

    @chex.assert_max_traces(1)
    def traced(layer, variables, x):
        return train(layer, variables, x)[1]

    step = jax.jit(traced, static_argnums=0)
    held = BatchRenorm().init(jax.random.key(0), data(), use_running_average=False)
    for _ in range(3):  # what init made and what an update made have the same types, too
        held = {**held, "batch_stats": step(BatchRenorm(), held, data())}
    assert held["batch_stats"]["steps"] == 3


def test_bounds_are_configuration_not_variables():
    held = BatchRenorm(r_max=2.0, d_max=1.0).init(jax.random.key(0), data(), use_running_average=False)
    assert set(held["batch_stats"]) == {"mean", "var", "steps"}
    assert set(held["params"]) == {"scale", "bias"}


def test_it_is_a_batch_norm():
    assert issubclass(BatchRenorm, BatchNorm)
    assert BatchRenorm().r_max is flaxbn.paper_r_max
    assert BatchRenorm().d_max is flaxbn.paper_d_max


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_input_has_a_float32_correction(dtype):
    x = jnp.asarray(data(), dtype)
    y, stats = train(BatchRenorm(r_max=1.5, d_max=0.5, dtype=dtype), variables(), x)
    assert y.dtype == dtype
    assert (stats["mean"].dtype, stats["steps"].dtype) == (jnp.float32, jnp.float32)
    expected = algorithm_1(np.float64(x), RUNNING, 1.5, 0.5)[2]
    np.testing.assert_allclose(np.float64(y), expected, rtol=float(jnp.finfo(dtype).eps), atol=1e-6)  # cast once
