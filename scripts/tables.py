"""Tables in Markdown, as scripts and benchmarks write them."""

from collections.abc import Iterable, Sequence
from typing import Any


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]], labels: int) -> str:
    """A table whose first columns, as many as `labels`, are aligned left, and the others right."""
    rule = ["---"] * labels + ["---:"] * (len(header) - labels)
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [header, rule, *rows])
