"""Batches without a common axis of samples: graphs, scalars, keys, names."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import assert_same_statistics

import flaxbn

RNG = np.random.default_rng(0)


class Graphs(NamedTuple):
    """As jraph has them: several graphs end to end, the last one of padding."""

    nodes: np.ndarray
    edges: np.ndarray
    senders: np.ndarray
    receivers: np.ndarray
    n_node: np.ndarray


def graph(nodes, edges):
    ends = RNG.integers(0, nodes, (2, edges))
    return Graphs(RNG.normal(1.0, 2.0, (nodes, 3)), RNG.normal(size=(edges, 2)), *ends, np.array([nodes]))


def joined(graphs, nodes=None, edges=None):
    """One batch, padded to so many nodes and edges; padding talks to itself alone."""
    first = np.cumsum([0] + [len(g.nodes) for g in graphs])
    parts = [
        [g._replace(senders=g.senders + n, receivers=g.receivers + n)[i] for g, n in zip(graphs, first)]
        for i in range(5)
    ]
    found = Graphs(*map(np.concatenate, parts))
    more = [0 if n is None else n - len(a) for a, n in ((found.nodes, nodes), (found.edges, edges))]
    if not more[0]:
        return Graphs(*(np.float32(a) if a.dtype == float else np.int32(a) for a in found))
    rest = Graphs(
        np.full((more[0], 3), 1e3), np.full((more[1], 2), -1e3), *[np.full(more[1], first[-1])] * 2, np.array(more[:1])
    )
    return joined([found, rest._replace(senders=rest.senders - first[-1], receivers=rest.receivers - first[-1])])


class GraphNet(nn.Module):
    """Two rounds of messages, with normalization of nodes and of edges; the last graph is padding."""

    @nn.compact
    def __call__(self, g, train=False, padded=True):
        x, e, total = g.nodes, g.edges, len(g.nodes)
        present = total - (g.n_node[-1] if padded else 0)
        for _ in range(2):
            sent = nn.Dense(4)(jnp.concatenate([x[g.senders], e], 1))
            sent = self.norm(sent, g.receivers < present, train)
            x = nn.Dense(4)(jnp.concatenate([x, jax.ops.segment_sum(sent, g.receivers, total)], 1))
            x = self.norm(x, jnp.arange(total) < present, train)
        return x

    @nn.nowrap
    def norm(self, x, mask, train):
        return flaxbn.BatchNorm(use_running_average=not train, momentum=0.0)(x, mask=mask)


GRAPHS = [graph(*size) for size in ((5, 9), (3, 4), (7, 12), (4, 6), (6, 11), (5, 7))]
PADDED = [joined(GRAPHS[i : i + 2], 16, 24) for i in (0, 2, 4)]
MODEL = GraphNet()
VARIABLES = jax.jit(MODEL.init)(jax.random.key(0), PADDED[0])


def whole():
    """The statistics of all graphs as one batch, from training."""
    return MODEL.apply(VARIABLES, joined(GRAPHS), True, padded=False, mutable=["batch_stats"])[1]["batch_stats"]


def test_exact_statistics_of_padded_graphs_are_those_of_one_large_batch():
    with pytest.warns(UserWarning, match=r"could not be checked: .* no axis of samples .*`check_independence=False`"):
        found = flaxbn.estimate_population_stats(MODEL, VARIABLES, PADDED, method="exact")
    # A mean of some 30 values of float32, twice over.
    assert_same_statistics(found, whole(), 1e-6)
    quiet = flaxbn.estimate_population_stats(MODEL, VARIABLES, PADDED, method="exact", check_independence=False)
    jax.tree.map(np.testing.assert_array_equal, found, quiet)


def test_precise_statistics_of_padded_graphs():
    """Those of the first layer depend on no other; those of one batch are those of all layers."""
    found = flaxbn.estimate_population_stats(MODEL, VARIABLES, iter(PADDED))
    assert_same_statistics(found["BatchNorm_0"], whole()["BatchNorm_0"], 1e-6)
    one = flaxbn.estimate_population_stats(MODEL, VARIABLES, [joined(GRAPHS, 40, 64)])
    assert_same_statistics(one, whole(), 2e-6)


def test_a_plan_of_graphs():
    plan = flaxbn.plan(MODEL, VARIABLES, PADDED)
    assert (plan.batches, plan.samples) == (3, None)
    assert str(plan).startswith("exact statistics of 3 batches: 4 calls")


@pytest.mark.parametrize(
    "options",
    [{"num_samples": 3}, {"sample_weight": lambda g: g.nodes[:, 0]}, {"sharding": flaxbn.data_sharding()}],
    ids=["num_samples", "sample_weight", "sharding"],
)
@pytest.mark.parametrize("method", ["precise", "exact"])
def test_what_needs_an_axis_asks_for_it(options, method):
    message = r"common leading sample axis: got \(16, 3\), \(24, 2\), \(24,\), \(24,\), \(3,\)\. .*may hold anything"
    with pytest.raises(ValueError, match=message):
        flaxbn.estimate_population_stats(MODEL, VARIABLES, PADDED, method=method, **options)


# ---- leaves beside samples

X = RNG.normal(1.0, 2.0, (24, 3)).astype(np.float32)
EXTRAS = {
    "number": 0.5,
    "flag": True,
    "scalar": np.float32(0.5),
    "key": jax.random.key(0),
    "seven": np.ones(7, np.float32),
    "name": "site A",
    "names": ["a", "b"],
    "array of names": np.array(["a", "b"]),
    "objects": np.array(["a", 1], object),
    "anything": object(),
    "nothing": None,
}


class Scaled(nn.Module):
    """Data of one site are in another unit."""

    @nn.compact
    def __call__(self, batch, train=False):
        x = batch["x"] * (10.0 if batch["e"] == "site B" else 1.0)
        return nn.BatchNorm(use_running_average=not train, name="norm")(x)


@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("method", ["precise", "exact"])
@pytest.mark.filterwarnings("ignore:Whether examples affect each other could not be checked")
def test_leaves_beside_samples(extra, method):
    model = nn.BatchNorm(use_running_average=True)
    options = {"method": method, "call": lambda m, b: m(b["x"])}
    batches = [{"x": x, "e": extra} for x in (X[:8], X[8:])]
    found = flaxbn.estimate_population_stats(model, model.init(jax.random.key(0), X), batches, **options)
    expected = {"mean": X.astype(np.float64).mean(0), "var": X.astype(np.float64).var(0)}
    assert_same_statistics(found, expected)


@pytest.mark.parametrize("method", ["precise", "exact"])
def test_a_name_is_part_of_what_is_compiled(method):
    model = Scaled()
    batches = [{"x": x, "e": name} for x, name in ((X[:8], "site A"), (X[8:16], "site B"), (X[16:], "site A"))]
    variables = model.init(jax.random.key(0), batches[0])
    found = flaxbn.estimate_population_stats(model, variables, batches, method=method)
    values = np.concatenate([X[:8], 10 * X[8:16], X[16:]]).astype(np.float64)
    assert_same_statistics(found, {"norm": {"mean": values.mean(0), "var": values.var(0)}})
    applied = [flaxbn.apply(model, {**variables, "batch_stats": found}, batch) for batch in batches]
    expected = (values - values.mean(0)) / np.sqrt(values.var(0) + 1e-5)
    np.testing.assert_allclose(np.concatenate(applied), expected, rtol=1e-5, atol=1e-5)


def test_names_that_nobody_reads_compile_nothing(caplog):
    """Each is traced, since it might be read; the program is one."""
    model = nn.BatchNorm(use_running_average=True)
    variables = model.init(jax.random.key(0), X)
    traced = []

    def call(module, batch):
        traced.append(batch["file"])
        return module(batch["x"])

    def estimate(names):
        batches = [{"x": X, "file": name} for name in names]
        flaxbn.estimate_population_stats(model, variables, batches, call=call)

    estimate("ab")
    caplog.clear()
    with jax.log_compiles():
        estimate("cdef")
    assert set(traced) == set("abcdef")
    assert not [record for record in caplog.records if record.getMessage().startswith("Compiling")]
