"""Batches whose examples are alike, against the design effect of cluster sampling, and against chance."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from models import DomainLayer

from flaxbn.diagnostics.batch_composition import alike_batches, small_batches
from flaxbn.diagnostics.diagnosis import diagnose
from flaxbn.diagnostics.evidence import Evidence
from flaxbn.diagnostics.noise import BatchNoise

RNG = np.random.default_rng(0)
MODEL = nn.BatchNorm(use_running_average=True)


def record(share, batches=64, layer="norm"):
    return BatchNoise(layer, 16, share**0.5, 0.0, 2, share, batches)


def composition(noise, shuffled, renormalized):
    """What the rules of this room find in noise alone."""
    evidence = Evidence(
        drift=(),
        never_estimated=(),
        domain_drift={},
        noise=noise,
        shuffled=shuffled,
        renormalized=frozenset(renormalized),
        losses={},
    )
    return [*alike_batches(evidence), *small_batches(evidence)]


def traps(given, shuffled, left_out=()):
    return [finding.trap for finding in composition({None: [given]}, {None: [shuffled]}, left_out)]


@pytest.mark.parametrize("correlation", [0.0, 0.1, 0.5])
def test_the_design_effect(correlation):
    """Of clusters of B values with the intraclass correlation r, means have 1 + (B - 1) r times the variance (Kish)."""
    size, channels = 32, 300
    own = RNG.normal(size=(64, size, channels)) * np.sqrt(1 - correlation)
    x = (own + RNG.normal(size=(64, 1, channels)) * np.sqrt(correlation)).reshape(-1, channels).astype(np.float32)
    variables = MODEL.init(jax.random.key(0), x)
    found = diagnose(MODEL, variables, x, lambda output, batch: output.sum(-1), batch_size=size)
    ratio = found.noise[None][0].mean ** 2 / found.shuffled[None][0].mean ** 2
    # Two variances of 64 values in 300 channels: sqrt(4 / 63 / 300), 1.5 %.
    np.testing.assert_allclose(ratio, 1 + (size - 1) * correlation, rtol=0.05)
    assert ("non-i.i.d. batches" in {finding.trap for finding in found.findings}) == (correlation > 0)


@pytest.mark.parametrize("batches", [2, 8, 16, 28, 64])
def test_chance(batches):
    """Of channels that stray all together, the worst case: variances of K normal values, drawn twice."""
    draws = RNG.chisquare(batches - 1, (2, 4000)) / (batches - 1) * 0.05
    found = sum("non-i.i.d. batches" in traps(record(a, batches), record(b, batches)) for a, b in draws.T)
    # Three standard errors, one side: 0.1 % for a normal logarithm, whose tails are heavier for few batches.
    assert found / 4000 < (0.05 if batches < 8 else 0.01)


def test_what_the_order_adds_must_matter():
    assert traps(record(0.04), record(0.01)) == ["non-i.i.d. batches"]
    assert traps(record(0.018), record(0.01)) == []
    assert traps(record(0.018, 10_000), record(0.01, 10_000)) == []
    assert traps(record(0.021, 10_000), record(0.01, 10_000)) == ["non-i.i.d. batches"]
    assert traps(record(0.0009), record(0.0)) == []
    assert traps(record(0.0011), record(0.0)) == ["non-i.i.d. batches"]


def test_too_small_is_what_shuffling_leaves():
    assert traps(record(0.5), record(0.09)) == ["non-i.i.d. batches"]
    assert traps(record(0.5), record(0.11)) == ["non-i.i.d. batches", "batches too small"]
    assert traps(record(0.09), record(0.11)) == []  # examples that are drawn to differ, by class say
    assert traps(record(0.15), record(0.11)) == ["batches too small"]


@pytest.mark.parametrize("batches", [2, 3])
def test_few_sorted_batches_are_not_passed_over(batches):
    """One class each: what shuffling leaves is small, and so few batches cannot show that it was the order."""
    x = np.concatenate([RNG.normal(4 * (k % 2), 1, (64, 4)) for k in range(batches)]).astype(np.float32)
    exact = {**MODEL.init(jax.random.key(0), x), "batch_stats": {"mean": x.mean(0), "var": x.var(0)}}
    (finding,) = diagnose(MODEL, exact, x, lambda output, batch: output.sum(-1), batch_size=64).findings
    assert finding.trap == "batches too small"
    assert finding.number > 0.5
    assert f"With {batches} batches that cannot be told from chance. Give more batches" in finding.evidence


def test_what_few_batches_leave_open():
    assert traps(record(0.11, 3), record(0.05, 3)) == ["batches too small"]
    assert traps(record(0.11, 3), record(0.06, 3)) == []
    assert traps(record(0.09, 3), record(0.01, 3)) == []


def test_the_evidence():
    (finding,) = composition({None: [record(0.32)]}, {None: [record(0.02)]}, ())
    assert (finding.where, finding.number) == ("norm", 0.32)
    np.testing.assert_allclose(finding.threshold, 0.02 * np.exp(6 / np.sqrt(63)))
    assert "32% of what this layer puts out is noise of its batches of 16" in finding.evidence
    assert "and 2% where the same examples are shuffled" in finding.evidence
    assert "worth 1 independent ones" in finding.evidence


@pytest.mark.parametrize(
    ("given", "shuffled", "said"),
    [
        (0.004, 0.0014, ("0.4% of", "0.14% where", "worth 5.6 independent")),
        (0.0011, 0.0, ("0.11% of", "0% where", "worth 1 independent")),
        (0.8, 0.01, ("80% of", "1% where", "worth 1 independent")),
        (1.9, 0.012, ("190% of", "1.2% where", "worth 1 independent")),
    ],
)
def test_small_shares_are_said_as_precisely_as_each_other(given, shuffled, said):
    (finding,) = composition({None: [record(given)]}, {None: [record(shuffled)]}, ())
    assert all(part in finding.evidence for part in said), finding.evidence


def test_layers_left_out():
    assert traps(record(0.5), record(0.2), ["norm"]) == []


@pytest.mark.parametrize("correlation", [0.0, 0.2])
def test_rows_of_domains_met_a_batch_each(correlation):
    """Of 64 batches of one of four domains each; shuffled, each batch has a quarter as many of a domain."""
    domain = np.repeat(np.arange(64) % 4, 32)
    own = RNG.normal(size=(64, 32, 100)) * np.sqrt(1 - correlation)
    x = (own + RNG.normal(size=(64, 1, 100)) * np.sqrt(correlation)).reshape(-1, 100).astype(np.float32)
    batch = {"x": x, "domain": domain}
    exact = {"norm": {f: np.stack([getattr(x[domain == d], f)(0) for d in range(4)]) for f in ("mean", "var")}}
    variables = {**DomainLayer(4).init(jax.random.key(0), batch), "batch_stats": exact}
    found = diagnose(DomainLayer(4), variables, batch, lambda output, _: output.sum(-1), batch_size=32)
    assert {record.batches for record in found.noise[None]} == {16}
    assert {record.batches for record in found.shuffled[None]} == {64}
    traps = [finding.trap for finding in found.findings]
    assert traps == (["non-i.i.d. batches"] if correlation else []), str(found)


def test_records_of_unequal_numbers_of_batches():
    assert traps(record(0.32, 16), record(0.09, 64)) == ["non-i.i.d. batches"]
    assert traps(record(0.18, 16), record(0.36, 64)) == []
    assert traps(record(0.18, 64), record(0.36, 16)) == ["batches too small"]


def test_domains_are_compared_with_themselves():
    noise = {"a": [record(0.05, layer="norm")], "b": [record(0.01, layer="norm")]}
    assert composition(noise, noise, ()) == []
    (finding,) = composition(noise, {"a": [record(0.01)], "b": [record(0.01)]}, ())
    assert finding.number == 0.05
