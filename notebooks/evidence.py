"""Writes docs/evidence.md: what articles and papers claim, and what full runs of the notebooks say to that.

    python notebooks/evidence.py

The figures come from notebooks/results, where `lab.keep` puts those of a full run. The claims stand in claims.py, the
rules by which they are judged in answers.py. A notebook that has no results yet leaves its rows open.
"""

import json
import pathlib
from typing import Any

from claims import CLAIMS, Claim

ROOT = pathlib.Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "notebooks" / "results", ROOT / "docs" / "evidence.md"
OPEN = "not run yet"

NOTEBOOKS = {
    "1_erratic_validation": "Why is my validation curve erratic?",
    "2_two_datasets": "One network, two datasets",
    "3_batch_renormalization": "What does batch renormalization buy?",
    "4_estimating_statistics": "How should statistics be estimated?",
    "5_changed_data": "My data changed",
    "6_four_hospitals": "Several hospitals",
    "7_diagnosis": "What is a diagnosis worth?",
}

HEAD = """# What holds?

<!-- Written by notebooks/evidence.py from notebooks/results; a change by hand is lost. -->

What articles and papers say of batch normalization that this library is an answer to, and what our runs say to that.
Their networks are larger than ours, a ResNet-50 on ImageNet for most; ours are narrow ResNets of 20 layers and small
networks (in 1, 2 and a part of 3), trained for a few epochs on a quarter of CIFAR-10, for notebooks 1, 3 and 4 halved
to 16x16, on 3 667 images of SVHN and on MNIST, and on a table of 920 patients. A claim that does not hold here may hold
there.

Figures are mean ± standard deviation over {seeds} seeds, on one test set. An effect *holds* if its mean exceeds two
standard deviations and, where the source gives a figure, half of that, in its own unit; it *holds weaker* if it
exceeds one standard deviation, which chance does in one of ten cases, and a quarter of that figure. That nothing
changes *holds* if the difference is within two standard deviations and half a point, and *holds weaker* within one
standard deviation or half a point; that something is as good likewise, or if it is better. For the spread of seeds,
hospitals and the diagnosis the rule stands in `notebooks/answers.py`.

| claim | source | here | verdict | notebook |
|---|---|---|---|---|
"""

TAIL = """
Of the articles, Mindee's is known here by the code that goes with it,
[mindee/Problem-of-BatchNorm](https://github.com/mindee/Problem-of-BatchNorm), with the four modes of notebook 1. Irpan
tells of two datasets of his own, whose plots he shows, and takes MNIST and SVHN for an example. The text of the article
on several labs, and that of a fourth on batch renormalization, could not be had: to the first belongs the question, and
what the second claims is taken from Ioffe's paper. Figures of the papers with a decimal point are from their tables.

Each notebook is run again, on the folder DIR of data sets, by:

| notebook | command | the run shown |
|---|---|---|
"""


def row(claim: Claim, results: dict[str, dict[str, Any]]) -> str:
    """A line of the table."""
    known = claim.notebook in results
    text, verdict = claim.answer(results[claim.notebook]) if known else ("", OPEN)
    notebook = f"[{claim.notebook[0]}](../notebooks/{claim.notebook}.ipynb)"
    return f"| {claim.text} | {claim.source} | {text} | {'**' * known}{verdict}{'**' * known} | {notebook} |"


def command(notebook: str, results: dict[str, dict[str, Any]]) -> str:
    """A line of the table of commands."""
    found = results.get(notebook)
    run = f"{found['seeds']} seeds, {found['device']}, jax {found['jax']}" if found else OPEN
    title = f"[{notebook[0]}: {NOTEBOOKS[notebook]}](../notebooks/{notebook}.ipynb)"
    return f'| {title} | `make notebooks FULL=1 DATA_DIR=DIR ARGS="-k {notebook}"` | {run} |'


def page(results: dict[str, dict[str, Any]]) -> str:
    """The page, from the results by notebook."""
    seeds = sorted({found["seeds"] for found in results.values()}) or ["five"]
    rows = [row(claim, results) for claim in CLAIMS]
    commands = [command(notebook, results) for notebook in NOTEBOOKS]
    return "\n".join(
        [HEAD.format(seeds=" or ".join(map(str, seeds))) + "\n".join(rows), TAIL + "\n".join(commands), ""]
    )


def read_results() -> dict[str, dict[str, Any]]:
    """The figures of the full runs that are kept."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


if __name__ == "__main__":
    PAGE.write_text(page(read_results()))
