"""All tests on all cores, in two runs of pytest: XLA's optimizations are chosen once for a process.

Most of the time goes into compiling programs that run once, and most of that into optimizing them. So the arithmetic,
the layers and the examples of the docstrings run as they are compiled for users, and all else hardly optimized.
Arguments are those of pytest; paths among them choose what runs.
"""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
OPTIMIZED = [
    ROOT / "tests" / "arithmetic",
    ROOT / "tests" / "layers",
    ROOT / "tests" / "scripts" / "test_batch_sizes.py",  # trains within the process
    ROOT / "flaxbn",
]
WORKERS = ["-n", "logical", "--maxprocesses", "8", "--dist", "loadfile", "--no-loadscope-reorder"]
NO_TESTS = pytest.ExitCode.NO_TESTS_COLLECTED


def located(argument: str) -> pathlib.Path:
    """The file or folder that an argument of pytest names, or a path at which nothing is."""
    return pathlib.Path(argument.partition("::")[0]).resolve()


def optimized(paths: list[str]) -> list[str]:
    """Of these files, folders and tests those that run as XLA compiles for users."""
    found = [path for path in paths if any(located(path).is_relative_to(room) for room in OPTIMIZED)]
    return found + [str(room) for room in OPTIMIZED for path in paths if located(path) in room.parents]


def run(paths: list[str], options: list[str], **environment: str) -> int:
    """The exit status of pytest."""
    if not paths:
        return NO_TESTS
    command = [sys.executable, "-m", "pytest", *WORKERS, *options, *paths]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment).returncode


def main(arguments: list[str]) -> int:
    """The exit status of both runs; that no test matches is one where it holds for both."""
    paths = [argument for argument in arguments if located(argument).exists()]
    options = [argument for argument in arguments if argument not in paths]
    paths = paths or [str(ROOT / "tests"), str(ROOT / "flaxbn")]
    statuses = [
        run(optimized(paths), ["--doctest-modules", *options]),
        run(
            [path for path in paths if path not in optimized(paths)],
            [*(f"--ignore={room}" for room in OPTIMIZED), *options],
            JAX_DISABLE_MOST_OPTIMIZATIONS="1",
        ),
    ]
    failed = [status for status in statuses if status not in (0, NO_TESTS)]
    return failed[0] if failed else min(statuses)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
