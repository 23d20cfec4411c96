"""Tables in Markdown."""

import importlib
import pathlib
import sys

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

tables = importlib.import_module("tables")


def test_labels_are_left_and_numbers_right():
    assert tables.markdown(["model", "B", "ms"], [["CNN", 2, 1.5], ["ResNet", 32, 12]], labels=1).splitlines() == [
        "| model | B | ms |",
        "| --- | ---: | ---: |",
        "| CNN | 2 | 1.5 |",
        "| ResNet | 32 | 12 |",
    ]


def test_spread_of_one_seed_is_not_told():
    assert tables.with_spread(0.5, 0.25, 2) == "0.5000 ± 0.2500"
    assert tables.with_spread(-0.5, 0.25, 3, "+z.2f") == "-0.50 ± 0.25"
    assert tables.with_spread(0.5, 0.0, 1, ".3f") == "0.500"
