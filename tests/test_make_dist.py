"""What is said of the package agrees: versions, extras, how it is installed; and what `make dist` takes for right."""

import re
import tomllib
from pathlib import Path

import make_dist
import pytest
import yaml
from packaging.requirements import Requirement

import flaxbn

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
EXTRAS = {name: list(map(Requirement, wanted)) for name, wanted in PROJECT["optional-dependencies"].items()}
REQUIRED = list(map(Requirement, PROJECT["dependencies"]))


def test_the_citation_is_of_this_version_and_has_what_the_format_asks_for():
    assert {"cff-version", "message", "title", "authors"} <= CITATION.keys()
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["version"] == flaxbn.__version__
    assert (CITATION["license"], CITATION["abstract"]) == (PROJECT["license"], PROJECT["description"])


def test_the_changelog_has_this_version():
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert f"{flaxbn.__version__} (" in " ".join(f"{heading} (" for heading in headings)
    assert [
        heading for heading in headings[1:] if not re.fullmatch(r"\d+\.\d+\.\d+ \(\d{4}-\d\d-\d\d\)", heading)
    ] == []


def test_classifiers_name_the_pythons_that_are_tried():
    named = [name for name in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", name)]
    assert named == [f"Programming Language :: Python :: {version}" for version in make_dist.SUPPORTED]
    assert PROJECT["requires-python"] == f">={make_dist.SUPPORTED[0]}"


def test_the_page_of_what_will_not_break_names_the_oldest_versions():
    page = (ROOT / "docs" / "stability.md").read_text()
    (oldest,) = (line for line in page.splitlines() if line.startswith("| oldest |"))
    bounds = dict(bound.split("==") for bound in make_dist.lowest_versions(PROJECT["dependencies"]))
    assert [cell.strip() for cell in oldest.split("|")[2:5]] == [make_dist.SUPPORTED[0], bounds["jax"], bounds["flax"]]


def test_a_package_has_one_lower_bound():
    bounds = {}
    for wanted in [REQUIRED, *EXTRAS.values()]:
        for requirement in wanted:
            bounds.setdefault(requirement.name.lower(), set()).add(str(requirement.specifier))
    assert {name: found for name, found in bounds.items() if len(found) > 1} == {}


@pytest.mark.parametrize("extra", ["export", "report"])
def test_scripts_need_no_extra_besides_their_own(extra):
    assert {r.name for r in EXTRAS[extra]} <= {r.name for r in EXTRAS["scripts"]}


def test_no_text_says_that_an_index_has_it():
    """Until one does: `pip install .` is what works."""
    pages = [ROOT / "README.md", ROOT / "SECURITY.md", *(ROOT / "docs").rglob("*.md")]
    pages += [path for folder in ("flaxbn", "scripts") for path in (ROOT / folder).rglob("*.py")]
    assert [path for path in pages if re.search(r"(pip3?|uv|conda) (install|add) \S*flaxbn", path.read_text())] == []


class TestMakeDist:
    def test_lowest_versions_are_the_lower_bounds(self):
        required = ["jax>=0.10.2", "flatbuffers>=25.1; extra == 'export'", "numpy<3", "jax>=0.10.2; extra == 'x'"]
        assert make_dist.lowest_versions(required) == ["flatbuffers==25.1", "jax==0.10.2"]

    def test_what_an_archive_lacks_or_has_too_much_is_named(self):
        make_dist.check_names("a.whl", ["a", "b"], ["b", "a"])
        with pytest.raises(SystemExit, match=r"make dist: a\.whl lacks b, c\."):
            make_dist.check_names("a.whl", ["a"], ["a", "b", "c"])
        with pytest.raises(SystemExit, match=r"make dist: a\.whl also holds secret\."):
            make_dist.check_names("a.whl", ["a", "secret"], ["a"])

    def test_a_program_goes_on_in_its_tab(self):
        blocks = [
            *("```python", "a", "```", "/// tab | Linen", "```python", "b", "```", "///"),
            *("/// tab | flax.nnx", "```python", "c", "```", "///", "```python notest", "d", "```"),
            *("/// tab | Linen", "```python continuation", "e", "", "e", "```", "///", "```sh", "f", "```"),
        ]
        assert make_dist.programs_of("\n".join(blocks)) == ["a\n", "b\ne\n\ne\n", "c\n"]

    def test_a_command_that_fails_is_named(self, tmp_path):
        with pytest.raises(SystemExit, match=r"make dist: `false`, run in .*, ended with 1\."):
            make_dist.run("false", cwd=tmp_path)

    def test_a_python_that_does_not_run_is_not_at_hand(self):
        assert make_dist.version_of("python3.99") is None
        assert make_dist.at_hand(["3.99"]) == {}
