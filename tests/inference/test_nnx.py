"""Models of flax.nnx as files: the same predictions, and errors in the words of nnx."""

import numpy as np
import pytest
from flax import nnx
from nnx_models import Chain, X

import flaxbn


def export(model, path, **options):
    flaxbn.export_inference(*nnx.split(model), X[:6], path, platforms=("cpu",), **options)


def test_a_model_is_exported_as_it_evaluates(tmp_path):
    model = Chain(nnx.Rngs(0))
    moments = flaxbn.population_moments(*nnx.split(model), X, batch_size=30)
    nnx.update(model, flaxbn.to_batch_stats(moments, nnx.state(model, nnx.BatchStat)))
    model.eval()
    export(model, tmp_path / "model.zip", moments=moments)
    found = flaxbn.load_inference(tmp_path / "model.zip")(X[:7])
    np.testing.assert_allclose(found, model(X[:7]), rtol=1e-6, atol=1e-6)


def test_training_mode_is_an_error_that_names_eval(tmp_path):
    model = Chain(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"BatchNorm 'blocks/0/norm' normalizes by the batch.*by `model.eval\(\)`"):
        export(model, tmp_path / "model.zip")
    model.set_attributes(nnx.BatchNorm, use_running_average=True)
    with pytest.raises(ValueError, match=r"Dropout 'dropout' drops values at random.*by `model.eval\(\)`"):
        export(model, tmp_path / "model.zip")
    frozen = Chain(nnx.Rngs(0), lambda d, rngs: flaxbn.nnx.BatchNorm(d, frozen=True, rngs=rngs))
    with pytest.raises(ValueError, match="Dropout 'dropout' drops"):
        export(frozen, tmp_path / "model.zip")


def test_statistics_that_were_never_estimated_or_are_not_those_of_the_moments(tmp_path):
    model = Chain(nnx.Rngs(0))
    model.eval()
    message = r"'blocks/0/norm', 'blocks/1/norm' were never estimated.*`nnx.update\(model, flaxbn.estimate_population"
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / "model.zip")
    moments = flaxbn.population_moments(*nnx.split(model), X, batch_size=30)
    with pytest.raises(ValueError, match=r"not in 'blocks/0/norm'.*`nnx.update\(model, flaxbn.to_batch_stats\(moments"):
        export(model, tmp_path / "model.zip", moments=moments)


class Masked(nnx.Module):
    """Adds to its logits what is no weight."""

    def __init__(self):
        self.linear = nnx.Linear(X.shape[1], 2, rngs=nnx.Rngs(0))
        self.mask = nnx.Variable(np.float32([[0, -np.inf]]))

    def __call__(self, x):
        return self.linear(x) + self.mask[...]


def test_weights_must_be_finite_and_other_variables_need_not_be(tmp_path):
    model = Masked()
    export(model, tmp_path / "model.zip")
    model.linear.kernel[...] = model.linear.kernel[...].at[0, 0].set(np.nan)
    with pytest.raises(ValueError, match=r"must be finite: 'params/linear/kernel' hold NaN"):
        export(model, tmp_path / "model.zip")
