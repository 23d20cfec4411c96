"""How far a pass over data has come, for whoever waits for it."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

Progress = Callable[[int, int | None], object]
"""`(done, total)`: the first call says 0, the last one that all is done; `total` is None while it is not known."""


class Counter:
    """Counts work, and tells of it.

    Attributes:
        is_watched: whether anybody looks: then work is cut so that there is something to tell now and then.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self.is_watched = progress is not None
        self._progress: Progress = progress or (lambda done, total: None)
        self._done = 0
        self._total: int | None = None

    def expect(self, total: int | None) -> None:
        """Begins to count, to a number that may not be known."""
        self._done, self._total = 0, total
        self._progress(0, total)

    def add(self, done: int = 1) -> None:
        """So much more is done."""
        if done:
            self._done += done
            self._progress(self._done, self._total)

    def each(self, parts: Iterable[T]) -> Iterator[T]:
        """The parts, each counted when the next one is asked for."""
        for part in parts:
            yield part
            self.add()

    def finish(self) -> None:
        """All is done, whatever was expected."""
        if self._done != self._total:
            self._progress(self._done, self._done)


@contextlib.contextmanager
def counting(progress: Progress | None) -> Iterator[Counter]:
    """A counter, which says 0 at once and, at the end, that all is done; a `ProgressBar` ends with it in any case."""
    if progress is not None and not callable(progress):
        raise TypeError(
            f"`progress` must be a function of `(done, total)`: got {type(progress).__name__}. "
            "`flaxbn.progress_bar()` makes one."
        )
    counter = Counter(progress)
    try:
        counter.expect(None)
        yield counter
        counter.finish()
    finally:
        if isinstance(progress, ProgressBar):
            progress.close()


class ProgressBar:
    """What `progress_bar` makes: a function of `(done, total)`, shown on standard error."""

    def __init__(self, description: str) -> None:
        self._description = description
        self._bar: Any = None

    def __call__(self, done: int, total: int | None) -> None:
        """Shows how far it is."""
        if self._bar is None:
            self._bar = _new_bar()
            self._task = self._bar.add_task("", total=None)
            self._bar.start()
        description = self._description if done else f"{self._description} (compiling)"
        self._bar.update(self._task, completed=done, total=total, description=description)

    def close(self) -> None:
        """Leaves the terminal as it was, below the bar; the next call begins a new one."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = None


def progress_bar(description: str = "batches") -> ProgressBar:
    """A bar for the argument `progress` of whatever passes over data.

    It is rich's, which Flax brings, with the time that is left. It appears when the pass begins, while the model is
    still compiled, and ends with the pass. Any function of `(done, total)` will do instead,
    with tqdm for example:

        with tqdm.tqdm(total=len(batches)) as bar:
            flaxbn.estimate_population_stats(..., progress=lambda done, total: bar.update(done - bar.n))

    Args:
        description: what stands before it.

    Examples:
        >>> import flax.linen as nn, flaxbn, jax, numpy as np
        >>> model = nn.BatchNorm(use_running_average=True)
        >>> images = np.arange(12, dtype=np.float32).reshape(6, 2)
        >>> variables = model.init(jax.random.key(0), images)
        >>> seen = []
        >>> def progress(done, total):  # or progress=flaxbn.progress_bar()
        ...     seen.append((done, total))
        >>> stats = flaxbn.estimate_population_stats(model, variables, images, batch_size=2, progress=progress)
        >>> seen[0], seen[1], seen[-1]
        ((0, None), (0, 3), (3, 3))
    """
    return ProgressBar(description)


def _new_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True))
