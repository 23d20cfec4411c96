"""What mkdocs is told beyond mkdocs.yml: measurements are pages of the site, too."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def on_files(files: Any, config: Any) -> Any:
    """Adds `benchmarks/results/*.md`, which the pages name by their place in the repository."""
    for path in sorted(RESULTS.glob("*.md")):
        files.append(File.generated(config, f"benchmarks/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns those names into names of pages, and leaves out what in a fence is meant for the tests.

    A page beside no others needs no list of pages at its side.
    """
    if page.parent is None:
        page.meta.setdefault("hide", ["navigation"])
    markdown = markdown.replace("../benchmarks/results/", "benchmarks/")
    return re.sub(r"^```(\w+) (continuation|notest)$", r"```\1", markdown, flags=re.MULTILINE)
