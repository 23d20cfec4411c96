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
