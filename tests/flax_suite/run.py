"""Run Flax's own tests of `BatchNorm`, of Linen and of nnx, with `flaxbn.BatchNorm` and `flaxbn.nnx.BatchNorm` instead.

The tests come from the source distribution of the installed Flax and run under its own pytest configuration.
Arguments are passed on to pytest.
"""

import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile

import pytest

CACHE = pathlib.Path(__file__).parents[2] / ".cache"
FOLDERS = ("linen", "nnx", "nnx/bridge", "nnx/nn")


def download(version: str) -> pathlib.Path:
    """The unpacked source distribution of Flax."""
    unpacked = CACHE / f"flax-{version}"
    if not unpacked.is_dir():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "flax"]
            subprocess.run([*pip, "--dest", folder, f"flax=={version}"], check=True)
            (archive,) = pathlib.Path(folder).glob("*.tar.gz")
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
            pathlib.Path(folder, unpacked.name).rename(unpacked)
    return unpacked


def uses(path: pathlib.Path) -> bool:
    return re.search(r"\b(nn|nnx|linen)\.BatchNorm\b", path.read_text()) is not None


def main() -> int:
    version = importlib.metadata.version("flax")
    try:
        flax = download(version)
    except subprocess.CalledProcessError:
        print(f"Flax's tests did not run: the source distribution of flax {version} could not be downloaded.")
        return 1 if os.environ.get("CI") else 0
    tests = flax / "tests"
    files = [path for folder in FOLDERS for path in sorted((tests / folder).glob("*_test.py")) if uses(path)]
    plugin = ["-p", "replacement", "-p", "no:cacheprovider"]
    paths = ["--rootdir", str(tests), "-c", str(flax / "pyproject.toml"), *map(str, files)]
    # pytest's exit status is 5, not 0, where no test ran.
    return pytest.main([*plugin, *sys.argv[1:], *paths])


if __name__ == "__main__":
    sys.exit(main())
