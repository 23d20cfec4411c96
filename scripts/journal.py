"""How far a run is: the metrics so far, in its folder, and a bar of progress on the terminal."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import processes
import results
from rich.console import Console
from rich.progress import Progress, TaskID


@dataclasses.dataclass
class Journal:
    """The metrics of a run so far, and where they go."""

    path: pathlib.Path
    """Where the lines are kept."""
    lines: list[dict[str, Any]]
    """The metrics, in the order in which they came."""
    console: Console
    bar: Progress
    task: TaskID
    diverged: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Which trainings diverged, and in which `epoch`."""

    def forget(self, epoch: int, run: dict[str, Any]) -> None:
        """Leaves out the lines of a training after `epoch`, which has no checkpoint."""
        self.lines = results.until(self.lines, epoch, **run)

    def add(self, line: dict[str, Any]) -> None:
        """Keeps one more line of metrics; the first process writes all of them."""
        self.lines.append(line)
        if processes.is_first():
            results.write_lines(self.path, self.lines)

    def describe(self, text: str) -> None:
        """Says beside the bar what is done now."""
        self.bar.update(self.task, description=text)

    def advance(self, steps: int = 1) -> None:
        """Moves the bar."""
        self.bar.advance(self.task, steps)


@contextlib.contextmanager
def keep_journal(
    out: pathlib.Path,
    lines: list[dict[str, Any]],
    console: Console,
    *,
    total: int,
    completed: int = 0,
    description: str = "compiling",
) -> Iterator[Journal]:
    """A journal in the folder of a run that goes on after `lines`, under a bar of `total` steps."""
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total, completed=completed)
        yield Journal(out / "metrics.jsonl", lines, console, bar, task)
