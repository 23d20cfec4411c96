"""What the documentation names exists, and what is public is in it."""

import ast
import functools
import operator
import re
from pathlib import Path

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
    return {title: text for title, text in zip(parts[::2], parts[1::2]) if "```text" in text}


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


def test_everything_public_is_in_the_reference():
    documented = {name for text in PAGES.values() for name in DIRECTIVES.findall(text)}
    public = {f"flaxbn.{name}" for name in imported_names(flaxbn)} - {"flaxbn.diagnostics"}
    public |= {f"flaxbn.diagnostics.{name}" for name in imported_names(flaxbn.diagnostics)}
    assert public - documented == set()


def imported_names(module):
    imports = (node for node in ast.parse(Path(module.__file__).read_text()).body if isinstance(node, ast.ImportFrom))
    return [name.asname for node in imports for name in node.names if name.asname]
