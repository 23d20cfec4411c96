"""A model that is a single layer has an empty path: people read a name, `only` and files keep the path."""

import io

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

import flaxbn
from flaxbn import diagnostics
from flaxbn.layers.names import layer_name

matplotlib.use("Agg")

X = np.random.default_rng(0).normal(3, 1, (64, 4)).astype(np.float32)
MODEL = nn.BatchNorm(use_running_average=True)
VARIABLES = MODEL.init(jax.random.key(0), X)
NAME = r"\(the model itself\)"


def test_names():
    assert layer_name(("block", "norm")) == "block/norm"
    assert layer_name(()) == "(the model itself)"


def test_reports():
    found = diagnostics.diagnose(MODEL, VARIABLES, X, lambda output, batch: output.sum(-1), batch_size=16)
    names = [found.drift[0].layer, found.noise[None][0].layer, found.findings[0].where]
    assert names == ["(the model itself)"] * 3
    out = io.StringIO()
    diagnostics.table(found, file=out)
    assert "\n(the model itself)" in out.getvalue()
    assert diagnostics.figure(found).axes[0].get_yticklabels()[0].get_text() == "(the model itself)"


def test_the_layers_of_renormalization_are_known_by_it():
    """Their batches are never too small."""
    model = flaxbn.BatchRenorm(use_running_average=True)
    found = diagnostics.diagnose(
        model, model.init(jax.random.key(0), X), X, lambda output, batch: output.sum(-1), batch_size=2
    )
    assert found.noise[None][0].typical_share > 0.1
    assert [finding.trap for finding in found.findings] == ["never estimated"]


def test_plan():
    assert "(the model itself)" in str(flaxbn.plan(MODEL, VARIABLES, X, batch_size=16))


@pytest.mark.parametrize(
    ("message", "broken"),
    [
        (f"those of '{NAME}' are not in batch 0", lambda: population(X * np.nan)),
        (f"BatchNorm '{NAME}' normalizes by batch statistics", lambda: population(X[:1])),
        (f"'{NAME}' has moments of shape", lambda: diagnostics.compare({"mean": jnp.zeros(3)}, population(X))),
        (f"`only` must accept .* none of '{NAME}'", lambda: population(X, only=lambda path: path != "")),
        (f"BatchNorm '{NAME}' updates", lambda: flaxbn.BatchNorm(use_running_average=False).apply(VARIABLES, X)),
        (f"those of '{NAME}' were never estimated", lambda: flaxbn.export_inference(MODEL, VARIABLES, X, "unwritten")),
    ],
)
def test_errors(message, broken):
    with pytest.raises(ValueError, match=message):
        broken()


def population(x, **options):
    return flaxbn.population_moments(MODEL, VARIABLES, x, batch_size=16, **options)


def test_paths_stay_paths():
    seen = []
    population(X, only=lambda path: seen.append(path) or True)
    assert set(seen) == {""}


class Named(nn.Module):
    """Layers named after their class, as they are where nobody names them."""

    norm: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train=False):
        for _ in range(2):
            x = self.norm(use_running_average=not train)(nn.Dense(4)(x))
        return x


def test_a_checkpoint_of_layers_that_nobody_named():
    """A subclass of their name loads it whole; a name, one layer. Evaluation is what it was."""

    class BatchNorm(flaxbn.BatchRenorm): ...

    x = X[:, :2]
    checkpoint = Named().init(jax.random.key(0), x)
    _, new = Named().apply(checkpoint, x, True, mutable=["batch_stats"])
    checkpoint = {**checkpoint, **new}
    model = Named(BatchNorm)
    np.testing.assert_allclose(model.apply(checkpoint, x), Named().apply(checkpoint, x), rtol=1e-6, atol=1e-6)
    _, new = model.apply(checkpoint, x, True, mutable=["batch_stats"])
    assert [layer["steps"] for layer in new["batch_stats"].values()] == [1, 1]
    one = flaxbn.BatchRenorm(use_running_average=True, name="BatchNorm_0")
    assert one.name == "BatchNorm_0"
