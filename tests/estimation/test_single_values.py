"""A batch of which a layer sees one value: precise estimates name it, exact ones do not mind."""

import jax
import numpy as np
import pytest
from models import DomainLayer, MaskedLayer
from oracle import assert_same_statistics, one_oracle

import flaxbn

X = np.random.default_rng(0).normal(1.0, 2.0, (6, 2)).astype(np.float32)
WHOLE = np.ones(6, bool)
ONE = np.arange(6) == 3
MODEL = MaskedLayer()
VARIABLES = MODEL.init(jax.random.key(0), {"x": X, "mask": WHOLE})


def batch(mask):
    return {"x": X, "mask": mask}


def estimate(batches, **options):
    return flaxbn.estimate_population_stats(MODEL, VARIABLES, batches, **options)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.usefixtures("devices")
def test_the_error_names_batch_and_layer(sharded):
    """Eight devices pad each batch of six."""
    options = {"sharding": flaxbn.data_sharding()} if sharded else {}
    batches = [batch(WHOLE), batch(WHOLE), batch(ONE), batch(WHOLE)]
    with pytest.raises(ValueError, match=r"leave one to 'norm' in batch 2 \(counted from 0\), so its output"):
        estimate(batches, **options)
    assert_same_statistics(estimate([batch(WHOLE)] * 3, **options), one_oracle(X))


def test_weights_of_samples_leave_one():
    def weigh(b):
        return b["mask"] * 1e-30

    model = flaxbn.BatchNorm(use_running_average=True)
    variables = model.init(jax.random.key(0), X)
    call = {"call": lambda m, b: m(b["x"]), "sample_weight": weigh}
    with pytest.raises(ValueError, match=r"leave one to '\(the model itself\)' in batch 1 "):
        flaxbn.estimate_population_stats(model, variables, [batch(WHOLE), batch(ONE)], **call)


def test_arrays_and_domains():
    x, domain = np.tile(X, (2, 1)), np.array([0, 0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0])
    model = DomainLayer(2)
    variables = model.init(jax.random.key(0), {"x": x, "domain": domain})
    data = {"x": x, "domain": domain}
    with pytest.raises(ValueError, match=r"leave one to 'norm' in batch 1 "):
        flaxbn.estimate_population_stats(model, variables, data, batch_size=6)  # x[1::2] holds one value of domain 1
    found = flaxbn.estimate_population_stats(model, variables, data, batch_size=12)["norm"]
    for number in (0, 1):
        rows = x[domain == number].astype(np.float64)
        np.testing.assert_allclose(found["var"][number], rows.var(0), rtol=2e-6)  # some ten roundings


@pytest.mark.parametrize("bad", [batch(ONE), {"x": X + np.inf, "mask": WHOLE}], ids=["one value", "infinite"])
def test_it_is_found_after_the_first_chunk(bad):
    """Of a stream without an end: 256 batches are merged at once."""
    read = []

    def stream():
        while True:
            read.append(len(read))
            yield bad if len(read) == 5 else batch(WHOLE)

    with pytest.raises(ValueError, match=r"in batch 4 \(counted from 0\)"):
        estimate(stream())
    assert len(read) == 256


def test_exact_statistics_take_batches_of_one():
    batches = [{"x": X[i : i + 1], "mask": WHOLE[i : i + 1]} for i in range(6)]
    assert_same_statistics(estimate(batches, method="exact"), one_oracle(X))
    assert_same_statistics(estimate([batch(ONE), batch(~ONE)], method="exact"), one_oracle(X))


def test_a_population_of_one_value():
    """Of a domain, in all batches together."""
    model, data = DomainLayer(2), {"x": X, "domain": np.array([0, 0, 0, 1, 0, 0])}
    variables = model.init(jax.random.key(0), data)
    with pytest.raises(ValueError, match=r"'norm' has a channel that sees a single one in all data"):
        flaxbn.estimate_population_stats(model, variables, data, batch_size=2, method="exact")
    with pytest.raises(ValueError, match=r"'norm' has a channel that sees a single one in all data"):
        estimate([batch(ONE), batch(~WHOLE)], method="exact")


@pytest.mark.parametrize("weight", [np.inf, 3e38])
@pytest.mark.parametrize("method", ["precise", "exact"])
def test_weights_that_overflow(weight, method):
    """Of 3e38 each, two samples weigh more than float32 holds."""
    model = flaxbn.BatchNorm(use_running_average=True)
    variables = model.init(jax.random.key(0), X)
    call = {"call": lambda m, b: m(b["x"]), "sample_weight": lambda b: b["mask"] * np.float32(weight), "method": method}
    with pytest.raises(ValueError, match=r"must be finite: those of '\(the model itself\)' are not in batch 1 "):
        flaxbn.estimate_population_stats(model, variables, [batch(WHOLE * 1e-38), batch(WHOLE)], **call)


@pytest.mark.parametrize("method", ["precise", "exact"])
def test_values_that_overflow(method):
    x = np.full((2000, 2), 1e36, np.float32)
    model = flaxbn.BatchNorm(use_running_average=True)
    with pytest.raises(ValueError, match=r"must be finite: .* are not in batch 0 .* or overflows"):
        flaxbn.estimate_population_stats(model, model.init(jax.random.key(0), x), [x], method=method)
