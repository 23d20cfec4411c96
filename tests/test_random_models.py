"""A dozen random cases; and that the harness finds what is broken, and saves what runs it again."""

import warnings

import jax
import numpy as np
import pytest
import random_models
from fuzz.case import Case
from fuzz.checks import Apply, Estimate
from fuzz.data import Data
from fuzz.drawn import draw_case
from fuzz.nodes import Layer, Norm, Residual, Tied
from fuzz.reduce import reduced

import flaxbn

PARTS = 3
# Between them nearly all kinds of layers, data and checks, in some 15 seconds.
SEEDS = (3, 6, 8, 11, 13, 14, 21, 23, 25, 28, 38, 44)
NODES = (Layer("Dense", "3"), Norm(), Layer("Dense", "3"), Norm("flaxbn.BatchNorm"))
DATA = Data(0, 30, (3,), "float64", (10, 10, 10))


@pytest.mark.parametrize("seed", SEEDS)
def test_random_cases(seed):
    draw_case(seed, PARTS).run()


def without_the_variance_of_means(model, variables, batches, **options):
    """The mean of the batches' variances, as it is easily written."""
    found = [MOMENTS(model, variables, [batch], **options) for batch in batches]
    is_moments = {"is_leaf": lambda node: isinstance(node, flaxbn.Moments)}
    merged = flaxbn.merge(*found)
    means = jax.tree.map(lambda *m: np.mean([one.var for one in m], 0), *found, **is_moments)
    return jax.tree.map(lambda moments, var: moments._replace(var=var), merged, means, **is_moments)


def by_stored_statistics(model, variables, batch, **options):
    return APPLY(model, variables, batch, **options | {"statistics": "running"})


def without_a_warning(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MOMENTS(*args, **options)


def with_weights_of_one(*args, sample_weight=None, **options):
    return MOMENTS(*args, **options)


MOMENTS, APPLY = flaxbn.population_moments, flaxbn.apply
WEIGHTED = Data(0, 30, (3,), "float32", 10, "dict", weights="whole")
DEFECTS = {
    "a merge of another kind": (without_the_variance_of_means, Case(NODES, DATA, Estimate())),
    "statistics of another kind": (by_stored_statistics, Case(NODES, DATA, Apply())),
    "gradients of another kind": (by_stored_statistics, Case(NODES, DATA, Apply(how="gradient"))),
    "no warning": (without_a_warning, Case((Tied(Norm(), NODES[:1]),), DATA, Estimate())),
    "no weights": (with_weights_of_one, Case(NODES, WEIGHTED, Estimate("exact"))),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_found(defect, monkeypatch):
    function, case = DEFECTS[defect]
    case.run()
    name = "apply" if function is by_stored_statistics else "population_moments"
    monkeypatch.setattr(flaxbn, name, function)
    with pytest.raises(
        AssertionError, match="it must warn of" if defect == "no warning" else r"(norm_.*|output): off by"
    ):
        case.run()


def test_what_fails_is_saved_and_runs_again(tmp_path, monkeypatch, capsys):
    seed = next(seed for seed in range(99) if isinstance(draw_case(seed, 1).check, Apply))
    monkeypatch.setattr(flaxbn, "apply", by_stored_statistics)
    assert random_models.run([seed], 60, 1, tmp_path)[1] == [seed]
    assert f"seed {seed} FAILED: AssertionError" in capsys.readouterr().out
    script = (tmp_path / f"seed_{seed}.py").read_text()
    assert "class Net(nn.Module):" in script
    with pytest.raises(AssertionError, match="off by"):
        exec(script, {})
    monkeypatch.undo()
    exec(script, {})


def test_a_failed_case_is_cut_down(monkeypatch):
    monkeypatch.setattr(flaxbn, "apply", by_stored_statistics)
    case = Case((Layer("Dense", "3"), Residual((Layer("Dense", "3"), Norm()))), DATA, Apply(how="eager"))
    assert reduced(case).nodes == (Norm(),)


def test_a_case_is_told_from_its_seed_alone():
    assert draw_case(2) == draw_case(2) != draw_case(7)
