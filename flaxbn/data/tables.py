"""Rows of text as a table: aligned for terminals, as HTML for notebooks."""

from collections.abc import Sequence
from html import escape

Rows = Sequence[Sequence[str]]
"""The cells of a table; its first row is the head."""


def as_text(rows: Rows, left: Sequence[bool]) -> str:
    """A line for each row; columns are two spaces apart, set to the left where `left` says so, else to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(cell.ljust(w) if start else cell.rjust(w) for cell, w, start in zip(row, widths, left)).rstrip()
        for row in rows
    )


def as_html(rows: Rows, left: Sequence[bool], caption: str = "") -> str:
    """The same as an HTML table, under a caption."""

    def line(row: Sequence[str], tag: str) -> str:
        sides = ("left" if start else "right" for start in left)
        cells = (f'<{tag} style="text-align: {side}">{escape(cell)}</{tag}>' for cell, side in zip(row, sides))
        return f"<tr>{''.join(cells)}</tr>"

    head, *body = rows
    above = f"<p>{escape(caption)}</p>" if caption else ""
    return (
        f"{above}<table><thead>{line(head, 'th')}</thead><tbody>{''.join(line(r, 'td') for r in body)}</tbody></table>"
    )
