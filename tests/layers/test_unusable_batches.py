"""One value in a channel, or sums that overflow: nothing is stored, and the running average normalizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import EPSILON, batch_norm, moments
from members import MEMBERS, every_map

import flaxbn
from flaxbn import BatchNorm, BatchRenorm

B, D = 6, 3
X = np.random.default_rng(0).normal(3.0, 2.0, (B, 2)).astype(np.float32)
MEAN, VAR = np.float32([[0.5, -1.0], [9.0, 9.0], [2.0, 0.1]]), np.float32([[4.0, 0.25], [9.0, 9.0], [1.5, 1.0]])
WEIGHTS = [1e-30, 0.3, 3e38]
PATHS = {"none": None, "number": 2, "traced": jnp.array(2), "array": np.full(B, 2)}


def stored(domain, **more):
    mean, var = (MEAN[2], VAR[2]) if domain is None else (MEAN, VAR)
    return {"params": {"scale": np.float32([1.5, -1.0]), "bias": np.float32([0.2, 1.0])}} | {
        "batch_stats": {"mean": mean, "var": var, **more}
    }


def train(layer, held, x, **options):
    """Output, gradient and what is stored of the domain."""

    def output(x):
        y, new = layer.apply(held, x, False, mutable=["batch_stats"], **options)
        return jnp.sum(y), (y, new["batch_stats"])

    (_, (y, new)), gradient = jax.jit(jax.value_and_grad(output, has_aux=True))(x)
    return y, gradient, jax.tree.map(lambda a: a[2] if options.get("domain") is not None else a, new)


def by_running_average(x, channels=slice(None)):
    params = stored(None)["params"]
    scale, bias, mean, var = (a[channels] for a in (params["scale"], params["bias"], MEAN[2], VAR[2]))
    return batch_norm(x, scale, bias, statistics=(mean, var))


def assert_untouched(y, gradient, new, x, channels=slice(None)):
    """As in evaluation: the output, its gradient, and what is stored. One rounding of the difference of means."""
    np.testing.assert_allclose(y[:, channels], by_running_average(x[:, channels], channels), rtol=1e-6, atol=1e-6)
    scale = stored(None)["params"]["scale"]
    expected = np.broadcast_to(scale / np.sqrt(VAR[2].astype(np.float64) + EPSILON), x.shape)
    np.testing.assert_allclose(gradient[:, channels], expected[:, channels], rtol=1e-6)
    np.testing.assert_array_equal(new["mean"][..., channels], MEAN[2][channels])
    np.testing.assert_array_equal(new["var"][..., channels], VAR[2][channels])


@pytest.mark.parametrize("weight", [True, *WEIGHTS])
@pytest.mark.parametrize("path", PATHS)
def test_one_value_that_a_mask_leaves(path, weight):
    mask = np.zeros(B, np.asarray(weight).dtype if weight is True else np.float32)
    mask[3] = weight
    domain = PATHS[path]
    layer = BatchNorm(momentum=0.5, num_domains=None if domain is None else D)
    options = {} if domain is None else {"domain": domain}
    assert_untouched(*train(layer, stored(domain), X, mask=mask, **options), X)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("path", PATHS)
def test_two_values_of_any_weight(path, weight):
    """Mean and variance are those of float64, though the sum of two weights of 3e38 is more than float32 holds."""
    mask = np.float32([0, weight, 0, 0, weight, 0])
    domain = PATHS[path]
    layer = BatchNorm(momentum=0.0, num_domains=None if domain is None else D)
    options = {} if domain is None else {"domain": domain}
    y, gradient, new = train(layer, stored(domain), X, mask=mask, **options)
    _, mean, var = moments(X[[1, 4]])
    np.testing.assert_allclose(new["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(new["var"], var, rtol=1e-6)
    params = stored(None)["params"]
    expected = batch_norm(X, params["scale"], params["bias"], statistics=(mean, var))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert np.all(np.isfinite(gradient))


def test_each_channel_and_each_domain_for_itself():
    """Domain 0 has one value in each channel, of small weight; domain 2 one in channel 0, and several in channel 1."""
    domain = np.array([2, 0, 2, 2, 0, 0])
    mask = np.float32([[1e30, 1], [1e-30, 1e-30], [0, 1], [0, 1], [0, 0], [0, 0]])
    held = stored(domain)
    y, gradient, new = train(BatchNorm(momentum=0.0, num_domains=D), held, X, mask=mask, domain=domain)
    rows = domain == 2
    assert_untouched(y[rows], gradient[rows], new, X[rows], channels=slice(0, 1))
    np.testing.assert_allclose(new["mean"][1], X[rows, 1].astype(np.float64).mean(), rtol=1e-6)
    whole = BatchNorm(momentum=0.0, num_domains=D).apply(
        held, X, False, mask=mask, domain=domain, mutable=["batch_stats"]
    )[1]
    np.testing.assert_array_equal(whole["batch_stats"]["mean"][:2], MEAN[:2])


def test_positions_of_one_example_are_several_values():
    x = np.stack([X, X + 1], 1)
    mask = (np.arange(B) == 3)[:, None, None]
    _, new = BatchNorm(momentum=0.0).apply(stored(None), x, False, mask=mask, mutable=["batch_stats"])
    np.testing.assert_allclose(new["batch_stats"]["mean"], x[3].astype(np.float64).mean(0), rtol=1e-6)
    np.testing.assert_allclose(new["batch_stats"]["var"], 0.25, rtol=1e-5)


@every_map
@pytest.mark.parametrize("holders", [1, 2])
@pytest.mark.usefixtures("devices")
def test_values_of_all_members_count(mapped, holders):
    x = np.random.default_rng(1).normal(size=(MEMBERS, B, 2)).astype(np.float32)
    mask = np.zeros((MEMBERS, B), np.float32)
    mask[:holders, 4] = 1e-30
    layer = BatchNorm(momentum=0.0, axis_name="i")

    def member(x, mask):
        return layer.apply(stored(None), x, False, mask=mask, mutable=["batch_stats"])

    y, new = mapped(member)(x, mask)
    mean = MEAN[2] if holders == 1 else x[:2, 4].astype(np.float64).mean(0)
    np.testing.assert_allclose(new["batch_stats"]["mean"], np.broadcast_to(mean, (MEMBERS, 2)), rtol=1e-6)
    if holders == 1:
        np.testing.assert_allclose(y[5], by_running_average(x[5]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("d_max", "moved"), [(flaxbn.paper_d_max, 0), (2.0, 1)])
def test_renormalization_takes_one_value_where_its_output_is_no_constant(d_max, moved):
    """With a positive d it puts out what the running average makes of it, within the bound: 2 deviations."""
    mask = np.arange(B) == 3
    layer = BatchRenorm(momentum=0.5, r_max=3.0, d_max=d_max, use_scale=False, use_bias=False)
    held = {"batch_stats": stored(None, steps=np.float32(7))["batch_stats"]}
    y, new = layer.apply(held, X, False, mask=mask, mutable=["batch_stats"])
    assert new["batch_stats"]["steps"] == 7 + moved
    assert np.all(new["batch_stats"]["mean"] == MEAN[2]) != moved
    expected = (X[3].astype(np.float64) - MEAN[2]) / np.sqrt(VAR[2].astype(np.float64) + EPSILON)
    np.testing.assert_allclose(y[3], np.clip(expected, -2, 2) if moved else expected, rtol=1e-6)


# ---- sums that overflow


OVERFLOWS = {
    "constant": np.full((2000, 2), 1e36, np.float32),
    "squares": np.tile(np.float32([[3e19, 2e19], [-3e19, -2e19]]), (100, 1)),
    "one infinity": np.where(np.arange(50)[:, None] == 7, np.inf, np.ones((50, 2))).astype(np.float32),
}


@pytest.mark.parametrize("layer", [BatchNorm, BatchRenorm])
@pytest.mark.parametrize("x", OVERFLOWS.values(), ids=OVERFLOWS)
@pytest.mark.parametrize("masked", [False, True])
def test_sums_that_overflow(layer, x, masked):
    """Nothing is stored, and finite values have finite outputs and gradients."""
    x = np.concatenate([x, x])
    mask = {"mask": np.arange(len(x)) < len(x) // 2} if masked else {}
    held = stored(None, **({"steps": np.float32(7)} if layer is BatchRenorm else {}))
    y, gradient, new = train(layer(momentum=0.5), held, x, **mask)
    np.testing.assert_array_equal([new["mean"], new["var"]], [MEAN[2], VAR[2]])
    finite = np.isfinite(x)
    np.testing.assert_allclose(np.asarray(y)[finite], by_running_average(x)[finite], rtol=2e-6)
    expected = stored(None)["params"]["scale"] / np.sqrt(VAR[2] + EPSILON)
    np.testing.assert_allclose(np.asarray(gradient)[finite], np.broadcast_to(expected, x.shape)[finite], rtol=1e-6)


def test_an_infinite_weight_is_no_weight_of_one_value():
    mask = np.float32([1, np.inf, 1, 0, 0, 0])
    assert_untouched(*train(BatchNorm(momentum=0.5), stored(None), X, mask=mask), X)


def test_a_mask_makes_sums_of_large_values_small():
    """The variance, 1e38, is within the range of float32; the sum of 40 such squares is not."""
    x = np.tile(np.float32([[1e19, 1e19], [-1e19, 3e19]]), (20, 1))
    _, _, new = train(BatchNorm(momentum=0.0), stored(None), x, mask=np.ones(40, bool))
    np.testing.assert_allclose(new["mean"], [0, 2e19], rtol=1e-6)
    np.testing.assert_allclose(new["var"], [1e38, 1e38], rtol=1e-6)


def test_apply_does_as_a_layer_that_trains():
    """One value that the mask leaves, and sums that overflow."""
    model = BatchNorm(use_running_average=True)
    for x, mask in ((X, np.arange(B) == 3), (OVERFLOWS["constant"], np.ones(2000, bool))):
        y = flaxbn.apply(model, stored(None), x, statistics="batch", call=lambda m, b, mask=mask: m(b, mask=mask))
        np.testing.assert_allclose(y, by_running_average(x), rtol=2e-6, atol=1e-6)
