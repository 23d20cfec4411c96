"""Domains as named collections, for models that know nothing of domains."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from models import DomainLayer, OneLayer
from oracle import assert_same_statistics, merged

import flaxbn
from flaxbn import domains

RNG = np.random.default_rng(0)
DATA = {
    "clean": RNG.normal(0.0, 1.0, (50, 3)).astype(np.float32),
    "noisy": RNG.normal(2.0, 3.0, (30, 3)).astype(np.float32),
}


NET = OneLayer(momentum=0.5)
VARIABLES = NET.init(jax.random.key(0), DATA["clean"])
STATS = domains.replicate(VARIABLES["batch_stats"], DATA)


def moments_of(x):
    return {"norm": {"mean": x.astype(np.float64).mean(0), "var": x.astype(np.float64).var(0)}}


def test_training_one_domain_leaves_the_other():
    selected = domains.select(VARIABLES, STATS, "noisy")
    _, new = NET.apply(selected, DATA["noisy"], train=True, mutable=["batch_stats"])
    stats = {**STATS, "noisy": new["batch_stats"]}
    exact = moments_of(DATA["noisy"])["norm"]
    np.testing.assert_allclose(stats["noisy"]["norm"]["mean"], 0.5 * exact["mean"], rtol=1e-5)
    np.testing.assert_allclose(stats["noisy"]["norm"]["var"], 0.5 + 0.5 * exact["var"], rtol=1e-5)
    chex.assert_trees_all_equal(stats["clean"], VARIABLES["batch_stats"])
    assert domains.select(VARIABLES, stats, "clean")["params"] is VARIABLES["params"]


def test_each_domain_is_estimated_from_its_own_data():
    found = domains.estimate(NET, VARIABLES, DATA, batch_size=8)
    for name, x in DATA.items():
        assert_same_statistics(found[name], moments_of(x))


def test_a_domain_added_later():
    stats = {**STATS, **domains.estimate(NET, VARIABLES, {"new": DATA["noisy"] + 1}, batch_size=8)}
    assert_same_statistics(stats["new"], moments_of(DATA["noisy"] + 1))
    copied = {**stats, **domains.replicate(stats["new"], ["copy"])}
    chex.assert_trees_all_equal(copied["copy"], stats["new"])


def test_pooled_moments_are_those_of_all_data():
    moments = {name: flaxbn.population_moments(NET, VARIABLES, x, batch_size=8) for name, x in DATA.items()}
    found = flaxbn.to_batch_stats(domains.pool(moments), VARIABLES["batch_stats"])
    assert_same_statistics(found, moments_of(np.concatenate(list(DATA.values()))))
    parts = [moments_of(x)["norm"] for x in DATA.values()]
    mean, var = merged([50, 30], [p["mean"] for p in parts], [p["var"] for p in parts])
    assert_same_statistics(found["norm"], {"mean": mean, "var": var})


def test_a_plain_model_becomes_a_model_with_domains_and_back():
    stats = domains.estimate(NET, VARIABLES, DATA, batch_size=8)
    stacked, model = domains.stack(stats, ["noisy", "clean"]), DomainLayer(2)
    variables = {**VARIABLES, "batch_stats": stacked}
    chex.assert_trees_all_equal_shapes_and_dtypes(
        stacked, model.init(jax.random.key(0), {"x": DATA["clean"], "domain": 0})["batch_stats"]
    )
    for number, name in enumerate(["noisy", "clean"]):
        plain = NET.apply(domains.select(VARIABLES, stats, name), DATA["clean"])
        np.testing.assert_allclose(
            model.apply(variables, {"x": DATA["clean"], "domain": number}), plain, rtol=1e-5, atol=1e-6
        )
    chex.assert_trees_all_equal(domains.unstack(stacked, ["noisy", "clean"]), stats)


def test_the_axis_of_domains_may_come_after_that_of_a_scan():
    stats = {name: {"norm": {"mean": jnp.full((5, 3), i)}} for i, name in enumerate("ab")}
    stacked = domains.stack(stats, ["b", "a"], axis=1)
    assert stacked["norm"]["mean"].shape == (5, 2, 3)
    chex.assert_trees_all_equal(domains.unstack(stacked, ["b", "a"], axis=1), stats)


def test_checkpoints_keep_domains(tmp_path):
    stats = domains.estimate(NET, VARIABLES, DATA, batch_size=8)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path.absolute() / "stats", stats)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path.absolute() / "stats", jax.tree.map(jnp.zeros_like, stats))
    chex.assert_trees_all_equal(restored, stats)


@pytest.mark.parametrize(
    ("error", "message", "act"),
    [
        (KeyError, r"got 'usps'. Known are \['clean', 'noisy'\]", lambda: domains.select(VARIABLES, STATS, "usps")),
        (KeyError, r"got 'usps'. Known are", lambda: domains.stack(STATS, ["clean", "usps"])),
        (TypeError, r"must be strings.*got 0", lambda: domains.replicate(STATS["clean"], [0, 1])),
        (TypeError, r"must be strings.*got 3", lambda: domains.estimate(NET, VARIABLES, {3: DATA["clean"]})),
        (ValueError, r"each once: got \['a', 'a'\]", lambda: domains.replicate(STATS["clean"], ["a", "a"])),
        (ValueError, r"each once: got \[\]", lambda: domains.estimate(NET, VARIABLES, {})),
        (ValueError, r"2 domains along axis 0.*length \[3\]", lambda: domains.unstack(STATS["clean"], ["a", "b"])),
    ],
)
def test_errors(error, message, act):
    with pytest.raises(error, match=message):
        act()


class Scaled(nn.Module):
    """A scale and a bias for each domain, stacked ones of a scan, and others of their kind."""

    @nn.compact
    def __call__(self, x, domain):
        norm = flaxbn.BatchNorm(use_running_average=True, num_domains=2, domain_affine=True, name="norm")
        x = norm(nn.Dense(4, name="dense")(x), domain=domain)
        axes = {"params": 0, "batch_stats": 0}
        layers = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=3)
        return nn.DenseGeneral((2, 2), name="heads")(layers(name="scan")(x, None)[0])


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = flaxbn.BatchNorm(use_running_average=True, name="norm")(nn.Dense(4, name="dense")(x))
        return nn.LayerNorm(name="layer")(x), None


def test_weight_decay_is_for_kernels():
    """A hundred steps of AdamW without a gradient: each takes `learning rate * decay`, and by default of all."""
    x, domain = DATA["clean"][:4], np.array([0, 1, 1, 0])
    params = jax.jit(Scaled().init)(jax.random.key(0), x, domain)["params"]
    mask = flaxbn.weight_decay_mask(params)
    kernel, others = {"kernel": True, "bias": False}, {"scale": False, "bias": False}
    assert mask == {
        "dense": kernel,
        "norm": others,
        "scan": {"dense": kernel, "norm": others, "layer": others},
        "heads": kernel,
    }

    def after(**options):
        optimizer = optax.adamw(1e-2, weight_decay=0.1, **options)
        state = (params, optimizer.init(params))

        def step(state, _):
            updates, inner = optimizer.update(jax.tree.map(jnp.zeros_like, params), state[1], state[0])
            return (optax.apply_updates(state[0], updates), inner), None

        return jax.lax.scan(step, state, None, length=100)[0][0]

    kept = 0.999**100
    for options in ({"mask": mask}, {"mask": flaxbn.weight_decay_mask}):
        expected = jax.tree.map(lambda a, decayed: a * kept if decayed else a, params, mask)
        chex.assert_trees_all_close(after(**options), expected, rtol=1e-5)  # a hundred roundings
    np.testing.assert_allclose(after()["norm"]["scale"], kept, rtol=1e-5)
