"""A notebook has the cells of the script that it is written as."""

import pathlib

import jupytext
import pytest

SCRIPTS = sorted(pathlib.Path(__file__).parent.glob("[0-9]_*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_in_step(script):
    written, kept = (
        [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]
        for path in (script, script.with_suffix(".ipynb"))
    )
    assert kept == written, f"run: jupytext --to ipynb --update {script.name}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_the_first_cell_of_code_says_what_to_install(script):
    first = next(cell for cell in jupytext.read(script).cells if cell.cell_type == "code")
    assert "pip install '.[scripts,notebooks]'" in first.source
