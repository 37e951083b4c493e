"""The one place where text becomes HTML.

Everything that came from outside (rows, model output, paths, error texts) passes `escape_text` on its way into a
notebook; no other module writes markup around such text.
"""

from __future__ import annotations

import html
from collections.abc import Sequence


def escape_text(text: object) -> str:
    """Makes any text safe to stand in HTML: markup, control characters and MathJax delimiters show as themselves."""
    visible = "".join(c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    escaped = html.escape(visible, quote=True)
    for delimiter in ("$", "\\"):  # an element between the two characters of a delimiter keeps MathJax from seeing it
        escaped = escaped.replace(delimiter, f"<span>{delimiter}</span>")
    return escaped


def paragraph(text: object) -> str:
    """Text that wraps where it must and keeps its own line breaks."""
    return f"<div style='white-space:pre-wrap;line-height:1.5'>{escape_text(text)}</div>"


class Table:
    """Rows under headers, as aligned text in a terminal and as a table in a notebook.

    Args:
        headers: one name a column.
        rows: cells, one a column; shown with `str`.
        caption: a line above the table.
    """

    def __init__(self, headers: Sequence[str], rows: Sequence[Sequence[object]], caption: str = ""):
        self.headers, self.rows, self.caption = list(headers), [list(row) for row in rows], caption

    def __str__(self) -> str:
        cells = [[str(cell).replace("\n", " ") for cell in row] for row in [self.headers, *self.rows]]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.headers))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        return "\n".join(([self.caption] if self.caption else []) + [lines[0], "-" * len(lines[0]), *lines[1:]])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        style = "text-align:left;vertical-align:top;white-space:pre-wrap;max-width:36em"
        head = "".join(f"<th style='{style}'>{escape_text(name)}</th>" for name in self.headers)
        body = "".join(
            "<tr>" + "".join(f"<td style='{style}'>{escape_text(cell)}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        caption = f"<caption style='text-align:left'>{escape_text(self.caption)}</caption>" if self.caption else ""
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
