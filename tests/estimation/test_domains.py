"""Population statistics of layers with a set for each domain, in a batch of one or of several domains."""

import functools

import chex
import flax.linen as nn
import jax
import numpy as np
import pytest

import flaxbn

D, B = 3, 12
DOMAIN = np.array([0, 2, 2, 0, 2, 0, 0, 2, 0, 2, 2, 0])  # domain 1 is absent
X = (np.random.default_rng(0).normal(size=(B, 3, 2, 4)) * 2 + DOMAIN[:, None, None, None]).astype(np.float32)
LAYERS = {"batch": flaxbn.BatchNorm, "renorm": functools.partial(flaxbn.BatchRenorm, r_max=1.3, d_max=0.4)}


class DomainMLP(nn.Module):
    """Two layers; the domain is part of the batch."""

    kind: str = "batch"

    @nn.compact
    def __call__(self, batch, train=False):
        x = batch["x"]
        for i in range(2):
            x = nn.Dense(4, name=f"dense_{i}")(x)
            layer = LAYERS[self.kind](num_domains=D, use_running_average=not train, name=f"norm_{i}")
            x = nn.tanh(layer(x, domain=batch["d"]))
        return x


def oracle(variables, batches):
    """Each layer's moments by domain in float64, with each domain normalized by its own part of the batch."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    values = {f"norm_{i}": {d: [] for d in range(D)} for i in range(2)}
    for batch in batches:
        x = batch["x"].astype(np.float64)
        for i in range(2):
            x = x @ p[f"dense_{i}"]["kernel"] + p[f"dense_{i}"]["bias"]
            y = np.zeros_like(x)
            for d in np.unique(batch["d"]):
                part = x[batch["d"] == d]
                values[f"norm_{i}"][d].append(part.reshape(-1, 4))
                y[batch["d"] == d] = (part - part.mean((0, 1, 2))) / np.sqrt(part.var((0, 1, 2)) + 1e-5)
            x = np.tanh(y)
    return values


BATCHES = [{"x": X[:7], "d": DOMAIN[:7]}, {"x": X[7:], "d": np.where(DOMAIN[7:] == 0, 1, 2)}]


@pytest.mark.parametrize("kind", LAYERS)
def test_population_statistics_of_each_domain(kind):
    model = DomainMLP(kind)
    variables = model.init(jax.random.key(0), BATCHES[0])
    found = flaxbn.estimate_population_stats(model, variables, BATCHES)
    for name, domains in oracle(variables, BATCHES).items():
        for d, parts in domains.items():
            x = np.concatenate(parts)
            np.testing.assert_allclose(found[name]["mean"][d], x.mean(0), atol=2e-6 * x.std())
            np.testing.assert_allclose(found[name]["var"][d], x.var(0), rtol=2e-6)


def test_a_domain_without_data_is_an_error_or_kept():
    model = DomainMLP()
    variables = model.init(jax.random.key(0), BATCHES[0])
    variables["batch_stats"] = jax.tree.map(lambda a: a + 3, variables["batch_stats"])
    with pytest.raises(ValueError, match=r"'norm_0' \(at \[1\]\), 'norm_1' \(at \[1\]\) saw none.*keep_unseen"):
        flaxbn.estimate_population_stats(model, variables, BATCHES[:1])
    found = flaxbn.estimate_population_stats(model, variables, BATCHES[:1], keep_unseen=True)
    x = oracle(variables, BATCHES[:1])["norm_0"][2][0]
    np.testing.assert_allclose(found["norm_0"]["var"][2], x.var(0), rtol=2e-6)
    chex.assert_trees_all_equal(*(jax.tree.map(lambda a: a[1], t) for t in (found, variables["batch_stats"])))


def test_weights_and_domains_together():
    model = DomainMLP()
    variables = model.init(jax.random.key(0), BATCHES[0])
    weights = np.random.default_rng(5).integers(0, 3, 7)
    repeated = {k: np.repeat(v, weights, axis=0) for k, v in BATCHES[0].items()}
    found = flaxbn.estimate_population_stats(
        model, variables, [{**BATCHES[0], "w": weights}], sample_weight=lambda b: b["w"], keep_unseen=True
    )
    for name, domains in oracle(variables, [repeated]).items():
        for d in (0, 2):
            np.testing.assert_allclose(found[name]["var"][d], domains[d][0].var(0), rtol=2e-6)


@pytest.mark.parametrize("own", [False, True])
def test_lanes_of_vmap(own):
    class DomainLanes(nn.Module):
        @nn.compact
        def __call__(self, batch, train=False):
            axes = {"params": None, "batch_stats": 0 if own else None}
            lanes = nn.vmap(
                DomainMLP, in_axes=({"x": 1, "d": None},), out_axes=1, variable_axes=axes, split_rngs={"params": False}
            )
            return lanes(name="net")(batch)

    model = DomainLanes()
    variables = model.init(jax.random.key(0), BATCHES[0])
    found = flaxbn.estimate_population_stats(model, variables, BATCHES)["net"]["norm_0"]
    p = variables["params"]["net"]["dense_0"]
    for d in range(D):
        x = np.concatenate([b["x"][b["d"] == d] for b in BATCHES]).astype(np.float64)
        x = x @ np.asarray(p["kernel"], np.float64) + np.asarray(p["bias"], np.float64)
        axes = (0, 2) if own else (0, 1, 2)
        row = found["var"][:, d] if own else found["var"][d]
        np.testing.assert_allclose(row, x.var(axes), rtol=2e-6)


def test_apply_with_batch_statistics():
    model = DomainMLP()
    variables = model.init(jax.random.key(0), BATCHES[0])
    found = flaxbn.apply(model, variables, BATCHES[0], statistics="batch")
    expected, _ = model.apply(variables, BATCHES[0], train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


class ChannelsFirst(nn.Module):
    """The leading axis is of channels: one domain for the whole batch."""

    @nn.compact
    def __call__(self, batch, train=False):
        layer = flaxbn.BatchNorm(use_running_average=not train, num_domains=2, axis=0, name="norm")
        return layer(batch["x"].T, domain=batch["d"])


@pytest.mark.parametrize("d", [0, 1])
def test_one_domain_with_channels_first(d):
    model, batch = ChannelsFirst(), {"x": X[:, 0, 0] * np.arange(1, 5), "d": d}
    variables = model.init(jax.random.key(0), batch)

    def call(module, x):
        return module({"x": x, "d": d})

    found = flaxbn.estimate_population_stats(model, variables, [batch["x"]], call=call, keep_unseen=True)["norm"]
    np.testing.assert_allclose(found["var"][d], batch["x"].astype(np.float64).var(0), rtol=2e-6)
    np.testing.assert_array_equal(found["var"][1 - d], np.ones(4))
