"""Traps of stored statistics, from evidence made by hand: which rule speaks, of which layer, and which keeps silent."""

import pytest

from flaxbn.diagnostics.drift import Channels, Drift
from flaxbn.diagnostics.evidence import Evidence
from flaxbn.diagnostics.noise import BatchNoise
from flaxbn.diagnostics.stored_statistics import lagging_average, mixed_domains, never_estimated


def drift(layer, shift, error=1e-3):
    """The mean is off by `shift` standard deviations in every channel, and `share` is its square."""
    everywhere, nowhere = Channels(shift, shift, shift), Channels(0.0, 0.0, 0.0)
    return Drift(layer, 4, 0, 1e4, everywhere, nowhere, shift, 0.0, error, error)


def noise(layer, share):
    return BatchNoise(layer, 16, share**0.5, 0.0, 2, share, 64)


def evidence(stored, *, batches=None, by_domain=None, initial=()):
    batches = {None: [noise(record.layer, 0.01) for record in stored]} if batches is None else batches
    return Evidence(
        drift=tuple(stored),
        never_estimated=tuple(initial),
        domain_drift=by_domain or {},
        noise=batches,
        shuffled=batches,
        renormalized=frozenset(),
        losses={},
    )


@pytest.mark.parametrize(
    ("shift", "error", "batch", "far"),
    [
        (0.2, 1e-3, 0.01, True),
        (0.09, 1e-3, 0.01, False),  # a batch changes more
        (0.2, 0.1, 0.01, False),  # within three standard errors
        (0.04, 1e-3, 0.0, True),
        (0.03, 1e-3, 0.0, False),  # 0.0009 of the variance: harmless
        (float("nan"), 1e-3, 0.01, True),
    ],
)
def test_far_is_more_than_noise_error_and_a_thousandth(shift, error, batch, far):
    found = lagging_average(evidence([drift("norm", shift, error)], batches={None: [noise("norm", batch)]}))
    assert [finding.trap for finding in found] == ["lagging average"] * far


def test_the_layer_that_exceeds_its_own_noise_most():
    batches = {None: [noise("loud", 0.1), noise("quiet", 0.001)]}
    (finding,) = lagging_average(evidence([drift("loud", 0.5), drift("quiet", 0.2)], batches=batches))
    assert (finding.where, finding.threshold) == ("quiet", 0.001)
    assert finding.number == pytest.approx(0.04)
    assert "changing to the statistics of the data would change what this layer puts out by 4%" in finding.evidence
    assert "noise of the batch explains 0.1%. 2 of 2 layers are far off." in finding.evidence
    assert "flaxbn.estimate_population_stats" in finding.cure


def test_layers_never_estimated_do_not_lag():
    known = evidence([drift("first", 0.5), drift("second[0]", 0.5)], initial=["first", "second[0]"])
    assert lagging_average(known) == []
    (finding,) = never_estimated(known)
    assert (finding.trap, finding.where, finding.number) == ("never estimated", "first", 2)
    assert finding.evidence.endswith("in 2 of 2 rows of statistics.")
    assert never_estimated(evidence([drift("first", 0.5)])) == []


def test_mixed_domains_take_the_place_of_a_lagging_average():
    batches = {label: [noise("norm", 0.01)] for label in ("a", "b")}
    stored, near = [drift("norm", 0.5)], {"a": (drift("norm", 0.05),), "b": (drift("norm", 0.05),)}
    assert mixed_domains(evidence(stored, batches=batches, by_domain=near)) == []
    assert len(lagging_average(evidence(stored, batches=batches, by_domain=near))) == 1
    far = {"a": (drift("norm", 0.4),), "b": (drift("norm", 0.6),)}
    (finding,) = mixed_domains(evidence(stored, batches=batches, by_domain=far))
    assert (finding.trap, finding.where) == ("mixed domains", "norm, domain b")
    assert lagging_average(evidence(stored, batches=batches, by_domain=far)) == []
