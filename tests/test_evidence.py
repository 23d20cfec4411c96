"""The page of evidence says what the results say, and judges by its rules."""

import pathlib
import sys

import numpy as np
import pytest

sys.path.append(str(pathlib.Path(__file__).parents[1] / "notebooks"))

import answers
import claims
import evidence


def test_the_page_is_that_of_the_results():
    assert evidence.PAGE.read_text() == evidence.page(evidence.read_results()), "run: python notebooks/evidence.py"


def test_every_claim_is_of_a_notebook():
    assert {claim.notebook for claim in claims.CLAIMS} == {*evidence.NOTEBOOKS}


@pytest.mark.parametrize(
    ("gain", "reported", "verdict"),
    [
        ([4, 5, 6], None, answers.HOLDS),
        ([4, 5, 6], 8, answers.HOLDS),
        ([4, 5, 6], 12, answers.WEAKER),
        ([4, 5, 6], 24, answers.FAILS),
        ([0, 1, 2], None, answers.WEAKER),
        ([-3, 1, 3], None, answers.FAILS),
        ([-4, -5, -6], None, answers.FAILS),
        ([np.nan, 1, 2], None, answers.FAILS),
    ],
)
def test_an_effect(gain, reported, verdict):
    assert answers.effect(gain, "words", reported) == ("words", verdict)


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [
        ([-0.2, 0.1, 0.3], answers.HOLDS),
        ([0.3, 0.31, 0.32], answers.WEAKER),
        ([-2, 1, 4], answers.WEAKER),
        ([2.5, 5.5, 8.5], answers.FAILS),
        ([2, 2.1, 2.2], answers.FAILS),
        ([-2, -2.1, -2.2], answers.FAILS),
    ],
)
def test_that_nothing_changes(difference, verdict):
    assert answers.no_effect(difference, "words") == ("words", verdict)


@pytest.mark.parametrize(
    ("other", "as_good", "same"),
    [
        ([70.0, 71.0], answers.HOLDS, answers.HOLDS),
        ([75.0, 76.1], answers.HOLDS, answers.FAILS),
        ([65.0, 66.1], answers.FAILS, answers.FAILS),
    ],
)
def test_what_is_better_is_as_good_but_not_the_same(other, as_good, same):
    found = {"test": {"a": {"running": {"one": [70.0, 71.0]}}, "b": {"running": {"one": other}}}}
    cells = ("a", "running"), ("b", "running")
    assert answers.as_good(*cells)(found).verdict == as_good
    assert answers.same_cell(*cells)(found).verdict == same


def test_figures_are_means_and_deviations_over_the_seeds():
    assert answers.change([10.0, 12.0], [11.0, 15.0]) == "11.0 ± 1.0 → 13.0 ± 2.0 % error (+2.0 ± 1.0)"


def test_a_row_is_open_until_its_notebook_ran():
    claim = next(claim for claim in claims.CLAIMS if claim.notebook == "1_erratic_validation")
    assert evidence.OPEN in evidence.row(claim, {})
    by_seed = {"running": [20.0, 22.0], "batch": [1.0, 3.0]}
    row = evidence.row(claim, {"1_erratic_validation": {"change": {answers.CONVOLUTIONS: by_seed}}})
    for words in ("21.0 ± 1.0 points", "2.0 ± 1.0", f"**{answers.HOLDS}**"):
        assert words in row
