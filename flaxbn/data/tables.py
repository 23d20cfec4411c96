"""Rows of text as a table: aligned for terminals, as HTML for notebooks."""

from collections.abc import Sequence
from html import escape

Rows = Sequence[Sequence[str]]
"""The cells of a table; its first row is the head."""


def as_text(rows: Rows, left: Sequence[bool]) -> str:
    """A line for each row, the cells of a column below each other.

    Args:
        rows: the head and the rows below it, of as many cells each.
        left: of each column, whether its cells begin below each other; else they end so, as numbers should.

    Returns:
        The lines, with two spaces between columns and none at the end.
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(cell.ljust(w) if start else cell.rjust(w) for cell, w, start in zip(row, widths, left)).rstrip()
        for row in rows
    )


def as_html(rows: Rows, left: Sequence[bool], caption: str = "") -> str:
    """The same as an HTML table, for `_repr_html_`.

    Args:
        rows: the head and the rows below it; what HTML would read as marks is shown as it is.
        left: of each column, whether it is set to the left; else to the right.
        caption: a sentence above the table.
    """

    def line(row: Sequence[str], tag: str) -> str:
        sides = ("left" if start else "right" for start in left)
        cells = (f'<{tag} style="text-align: {side}">{escape(cell)}</{tag}>' for cell, side in zip(row, sides))
        return f"<tr>{''.join(cells)}</tr>"

    head, *body = rows
    above = f"<p>{escape(caption)}</p>" if caption else ""
    return (
        f"{above}<table><thead>{line(head, 'th')}</thead><tbody>{''.join(line(r, 'td') for r in body)}</tbody></table>"
    )
