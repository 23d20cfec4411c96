"""What mkdocs is told beyond mkdocs.yml: further pages, typeset formulas, and figures that open in full."""

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent
RESULTS, NOTEBOOKS = ROOT / "benchmarks" / "results", ROOT / "notebooks"


def on_files(files: Any, config: Any) -> Any:
    """Adds `benchmarks/results/*.md`, which pages name by their place in the repository, and what notebooks show."""
    for path in sorted(RESULTS.glob("*.md")):
        files.append(File.generated(config, f"benchmarks/{path.name}", abs_src_path=str(path)))
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        folder = {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
        text, resources = MarkdownExporter().from_filename(str(path), resources=folder)
        question = re.search(r"^# (.*)", text, flags=re.MULTILINE)
        text = text.replace("![png]", f"![The answer in one figure: {question[1] if question else path.stem}]")
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, content in resources["outputs"].items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns those names into names of pages, formulas into MathML, and leaves out what in a fence is for the tests.

    A page beside no others needs no list of pages at its side.
    """
    if page.parent is None:
        page.meta.setdefault("hide", ["navigation"])
    markdown = markdown.replace("../benchmarks/results/", "benchmarks/")
    markdown = re.sub(r"\.\./notebooks/(\w+)\.ipynb", r"notebooks/\1.md", markdown)
    markdown = re.sub(r"^```math\n(.*?)^```$", displayed, markdown, flags=re.MULTILINE | re.DOTALL)
    markdown = re.sub(r"\$`(.+?)`\$", lambda found: f"<span>{convert(found[1])}</span>", markdown)
    markdown = re.sub(r"^```text output wrapped$", "``` {.text .wrapped}", markdown, flags=re.MULTILINE)
    return re.sub(r"^```(\w+) (continuation|notest|output)$", r"```\1", markdown, flags=re.MULTILINE)


def displayed(found: re.Match[str]) -> str:
    """The formula of a fence, which browsers set by themselves; it scrolls where the page is narrower."""
    formula = " ".join(found[1].split()).replace("{aligned}", "{align*}")
    return f'<div class="formula">{convert(formula, display="block")}</div>'


def on_page_content(html: str, **_: Any) -> str:
    """A figure opens in full when it is tapped: it is small on a phone."""
    return re.sub(r'<img alt="[^"]*" src="([^"]+)" />', r'<a class="figure" href="\1">\g<0></a>', html)
