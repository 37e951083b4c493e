"""The one place where text becomes HTML.

Everything that came from outside (rows, model output, paths, error texts) passes `escape_text` on its way into a
notebook; no other module writes markup around such text.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence


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


class Bar:
    """A stacked bar of named parts against a limit, as a row of letters in a terminal and of colours in a notebook.

    Args:
        parts: size of each part, in the order of the bar.
        limit: where the bar should end; what goes beyond it is marked.
        unit: of the sizes.
        caption: a line above the bar.
    """

    WIDTH = 60
    """Characters from 0 to the limit, in text."""
    COLORS = (
        *("#2f81f7", "#79b8ff", "#8957e5", "#d2a8ff", "#e8710a", "#f2cc60"),
        *("#2ea043", "#7ee787", "#bf8700", "#ff9492", "#8c959f", "#57606a"),
    )
    """In turn. A part of size 0 keeps its letter and color and is not shown, so that others keep theirs."""

    def __init__(self, parts: Mapping[str, float], limit: float, unit: str, caption: str = ""):
        self.parts, self.limit, self.unit, self.caption = dict(parts), limit, unit, caption
        self.total = sum(self.parts.values())

    @property
    def summary(self) -> str:
        over = self.total - self.limit
        room = f"{over:.2f} {self.unit} too much" if over > 0 else f"{-over:.2f} {self.unit} left"
        return f"{self.total:.2f} of {self.limit:.2f} {self.unit}: {room}"

    def __str__(self) -> str:
        letters = "abcdefghijklmnopqrstuvwxyz"
        cells, ends, drawn = "", 0.0, 0
        for letter, size in zip(letters, self.parts.values(), strict=False):
            ends += size
            until = round(ends / (self.limit or 1) * self.WIDTH)
            cells += letter * (until - drawn)
            drawn = max(drawn, until)
        row = cells[: self.WIDTH].ljust(self.WIDTH, ".") + "|" + cells[self.WIDTH :][: self.WIDTH]
        names = [
            f"  {letter}  {size:7.2f}  {name}"
            for letter, (name, size) in zip(letters, self.parts.items(), strict=False)
            if size
        ]
        return "\n".join([*([self.caption] if self.caption else []), row, self.summary, *names])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        scale = 100 / max(self.total, self.limit, 1e-9)
        pieces, names = "", ""
        for i, (name, size) in enumerate(self.parts.items()):
            if not size:
                continue
            color = self.COLORS[i % len(self.COLORS)]
            label = escape_text(f"{name}: {size:.2f} {self.unit}")
            pieces += f"<div title='{label}' style='width:{size * scale:.2f}%;background:{color}'></div>"
            swatch = f"display:inline-block;width:0.8em;height:0.8em;background:{color};margin-right:4px"
            name = f"<span style='{swatch}'></span>{label}"
            names += f"<span style='display:inline-block;margin-right:1.2em'>{name}</span>"
        frame = "position:relative;display:flex;height:1.6em;border:1px solid #8888;max-width:60em"
        line = f"position:absolute;left:{self.limit * scale:.2f}%;top:-3px;bottom:-3px;border-left:2px solid #d1242f"
        words = escape_text(self.summary)
        return (
            f"<div style='margin:0.6em 0;max-width:60em'><div>{escape_text(self.caption)}</div>"
            f"<div role='img' aria-label='{words}' style='{frame}'>{pieces}<div style='{line}'></div></div>"
            f"<div>{words}</div><div style='line-height:1.6'>{names}</div></div>"
        )


def join(*parts: object) -> str:
    """The HTML of several pieces, one under the other; None is left out."""
    return "".join(part._repr_html_() for part in parts if part is not None)
