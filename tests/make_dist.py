"""What an index would take: wheel and sdist are built, looked into, and tried as a new user would.

Each is installed into a fresh environment of each Python at hand, once with the lowest versions that its metadata allow
and once with the newest; the programs of the README run there, and the tests of the sdist from the unpacked sdist. The
first problem ends it. What was built stays in dist/.
"""

import argparse
import contextlib
import email.parser
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator

from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parents[1]
DIST = ROOT / "dist"
SUPPORTED = ("3.11", "3.12", "3.13")
NEWER = tuple(f"3.{minor}" for minor in range(14, 20))
"""Tried where they are at hand."""
SOURCES = (
    *("flaxbn", "tests", "scripts", "docs", "notebooks", "hatch_build.py", "pyproject.toml", "constraints.txt"),
    *("CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "SECURITY.md"),
)
QUICK = ("tests/arithmetic", "tests/layers")
PAGES = ("README.md", "docs/index.md")
BESIDES = ("scikit-learn",)
"""What programs of these pages import, and nothing brings: the data."""
PART = re.compile(
    r"^(?P<fence>```)python ?(?P<words>.*)\n(?P<code>(?:.*\n)*?)```$|^///(?: tab \| (?P<tab>.+))?$", re.MULTILINE
)
"""A block of code, or the begin or the end of a tab."""


def main(arguments: list[str]) -> None:
    """Builds, checks, and tries on each Python."""
    options = parsed(arguments)
    wheel, sdist = built()
    check_wheel(wheel)
    check_sdist(sdist)
    found = at_hand(options.python or SUPPORTED + NEWER)
    missing = [version for version in options.python or SUPPORTED if version not in found]
    if not found:
        raise SystemExit(f"make dist: no Python of {', '.join(missing)} was found, so that nothing was tried.")
    for version, python in found.items():
        for lowest in (True, False):
            for package in (wheel, sdist):
                with step(f"Python {version}, {'lowest' if lowest else 'newest'} dependencies, {package.name}"):
                    try_out(package, python, lowest=lowest, all_tests=options.all_tests)
    print(f"\n{wheel.name} and {sdist.name} work on Python {', '.join(found)}.")
    if missing:
        print(f"Not tried, since no interpreter was found: Python {', '.join(missing)}.")


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", metavar="3.x", help="only these versions")
    parser.add_argument("--all-tests", action="store_true", help=f"of the sdist, not only {' and '.join(QUICK)}")
    return parser.parse_args(arguments)


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Says what begins, and how long it took."""
    start = time.monotonic()
    print(f"\n== {what}", flush=True)
    yield
    print(f"== {what}: {time.monotonic() - start:.0f} s", flush=True)


def run(*command: object, cwd: pathlib.Path = ROOT, **environment: str) -> None:
    """Runs a command that must succeed, where only what is installed can be imported."""
    given = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    words = [str(word) for word in command]
    code = subprocess.run(words, cwd=cwd, env=given | {"PYTHONSAFEPATH": "1"} | environment).returncode
    if code:
        raise SystemExit(f"make dist: `{' '.join(words)}`, run in {cwd}, ended with {code}.")


def built() -> tuple[pathlib.Path, pathlib.Path]:
    """The sdist, and the wheel that is built from it."""
    with step("build"):
        shutil.rmtree(DIST, ignore_errors=True)
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", DIST, ROOT)
        (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
        run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    return wheel, sdist


def check_wheel(wheel: pathlib.Path) -> None:
    """The wheel holds the package, its mark of types, its licence and its metadata, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    about = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    described = [f"{about}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")]
    check_names(wheel.name, names, [*tracked("flaxbn"), *described])
    if "flaxbn/py.typed" not in names:
        raise SystemExit(f"make dist: {wheel.name} must hold flaxbn/py.typed, which says that it is typed.")


def check_sdist(sdist: pathlib.Path) -> None:
    """The sdist holds what it is built from, and what its tests read."""
    with tarfile.open(sdist) as archive:
        names = [name.removeprefix(f"{top_folder(sdist)}/") for name in archive.getnames()]
    check_names(sdist.name, names, [*tracked(*SOURCES), ".gitignore", "PKG-INFO"])


