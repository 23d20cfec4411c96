"""Puts the figures of notebooks that pages and the README show into docs/: `python docs/figures.py`."""

import base64
import json
from pathlib import Path

DOCS = Path(__file__).parent
FIGURES = {("1_erratic_validation", 0): "erratic_validation.png", ("2_two_datasets", 1): "domains.png"}
"""For each notebook and number of a figure in it the file that it goes to."""


def figure_of(notebook: Path, number: int) -> bytes:
    """A figure that a notebook shows, as a PNG file."""
    cells = json.loads(notebook.read_text())["cells"]
    shown = [output["data"] for cell in cells for output in cell.get("outputs", []) if "data" in output]
    return base64.b64decode([data["image/png"] for data in shown if "image/png" in data][number])


if __name__ == "__main__":
    for (name, number), file in FIGURES.items():
        (DOCS / file).write_bytes(figure_of(DOCS.parent / "notebooks" / f"{name}.ipynb", number))
