"""The page of evidence says what the results say, and judges by its rules."""

import pathlib
import sys

import numpy as np
import pytest

sys.path.append(str(pathlib.Path(__file__).parents[1] / "notebooks"))

import evidence


def test_the_page_is_that_of_the_results():
    assert evidence.PAGE.read_text() == evidence.page(evidence.read_results()), "run: python notebooks/evidence.py"


def test_every_claim_is_of_a_notebook():
    assert {claim.notebook for claim in evidence.CLAIMS} == {*evidence.NOTEBOOKS}


@pytest.mark.parametrize(
    ("gain", "reported", "verdict"),
    [
        ([4, 5, 6], None, evidence.HOLDS),
        ([4, 5, 6], 8, evidence.HOLDS),
        ([4, 5, 6], 12, evidence.WEAKER),
        ([0, 1, 2], None, evidence.WEAKER),
        ([-3, 1, 3], None, evidence.FAILS),
        ([-4, -5, -6], None, evidence.FAILS),
        ([np.nan, 1, 2], None, evidence.FAILS),
    ],
)
def test_an_effect(gain, reported, verdict):
    assert evidence.effect(gain, "words", reported) == ("words", verdict)


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [
        ([-0.2, 0.1, 0.3], evidence.HOLDS),
        ([0.3, 0.31, 0.32], evidence.WEAKER),
        ([-2, 1, 4], evidence.WEAKER),
        ([2, 2.1, 2.2], evidence.FAILS),
        ([-2, -2.1, -2.2], evidence.FAILS),
    ],
)
def test_that_nothing_changes(difference, verdict):
    assert evidence.no_effect(difference, "words") == ("words", verdict)


def test_figures_are_means_and_deviations_over_the_seeds():
    assert evidence.change([10.0, 12.0], [11.0, 15.0]) == "11.0 ± 1.0 → 13.0 ± 2.0 % error (+2.0 ± 1.0)"


def test_a_row_is_open_until_its_notebook_ran():
    claim = next(claim for claim in evidence.CLAIMS if claim.notebook == "1_erratic_validation")
    assert evidence.OPEN in evidence.row(claim, {})
    by_seed = {"running": [20.0, 22.0], "batch": [1.0, 3.0]}
    row = evidence.row(claim, {"1_erratic_validation": {"change": {evidence.CONVOLUTIONS: by_seed}}})
    for words in ("21.0 ± 1.0 points", "2.0 ± 1.0", f"**{evidence.HOLDS}**"):
        assert words in row