def tracked(*paths: str) -> list[str]:
    """The files of these folders that git knows and that are there."""
    listed = subprocess.run(["git", "ls-files", "-z", *paths], cwd=ROOT, check=True, capture_output=True, text=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


def check_names(archive: str, names: Iterable[str], expected: Iterable[str]) -> None:
    """An archive holds just what is expected."""
    for what, wrong in (("lacks", {*expected} - {*names}), ("also holds", {*names} - {*expected})):
        if wrong:
            raise SystemExit(f"make dist: {archive} {what} {', '.join(sorted(wrong))}.")


def at_hand(versions: Iterable[str]) -> dict[str, str]:
    """Of these versions of Python those that are on this machine, each with its interpreter.

    A name on PATH may be a shim for a Python that is not installed: each candidate is run.
    """
    found: dict[str, str] = {}
    for candidate in (sys.executable, *(f"python{version}" for version in versions), *of_pyenv()):
        version = version_of(candidate)
        if version in versions:
            found.setdefault(version, candidate)
    return {version: found[version] for version in versions if version in found}


def of_pyenv() -> Iterator[str]:
    """The interpreters that pyenv installed."""
    if shutil.which("pyenv"):
        folder = subprocess.run(["pyenv", "root"], capture_output=True, text=True).stdout.strip()
        yield from map(str, sorted(pathlib.Path(folder, "versions").glob("3.*/bin/python3"), reverse=True))


def version_of(python: str) -> str | None:
    """The version of an interpreter that runs and can make environments, as "3.11"."""
    code = "import ensurepip, sys, venv; print(*sys.version_info[:2], sep='.')"
    try:
        return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def try_out(package: pathlib.Path, python: str, *, lowest: bool, all_tests: bool) -> None:
    """Installs a package into a fresh environment, runs the README's programs there, and the tests of an sdist."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        own = folder / "venv" / "bin" / "python"
        run(python, "-m", "venv", folder / "venv")
        constraints = lowest_versions(requirements(package)) if lowest else []
        (folder / "constraints.txt").write_text("\n".join(constraints), encoding="utf-8")
        install(own, [f"{package}[export]", *BESIDES], folder / "constraints.txt")
        run_programs(own, folder)
        if is_sdist(package):
            extras, tests = ("test,report,scripts", ["tests"]) if all_tests else ("test,report", QUICK)
            install(own, [f"{package}[{extras}]"], folder / "constraints.txt")
            with tarfile.open(package) as archive:
                archive.extractall(folder, filter="data")
            run(own, "tests/run.py", "-q", *tests, cwd=folder / top_folder(package))


def install(python: pathlib.Path, packages: Iterable[str], constraints: pathlib.Path) -> None:
    """Installs packages, and sees that all that is there goes together."""
    # The warnings that -qq leaves out are those of pip about itself.
    run(python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--constraint", constraints, *packages)
    run(python, "-m", "pip", "--disable-pip-version-check", "check")


def run_programs(python: pathlib.Path, folder: pathlib.Path) -> None:
    """Runs the README's programs, far from the repository."""
    about = "import flax, flaxbn, jax; print('jax', jax.__version__, 'flax', flax.__version__, flaxbn.__file__)"
    run(python, "-W", "error", "-c", about, cwd=folder)
    for number, program in enumerate(programs()):
        path = folder / f"program_{number}.py"
        path.write_text(program, encoding="utf-8")
        run(python, path, cwd=folder)


def is_sdist(package: pathlib.Path) -> bool:
    """Whether it is an sdist, not a wheel."""
    return package.name.endswith(".tar.gz")


def top_folder(sdist: pathlib.Path) -> str:
    """The folder that an sdist unpacks to."""
    return sdist.name.removesuffix(".tar.gz")


def requirements(package: pathlib.Path) -> list[str]:
    """What a wheel or an sdist says that it needs, its extras included."""
    if is_sdist(package):
        with tarfile.open(package) as archive:
            text = archive.extractfile(f"{top_folder(package)}/PKG-INFO").read()
    else:
        with zipfile.ZipFile(package) as archive:
            text = archive.read(next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA")))
    return email.parser.BytesParser().parsebytes(text).get_all("Requires-Dist", [])


def lowest_versions(required: Iterable[str]) -> list[str]:
    """Constraints that hold each requirement at its lower bound."""
    parsed = map(Requirement, required)
    return sorted({f"{r.name}=={s.version}" for r in parsed for s in r.specifier if s.operator == ">="})


def programs(pages: Iterable[str] = PAGES) -> list[str]:
    """The examples of these pages that run as they stand: a block of code with those of its tab that continue it."""
    found = [program for page in pages for program in programs_of((ROOT / page).read_text(encoding="utf-8"))]
    if not found:
        raise SystemExit(f"make dist: there must be an example to run in {' or '.join(pages)}: none is there.")
    return found


def programs_of(text: str) -> list[str]:
    """Those of one page."""
    tab, found = "", []
    for part in PART.finditer(text):
        words = (part["words"] or "").split()
        if not part["fence"]:
            tab = part["tab"] or ""
        elif "continuation" in words:
            place = max(number for number, (name, _) in enumerate(found) if tab in (name, ""))
            found[place] = (tab, found[place][1] + part["code"])
        elif "notest" not in words:
            found.append((tab, part["code"]))
    return [code for _, code in found]


if __name__ == "__main__":
    main(sys.argv[1:])
