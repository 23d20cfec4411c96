"""The table and the figure of a diagnosis, as a person gets them."""

import builtins
import io
from html import escape

import flax.linen as nn
import jax
import matplotlib
import numpy as np
import pytest
from flax import nnx
from models import MLP

import flaxbn
from flaxbn import diagnostics

matplotlib.use("Agg")


X = np.random.default_rng(0).normal(3, 1, (256, 4)).astype(np.float32)
NET = MLP()


@pytest.fixture(scope="module")
def found():
    variables = jax.jit(NET.init)(jax.random.key(0), X[:2])
    batch_stats = flaxbn.estimate_population_stats(NET, variables, X + 1, batch_size=32)
    variables = {**variables, "batch_stats": batch_stats}
    return diagnostics.diagnose(NET, variables, X, lambda output, batch: output.sum(-1), batch_size=32)


def printed(found):
    out = io.StringIO()
    diagnostics.table(found, file=out)
    return out.getvalue()


def test_plain_text_where_there_is_no_terminal(found):
    text = printed(found)
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "dead", "mean", "worst", "batch", "log", "var", "worst", "batch"]
    assert text.isprintable() or "\x1b" not in text
    for line, record in zip(lines[1:3], found.drift):
        layer, dead, mean, worst, batch, *_ = line.split()
        assert (layer, dead) == (record.layer, f"0/{record.channels}")
        assert mean == f"{record.rms_shift:.2g}\u00b1{record.shift_error:.1g}" + "*" * record.is_significant
        assert float(worst) == float(f"{record.shift.worst:.2g}")
        assert float(batch) == float(f"{found.noise[None][found.drift.index(record)].mean:.2g}")
    assert "lagging average: BatchNorm_0" in text
    assert "Stored statistics instead of the batch's add" in text
    assert max(map(len, lines[:3])) <= 80


def test_records_without_a_diagnosis(found):
    lines = printed(found.drift).splitlines()
    assert len(lines) == 3
    assert lines[1].split()[-1] == "-"


def test_a_drift_within_its_error_is_not_marked(found):
    quiet = diagnostics.Drift(
        "norm", 4, 1, 100.0, *[diagnostics.Channels(0.01, 0.02, 0.03)] * 2, 0.01, 0.01, 0.01, 0.001
    )
    assert printed([quiet]).splitlines()[1].split()[:3] == ["norm", "1/4", "0.01\u00b10.01"]
    assert "0.01\u00b10.001*" in printed([quiet])


def test_the_figure_shows_every_layer(found, tmp_path):
    figure = diagnostics.figure(found)
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["BatchNorm_0", "BatchNorm_1"]
    for panel, field, noise in ((left, "rms_shift", "mean"), (right, "rms_log_ratio", "var")):
        marks, batches = panel.lines
        np.testing.assert_allclose(marks.get_xdata(), [max(getattr(record, field), 1e-6) for record in found.drift])
        np.testing.assert_allclose(batches.get_xdata(), [getattr(record, noise) for record in found.noise[None]])
        assert panel.get_xscale() == "log"
    figure.savefig(tmp_path / "drift.png")
    assert (tmp_path / "drift.png").stat().st_size > 1000
    assert len(diagnostics.figure(found.drift).axes[0].lines) == 1


def test_notebooks_show_findings_and_all_layers(found):
    html = found._repr_html_()
    assert "<b>lagging average: BatchNorm_0</b>" in html
    assert f"<pre>{escape(found.findings[0].code)}</pre>" in html
    assert [cell in html for cell in ('<td style="text-align: left">BatchNorm_1</td>', ">batch</th>")] == [True, True]
    assert "Nothing is wrong" in diagnostics.Diagnosis(findings=())._repr_html_()


def test_records_are_a_tuple_that_prints_as_a_table(found):
    assert isinstance(found.drift, tuple)
    assert found.drift == (*found.drift,)
    head, first, _ = str(found.drift).splitlines()
    assert head.split() == ["layer", "dead", "mean", "worst", "log", "var", "worst"]
    record = found.drift[0]
    mean = f"{record.rms_shift:.2g}\u00b1{record.shift_error:.1g}*"
    assert first.split()[:4] == ["BatchNorm_0", f"0/{record.channels}", mean, f"{record.shift.worst:.2g}"]
    assert f'<td style="text-align: right">{mean}</td>' in found.drift._repr_html_()


def test_the_line_of_code_is_in_the_words_of_the_user():
    x = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    options = {"loss_fn": lambda output, batch: output.sum(-1), "batch_size": 32}
    (finding,) = diagnostics.diagnose(*nnx.split(x), X, **options).findings
    estimate = "flaxbn.estimate_population_stats(*nnx.split(model), data, batch_size=32)"
    assert str(finding).splitlines()[2] == f"    nnx.update(model, {estimate})"
    variables = {"batch_stats": {"mean": np.zeros(4), "var": np.ones(4)}, "params": {}}
    norm = nn.BatchNorm(use_running_average=True, use_scale=False, use_bias=False)
    batches = [*X.reshape(8, 32, 4)]  # which have their size
    (finding,) = diagnostics.diagnose(norm, variables, batches, options["loss_fn"], call=lambda m, b: m(b)).findings
    estimate = "flaxbn.estimate_population_stats(model, variables, data, call=call)"
    assert finding.code == f'variables["batch_stats"] = {estimate}'


@pytest.mark.parametrize(("package", "report"), [("rich", diagnostics.table), ("matplotlib", diagnostics.figure)])
def test_packages_that_are_missing(found, package, report, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **options):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=f"need the package {package}, which is not installed: pip install"):
        report(found)
