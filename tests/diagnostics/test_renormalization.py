"""Traps of layers that renormalize: a ramp that never began, and noise that the bounds clip."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import DomainLayer, OneLayer

import flaxbn
from flaxbn.diagnostics import diagnose

SIZE, CHANNELS = 4, 200
X = np.random.default_rng(0).normal(1.0, 2.0, (256, CHANNELS)).astype(np.float32)
late = optax.linear_schedule(1.0, 3.0, 100, transition_begin=777)


def late_offset(steps):
    return late(steps) - 1


def findings(steps=None, **bounds):
    """Of a layer with the population's statistics, after so many updates; a layer of 0 has none of them stored."""
    model = OneLayer(functools.partial(flaxbn.BatchRenorm, **bounds))
    variables = model.init(jax.random.key(0), X)
    stored = {"mean": X.mean(0), "var": X.var(0)} | ({} if steps is None else {"steps": np.float32(steps)})
    variables = {**variables, "batch_stats": {"norm": stored}}
    found = diagnose(model, variables, X, lambda output, batch: jnp.zeros(len(batch)), batch_size=SIZE)
    return {finding.trap: finding for finding in found.findings}


@pytest.mark.parametrize(
    ("steps", "bounds", "opens"),
    [
        (300, {}, 5001),
        (5000, {}, 5001),
        (7, {"r_max": late, "d_max": late_offset}, 778),
        (7, {"r_max": lambda steps: 1.0, "d_max": lambda steps: 0.0 * steps}, np.inf),
        (300, {"r_max": flaxbn.paper_r_max, "d_max": 0.0}, 5001),
    ],
)
def test_a_ramp_that_never_began(steps, bounds, opens):
    (found,) = findings(steps, **bounds).values()
    assert (found.trap, found.where) == ("renormalization not begun", "norm")
    assert (found.number, found.threshold) == (steps, opens)
    assert f"after {steps} updates r_max is 1 and d_max 0" in found.evidence
    assert ("never" if opens == np.inf else f"from update {opens} on") in found.evidence
    assert "schedules that fit the length of the training" in found.cure


@pytest.mark.parametrize(
    ("steps", "bounds"),
    [(None, {}), (0, {}), (25_000, {}), (300, {"r_max": 3.0, "d_max": 5.0}), (300, {"r_max": late, "d_max": 5.0})],
)
def test_what_is_no_such_ramp(steps, bounds):
    assert "renormalization not begun" not in findings(steps, **bounds)


def left(r_max, d_max):
    """The share of noise that the bounds leave in the median channel, in float64, of 64 batches drawn at random."""
    wide = X.astype(np.float64)
    rows = np.random.default_rng(0).permutation(256).reshape(-1, SIZE)  # as the examples are shuffled
    mean, var = wide[rows].mean(1), wide[rows].var(1)
    ratio, shift = np.sqrt(var / wide.var(0)), (mean - wide.mean(0)) / wide.std(0)
    off = shift - np.clip(shift, -d_max, d_max)
    scale = (ratio / np.clip(ratio, 1 / r_max, r_max)) ** 2
    total = scale.mean(0) + (off**2).mean(0) - off.mean(0) ** 2  # of all that the batches put out
    squares = ((off - off.mean(0)) ** 2).sum(0) / 63 / total, ((scale - total) ** 2).sum(0) / 63 / total**2
    return np.median(squares[0] + squares[1] / 4)


@pytest.mark.parametrize(
    ("steps", "bounds", "clip"),
    [
        (1, {"r_max": 1.0, "d_max": 0.0}, (1.0, 0.0)),
        (1, {"r_max": 1.1, "d_max": 0.2}, (1.1, 0.2)),
        (6000, {}, (1 + 2 / 35, 0.25)),
    ],
)
def test_noise_that_the_bounds_clip(steps, bounds, clip):
    found = findings(steps, **bounds)["batches too small to renormalize"]
    np.testing.assert_allclose(found.number, left(*clip), rtol=1e-3)  # epsilon, and batches in float32
    assert found.number > found.threshold == 0.1
    assert f"with r_max {clip[0]:.3g} and d_max {clip[1]:.3g}, {found.number:.0%} of what this layer" in found.evidence


def test_bounds_that_clip_little():
    assert left(3.0, 5.0) < 0.1
    assert findings(1, r_max=3.0, d_max=5.0) == {}


def test_each_domain_has_a_ramp_of_its_own():
    class Layer(DomainLayer):
        def setup(self):
            self.norm = flaxbn.BatchRenorm(use_running_average=True, num_domains=self.count)

        def __call__(self, batch):
            return self.norm(batch["x"], domain=batch["domain"])

    x = np.tile(X[:, :8], (2, 1))
    data = {"x": x, "domain": np.arange(len(x)) // 16 % 2}
    variables = Layer(2).init(jax.random.key(0), data)
    stored = {"mean": np.tile(x.mean(0), (2, 1)), "var": np.tile(x.var(0), (2, 1)), "steps": np.float32([300, 30_000])}
    variables = {**variables, "batch_stats": {"norm": stored}}
    loss = {"loss_fn": lambda output, batch: jnp.zeros(len(output)), "domain": lambda batch: batch["domain"]}
    found = diagnose(Layer(2), variables, data, batch_size=16, **loss).findings
    assert [(one.trap, one.where, one.number) for one in found] == [("renormalization not begun", "norm[0]", 300)]
