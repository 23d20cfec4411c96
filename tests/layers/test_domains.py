"""Layers with statistics for each domain: a mixed batch is its domains run alone."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import flaxbn

D, B = 3, 12
DOMAIN = np.array([0, 2, 2, 0, 2, 0, 0, 2, 0, 2, 2, 0])  # domain 1 is absent
X = (np.random.default_rng(0).normal(size=(B, 3, 2, 4)) * 2 + DOMAIN[:, None, None, None]).astype(np.float32)
G = np.random.default_rng(1).normal(size=X.shape).astype(np.float32)
MASK = np.random.default_rng(2).random((B, 3, 2)).astype(np.float32) * (np.arange(3) != 1)[:, None]

LAYERS = {
    "batch": lambda **k: flaxbn.BatchNorm(momentum=0.9, **k),
    "renorm": lambda **k: flaxbn.BatchRenorm(momentum=0.9, r_max=1.3, d_max=0.4, **k),
}


def stored(seed=3, affine=False):
    """Statistics and parameters, different in each domain and channel."""
    rng = np.random.default_rng(seed)
    stats = {"mean": rng.normal(size=(D, 4)), "var": rng.uniform(0.5, 2, (D, 4))}
    params = {"scale": rng.normal(size=(D, 4)), "bias": rng.normal(size=(D, 4))}
    if not affine:
        params = jax.tree.map(lambda a: a[0], params)
    variables = jax.tree.map(jnp.float32, {"params": params, "batch_stats": stats})
    return variables


def with_steps(variables, layer):
    if not isinstance(layer, flaxbn.BatchRenorm):
        return variables
    return {**variables, "batch_stats": {**variables["batch_stats"], "steps": jnp.array([5, 6, 7], jnp.int32)}}


def of_domain(variables, d, affine):
    stats = jax.tree.map(lambda a: a[d], variables["batch_stats"])
    return {
        "params": jax.tree.map(lambda a: a[d], variables["params"]) if affine else variables["params"],
        "batch_stats": stats,
    }


def run(layer, variables, x, g, mask, **options):
    """Output, new statistics and gradients of a training step."""

    def loss(params, x):
        y, new = layer.apply({**variables, "params": params}, x, False, mask=mask, mutable=["batch_stats"], **options)
        return jnp.sum(y * g), (y, new["batch_stats"])

    (_, (y, stats)), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], x)
    return y, stats, *grads


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "weights"])
def test_a_mixed_batch_is_its_domains_run_alone(kind, affine, mask):
    layer = LAYERS[kind](num_domains=D, domain_affine=affine)
    variables = with_steps(stored(affine=affine), layer)
    y, stats, dparams, dx = run(layer, variables, X, G, mask, domain=DOMAIN)
    expected_dparams = jax.tree.map(np.zeros_like, variables["params"])
    for d in (0, 2):
        rows = d == DOMAIN
        alone = of_domain(variables, d, affine)
        found = run(LAYERS[kind](), alone, X[rows], G[rows], None if mask is None else mask[rows])
        # float32 sums of up to 36 terms of order 1, in another order.
        chex.assert_trees_all_close(found[0], y[rows], atol=2e-6, rtol=1e-5)
        chex.assert_trees_all_close(found[1], jax.tree.map(lambda a, d=d: a[d], stats), atol=1e-6, rtol=1e-6)
        chex.assert_trees_all_close(found[3], dx[rows], atol=5e-6, rtol=1e-5)
        for key, grad in found[2].items():
            if affine:
                expected_dparams[key][d] = grad
            else:
                expected_dparams[key] += grad
    chex.assert_trees_all_close(dparams, expected_dparams, atol=2e-5, rtol=1e-5)
    chex.assert_trees_all_equal(*(jax.tree.map(lambda a: a[1], t) for t in (stats, variables["batch_stats"])))
    if kind == "renorm":
        np.testing.assert_array_equal(stats["steps"], [6, 6, 8])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("domain", [2, np.int64(2), jnp.array(2), np.full(B, 2)])
def test_a_batch_of_one_domain(kind, domain):
    layer = LAYERS[kind](num_domains=D, domain_affine=True)
    variables = with_steps(stored(affine=True), layer)
    y, stats, dparams, dx = run(layer, variables, X, G, None, domain=domain)
    found = run(LAYERS[kind](), of_domain(variables, 2, True), X, G, None)
    chex.assert_trees_all_close((found[0], found[3]), (y, dx), atol=5e-6, rtol=1e-5)
    chex.assert_trees_all_close(found[1], jax.tree.map(lambda a: a[2], stats), rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(found[2], jax.tree.map(lambda a: a[2], dparams), rtol=1e-5, atol=2e-5)
    for d in (0, 1):
        chex.assert_trees_all_equal(*(jax.tree.map(lambda a, d=d: a[d], t) for t in (stats, variables["batch_stats"])))


@pytest.mark.parametrize("domain", [1, jnp.array(1), DOMAIN])
def test_evaluation_uses_the_statistics_of_the_domain(domain):
    layer = flaxbn.BatchNorm(num_domains=D)
    variables = stored()
    y = layer.apply(variables, X, True, domain=domain)
    d = np.broadcast_to(domain, B)
    stats = {k: np.asarray(v, np.float64)[d][:, None, None] for k, v in variables["batch_stats"].items()}
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    expected = (X - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * p["scale"] + p["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-6)


def test_a_large_mean_loses_nothing():
    x = X + 1e4 * (1 + DOMAIN[:, None, None, None]).astype(np.float32)
    layer = flaxbn.BatchNorm(num_domains=D, momentum=0.0)
    _, new = layer.apply(stored(), x, False, domain=DOMAIN, mutable=["batch_stats"])
    for d in (0, 2):
        exact = x[d == DOMAIN].astype(np.float64).var((0, 1, 2))
        np.testing.assert_allclose(new["batch_stats"]["var"][d], exact, rtol=1e-5)


def test_initial_shapes():
    layer = flaxbn.BatchRenorm(num_domains=D, domain_affine=True)
    variables = layer.init(jax.random.key(0), X, False, domain=DOMAIN)
    shapes = jax.tree.map(jnp.shape, variables)
    assert shapes == {
        "params": {"scale": (D, 4), "bias": (D, 4)},
        "batch_stats": {"mean": (D, 4), "var": (D, 4), "steps": (D,)},
    }


@pytest.mark.parametrize("domain", [-1, D, 2**31 - 1])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_traced_numbers_out_of_range_touch_no_domain(domain, mixed, kind):
    layer = LAYERS[kind](num_domains=D)
    variables = with_steps(stored(), layer)
    numbers = jnp.where(jnp.arange(B) < 6, domain, 2) if mixed else jnp.array(domain)
    for train in (True, False):
        run = functools.partial(layer.apply, variables, X, not train, mutable=["batch_stats"])
        y, new = jax.jit(lambda n, run=run: run(domain=n))(numbers)
        touched = [2] if mixed and train else []
        for d in set(range(D)) - set(touched):
            old = jax.tree.map(lambda a, d=d: a[d], variables["batch_stats"])
            chex.assert_trees_all_equal(jax.tree.map(lambda a, d=d: a[d], new["batch_stats"]), old)
        assert np.isnan(y[:6]).all()
        assert np.isnan(y[6:]).all() != mixed
    if mixed:
        alone = layer.apply(variables, X[6:], False, domain=2, mutable=["batch_stats"])[0]
        mixed_y = layer.apply(variables, X, False, domain=numbers, mutable=["batch_stats"])[0]
        np.testing.assert_allclose(mixed_y[6:], alone, rtol=1e-5, atol=2e-6)


def test_devices_with_different_mixtures_share_statistics(devices):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices[:4])
    layer = flaxbn.BatchNorm(num_domains=D, momentum=0.9, axis_name="data")
    variables = stored()
    order = np.argsort(DOMAIN, kind="stable")  # some devices see one domain only

    def step(x, domain):
        return layer.apply(variables, x, False, domain=domain, mutable=["batch_stats"])

    sharded = jax.shard_map(step, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=(P("data"), P()))
    y, new = jax.jit(sharded)(X[order], DOMAIN[order])
    local = flaxbn.BatchNorm(num_domains=D, momentum=0.9)
    expected, expected_new = local.apply(variables, X[order], False, domain=DOMAIN[order], mutable=["batch_stats"])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-6)
    chex.assert_trees_all_close(new, expected_new, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("error", "message", "options", "domain"),
    [
        (ValueError, r"must lie in \[0, 3\): got 3", {"num_domains": D}, 3),
        (ValueError, r"must lie in \[0, 3\): got -1", {"num_domains": D}, -1),
        (ValueError, r"must lie in \[0, 3\): got 5", {"num_domains": D}, np.int32(5)),
        (
            ValueError,
            r"must lie in \[0, 3\): got numbers from 0 to 4294967296",
            {"num_domains": D},
            DOMAIN.astype(int) << 31,
        ),
        (TypeError, r"must be of integers: got <U1", {"num_domains": D}, ["a"] * 12),
        (TypeError, r"must be of integers: got float32", {"num_domains": D}, np.float32(1)),
        (TypeError, r"must be of integers: got bool", {"num_domains": D}, DOMAIN > 0),
        (ValueError, r"got shape \(11,\) for x of shape \(12, 3, 2, 4\)", {"num_domains": D}, DOMAIN[:-1]),
        (ValueError, r"got shape \(12, 1\)", {"num_domains": D}, DOMAIN[:, None]),
        (ValueError, r"feature axes \(0,\)", {"num_domains": D, "axis": 0}, DOMAIN),
        (ValueError, r"must be given to a layer with `num_domains=3`", {"num_domains": D}, None),
        (ValueError, r"belongs to a layer with `num_domains`", {}, 1),
        (ValueError, r"`num_domains` must be a positive integer: got 0", {"num_domains": 0}, 0),
        (ValueError, r"`domain_affine` needs `num_domains`", {"domain_affine": True}, None),
    ],
)
def test_errors(error, message, options, domain):
    with pytest.raises(error, match=message):
        flaxbn.BatchNorm(**options).init(jax.random.key(0), X, False, domain=domain)


def test_members_of_an_axis_may_run_one_domain_each():
    layer = flaxbn.BatchNorm(num_domains=D, momentum=0.0, axis_name="data")
    parts, numbers = X.reshape(4, 3, 3, 2, 4), jnp.array([0, 1, 1, 0])

    def step(x, domain):
        return layer.apply(stored(), x, False, domain=domain, mutable=["batch_stats"])[1]["batch_stats"]

    found = jax.vmap(step, axis_name="data")(parts, numbers)
    for d in (0, 1):
        exact = parts[np.asarray(numbers) == d].reshape(-1, 4).astype(np.float64)
        np.testing.assert_allclose(found["mean"][:, d], np.tile(exact.mean(0), (4, 1)), atol=1e-6)
        np.testing.assert_allclose(found["var"][:, d], np.tile(exact.var(0), (4, 1)), rtol=2e-6)


def test_schedules_are_asked_for_one_step_at_a_time():
    schedule = optax.piecewise_interpolate_schedule("linear", 1.0, {10: 2.0, 20: 1.5, 30: 2.0})
    layer = flaxbn.BatchRenorm(num_domains=D, r_max=schedule, d_max=0.5)
    variables = stored()
    variables["batch_stats"]["steps"] = jnp.array([5, 15, 25])
    mixed, _ = layer.apply(variables, X, False, domain=DOMAIN, mutable=["batch_stats"])
    for d in (0, 2):
        alone, _ = layer.apply(variables, X[d == DOMAIN], False, domain=d, mutable=["batch_stats"])
        np.testing.assert_allclose(mixed[d == DOMAIN], alone, rtol=1e-5, atol=2e-6)


def test_a_single_value_of_a_domain_is_normalized_by_its_running_average():
    x, domain = X[:3, 0, 0], np.array([0, 0, 2])
    layer, variables = flaxbn.BatchNorm(num_domains=D), stored()
    y, new = layer.apply(variables, x, False, domain=domain, mutable=["batch_stats"])
    np.testing.assert_allclose(y[2], layer.apply(variables, x, True, domain=domain)[2], rtol=1e-6)
    chex.assert_trees_all_equal(*(jax.tree.map(lambda a: a[2], t["batch_stats"]) for t in (new, variables)))
    assert np.all(new["batch_stats"]["mean"][0] != variables["batch_stats"]["mean"][0])


def test_a_number_beyond_32_bits_is_out_of_range():
    """2**32 is 0 in 32 bits."""
    with jax.enable_x64(True):
        layer = flaxbn.BatchNorm(use_running_average=True, num_domains=D)
        y = layer.apply(stored(), X, domain=jnp.full(len(X), 2**32, jnp.int64))
    assert np.isnan(y).all()
