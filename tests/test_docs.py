"""What the documentation names exists, and what is public is in it."""

import ast
import functools
import io
import operator
import re
import runpy
import tokenize
from pathlib import Path

import pytest

import flaxbn

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT / "docs").as_posix(): path.read_text() for path in (ROOT / "docs").rglob("*.md")}
REFERENCES = re.compile(r"\]\[(flaxbn[\w.]*)\]")
DIRECTIVES = re.compile(r"^::: (flaxbn[\w.]*)", re.MULTILINE)
TESTS = re.compile(r"`(tests/[\w/]+\.py)::([\w:]+)`")


@functools.cache
def known_tests(file):
    found = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        found |= {prefix + member.name for member in members if isinstance(member, ast.FunctionDef)}
    return found


def exists(name):
    try:
        operator.attrgetter(name.partition(".")[2])(flaxbn)
    except AttributeError:
        return False
    return True


def sections(page):
    """The text under each heading that holds a formula."""
    parts = re.split(r"^##+ (.*)$", PAGES[page], flags=re.MULTILINE)[1:]
    return {title: text for title, text in zip(parts[::2], parts[1::2]) if "```math" in text}


def test_named_tests_exist():
    named = {match for text in PAGES.values() for match in TESTS.findall(text)}
    assert len(named) > 40
    assert {f"{file}::{test}" for file, test in named if test not in known_tests(file)} == set()


def test_named_functions_exist():
    named = {name for text in PAGES.values() for name in REFERENCES.findall(text) + DIRECTIVES.findall(text)}
    assert {name for name in named if not exists(name)} == set()


def test_each_formula_names_its_function_and_its_test():
    found = sections("mathematics.md")
    assert len(found) > 12
    assert {title for title, text in found.items() if not (REFERENCES.search(text) and TESTS.search(text))} == set()


def test_the_code_of_the_readme_runs_on_the_first_page():
    """The examples of the pages are run as tests; the README shows a part of them."""
    readme = (ROOT / "README.md").read_text()
    shown = re.findall(r"^```python notest\n(.*?)^```$", readme, flags=re.MULTILINE | re.DOTALL)
    assert [len(code.splitlines()) for code in shown] == [6, 6]
    assert [code in PAGES["index.md"] for code in shown] == [True, True]
    assert len(readme.split()) <= 900


def test_figures_are_those_of_the_notebooks():
    """`python docs/figures.py` puts them there."""
    figures = runpy.run_path(str(ROOT / "docs" / "figures.py"))
    for (notebook, number), file in figures["FIGURES"].items():
        drawn = figures["figure_of"](ROOT / "notebooks" / f"{notebook}.ipynb", number)
        assert drawn == (ROOT / "docs" / file).read_bytes()


def test_alternative_texts_say_what_is_seen():
    texts = [alt for page in PAGES.values() for alt in re.findall(r"!\[([^\]]*)\]\(", page)]
    assert [alt for alt in texts if len(alt.split()) < 12] == []


def test_everything_public_is_in_the_reference():
    documented = {name for text in PAGES.values() for name in DIRECTIVES.findall(text)}
    public = {f"flaxbn.{name}" for name in imported_names(flaxbn)} - {
        "flaxbn.diagnostics",
        "flaxbn.linen",
        "flaxbn.nnx",
        "flaxbn.torch",
    }
    public |= {f"flaxbn.diagnostics.{name}" for name in imported_names(flaxbn.diagnostics)}
    public |= {f"flaxbn.nnx.{name}" for name in imported_names(flaxbn.nnx)}
    assert public - documented == set()


def imported_names(module):
    imports = (
        node for node in ast.walk(ast.parse(Path(module.__file__).read_text())) if isinstance(node, ast.ImportFrom)
    )
    return [name.asname for node in imports for name in node.names if name.asname]


def public_objects():
    """What the catalogues name, by name: functions and classes, not modules."""
    catalogues = {"": flaxbn, "diagnostics.": flaxbn.diagnostics, "nnx.": flaxbn.nnx}
    found = {prefix + name: getattr(m, name) for prefix, m in catalogues.items() for name in imported_names(m)}
    defined = vars(flaxbn.domains).items()
    found |= {f"domains.{name}": f for name, f in defined if getattr(f, "__module__", "") == "flaxbn.domains"}
    return {name: value for name, value in found.items() if callable(value) and "._" not in f".{name}"}


@pytest.mark.parametrize("name", public_objects())
def test_what_is_public_has_an_example(name):
    assert ">>> " in (public_objects()[name].__doc__ or "")


def lines_of(source):
    """The numbers of the lines of docstrings, and of code: those that hold neither docstring nor only a comment."""
    docs = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            docs |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = (t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in blank)
    return docs, {line for t in tokens for line in range(t.start[0], t.end[0] + 1)} - docs


def test_there_is_half_a_line_of_docstring_for_each_line_of_code():
    counted = [lines_of(path.read_text()) for path in (ROOT / "flaxbn").rglob("*.py")]
    docs, code = (sum(map(len, lines)) for lines in zip(*counted))
    assert docs / code >= 0.5
