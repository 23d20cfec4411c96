"""The experiment on batch sizes: a small run end to end, and the options that it refuses."""

import importlib
import json
import math
import pathlib
import sys

import pytest
from rich.console import Console

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

batch_size_results, batch_sizes = map(importlib.import_module, ("batch_size_results", "batch_sizes"))

SIZES = ["2", "all"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("batch_sizes") / "run"
    config = batch_sizes.Config(epochs=1, seeds=1, estimation_sizes=(2,), out=out)
    batch_sizes.main(config, Console(quiet=True))
    return out


def test_every_number_is_finite(out):
    methods = json.loads((out / "results.json").read_text())["methods"]
    for tree in (methods, methods["seed_spread"]):
        outcomes = [tree["reference"], *(tree[method][size] for method in batch_sizes.METHODS for size in SIZES)]
        for outcome in outcomes:
            assert outcome.keys() == batch_size_results.MEASURES.keys()
            assert all(map(math.isfinite, outcome.values()))


def test_only_exact_does_not_depend_on_the_batch_size(out):
    methods = json.loads((out / "results.json").read_text())["methods"]
    ratio = {method: [methods[method][size]["variance_ratio"] for size in SIZES] for method in batch_sizes.METHODS}
    assert ratio["exact"] == pytest.approx([1, 1], abs=1e-4)
    for method in ("running", "precise"):
        small, whole = ratio[method]
        assert small < 0.95
        assert whole == pytest.approx(1, abs=1e-3)


def test_table_and_figure(out):
    head, _, *rows = (out / "table.md").read_text().splitlines()
    assert head.split(" | ")[1:] == ["statistics", "2", "all |"]
    assert len(rows) == len(batch_size_results.MEASURES) * len(batch_sizes.METHODS)
    assert (out / "batch_sizes.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimation_sizes": (1, 2)}, r"--estimation-sizes must ascend, from 2: got \(1, 2\)"),
        ({"estimation_sizes": (4, 2)}, "--estimation-sizes must ascend"),
        ({"examples": 1}, "--examples must be at least 2: got 1"),
        ({"momentum": 1.0}, r"--momentum must be between 0 and 1: got 1\.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        batch_sizes.Config(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 1153}, "--batch-size must be at most 1152, .* digits .*: got 1153"),
        ({"estimation_sizes": (2, 1152)}, r"--estimation-sizes must be at most 1151, .*: got \(2, 1152\)"),
        ({"estimation_sizes": (31, 41)}, "--estimation-sizes must have a common multiple of at most 1249, .* is 1271"),
        ({"examples": 100, "estimation_sizes": (2, 128)}, r"at most 100, .*: that of \(2, 128\) is 128\..* more --ex"),
        ({"examples": 1250}, "--examples must be at most 1249, .*: got 1250"),
    ],
)
def test_options_that_the_data_are_too_few_for(options, message):
    with pytest.raises(ValueError, match=message):
        batch_sizes.load(batch_sizes.Config(**options))


def test_as_many_examples_as_make_every_batch_full():
    given = batch_sizes.load(batch_sizes.Config(estimation_sizes=(2, 64), examples=200))
    assert given.examples == 192
