"""The documentation's examples run on eight simulated devices, and print what the pages say that they print.

Code in a tab goes on with the code before it that is in no tab or in one of the same name. The text in a fence
`text output` is that of the code before it, numbers apart, which differ between machines. `FLAXBN_WRITE_OUTPUT=1 make
readme` puts it there, and the figures that the code saves.
"""

import contextlib
import copy
import dataclasses
import io
import os
import re
import tempfile
from pathlib import Path

import jax
from markdown_it import MarkdownIt
from pytest_markdown_docs._runners import DefaultRunner, register_runner

collect_ignore_glob = ["*.py"]  # what mkdocs is told: it runs where mkdocs is installed
_compiled = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", _compiled.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

WRITES = os.environ.get("FLAXBN_WRITE_OUTPUT", "0") != "0"
_written: list[tuple[Path, int, int, list[str]]] = []
"""File, first line, last line and new text of each output to be put there."""
_drawn: dict[Path, bytes] = {}
"""The figures that code saved; that of the first tab counts."""
_HERE = "<output of this block>"


def pytest_markdown_docs_markdown_it():
    """Reads pages that have tabs once for each name of a tab, so that their code makes programs of its own."""
    parser = MarkdownIt()
    parser.core.ruler.push("tabs", one_program_for_each_tab)
    return parser


def one_program_for_each_tab(state):
    """Leaves the fences of a page: first those in no tab and in tabs of the first name, then those of the others."""
    fences, name = [], None
    for token in state.tokens:
        if token.type == "inline" and token.content.startswith("///"):
            opened = re.search(r"/// tab \| (.+)$", token.content)
            name = opened[1] if opened else None
        elif token.type == "fence":
            fences.append((name, token))
    names = [*dict.fromkeys(name for name, _ in fences if name)] or [None]
    state.tokens = [copy.copy(token) for tab in names for name, token in fences if name in (None, tab)]


@register_runner(default=True)
class ChecksOutput(DefaultRunner):
    """Runs code, and compares what it prints with the output that stands behind it."""

    def runtest(self, test, args, *, asyncio_runner=None):
        """Called for each block, whose code begins with that of the blocks that it continues."""
        lines, printed = test.source.split("\n"), io.StringIO()
        lines[test.start_line - 1] = f"print({_HERE!r})"  # the line of the fence, behind the code that goes before
        with (
            contextlib.redirect_stdout(printed),
            tempfile.TemporaryDirectory() as folder,
            contextlib.chdir(folder),
        ):
            marked = dataclasses.replace(test, source="\n".join(lines))
            super().runtest(marked, args, asyncio_runner=asyncio_runner)
            for figure in Path(folder).glob("*.png") if WRITES else ():
                _drawn.setdefault(test.source_path.parent / figure.name, figure.read_bytes())
        place = output_behind(test.source_path.read_text().splitlines(), test.start_line)
        if place is None:
            return
        first, last, expected = place
        found = [line.rstrip() for line in printed.getvalue().partition(_HERE)[2].strip("\n").splitlines()]
        if WRITES:
            _written.append((test.source_path, first, last, found))
        else:
            assert [words(line) for line in found] == [words(line) for line in expected], "\n".join(found)


def pytest_sessionfinish():
    """Puts outputs there where that is asked for, the last of a page first, so that lines keep their numbers."""
    for path, content in _drawn.items():
        path.write_bytes(content)
    for path, first, last, found in sorted(_written, key=lambda output: output[:2], reverse=True):
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines[:first], *found, *lines[last:]]) + "\n")


def output_behind(lines, start):
    """First line, last line and content of the output that follows the code at a line, or None."""
    closed = next(number for number in range(start, len(lines)) if lines[number].startswith("```"))
    fences = (number for number in range(closed + 1, len(lines)) if lines[number].startswith("```"))
    opened = next(fences, None)
    if opened is None or not lines[opened].startswith("```text output"):
        return None
    last = next(fences)
    return opened + 1, last, lines[opened + 1 : last]


def words(line):
    """A line without its figures, and without the room that they take."""
    return re.sub(r"[\s-]+", " ", re.sub(r"[-+\u00b1]?\d[\d.,e]*", "0", line)).strip()
