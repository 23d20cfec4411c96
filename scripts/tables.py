"""Tables in Markdown, as scripts and benchmarks write them."""

from collections.abc import Iterable, Sequence
from typing import Any


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]], labels: int) -> str:
    """A table whose first columns, as many as `labels`, are aligned left, and the others right."""
    rule = ["---"] * labels + ["---:"] * (len(header) - labels)
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [header, rule, *rows])


def with_spread(mean: float, spread: float, seeds: int, form: str = ".4f") -> str:
    """A mean over the seeds with its standard deviation, which a single seed has none of."""
    return f"{mean:{form}}" + (f" ± {spread:{form.lstrip('+z')}}" if seeds > 1 else "")


def diverged(summary: dict[str, dict[str, Any]]) -> str:
    """A line for each mode or variant of which seeds diverged: which, and when. Nothing where all went well."""
    lines = {
        name: ", ".join(f"seed {seed} in epoch {epoch}" for seed, epoch in outcome["diverged"].items())
        for name, outcome in summary.items()
    }
    return "\n".join(f"{name} diverged: {seeds}" for name, seeds in lines.items() if seeds)
