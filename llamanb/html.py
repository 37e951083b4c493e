"""The one place where text becomes HTML.

Everything that came from outside (rows, model output, paths, error texts) passes `escape_text` on its way into a
notebook; no other module writes markup around such text.
"""

from __future__ import annotations

import base64
import html
import unicodedata
from collections.abc import Mapping, Sequence

KEPT = "\n\t\u200c\u200d"
"""Of what has no shape of its own: line breaks, and the joiners that Persian, Hindi and emoji are written with."""
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode's categories of control characters (ANSI escapes begin with one), of what turns the direction of text or
does not show, of halves of characters, and of its other line breaks."""


def visible(text: object) -> str:
    """The text with a replacement character for each one that would hide, reorder or break it in a terminal or page."""
    characters = str(text).replace("\r\n", "\n")
    return "".join(
        c if c in KEPT or unicodedata.category(c) not in HIDDEN else "\N{REPLACEMENT CHARACTER}" for c in characters
    )


def escape_attribute(text: object) -> str:
    """Makes any text safe to stand in the quotes of an attribute."""
    return html.escape(visible(text), quote=True)


def escape_text(text: object) -> str:
    """Makes any text safe to stand in HTML: markup, control characters and MathJax delimiters show as themselves.

    Links of any kind (addresses, Markdown's, a notebook's `command:`) stay words: HTML makes none of them by itself.
    """
    escaped = escape_attribute(text)
    for delimiter in ("$", "\\"):  # an element between the two characters of a delimiter keeps MathJax from seeing it
        escaped = escaped.replace(delimiter, f"<span>{delimiter}</span>")
    return escaped


def paragraph(text: object) -> str:
    """Text that wraps where it must and keeps its own line breaks."""
    style = "margin:0.3em 0;white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.5"
    return f"<div style='{style}'>{escape_text(text)}</div>"


def alert(kind: str, what: object, parts: Mapping[str, object], below: str = "") -> str:
    """What went wrong, as a card.

    Args:
        kind: a word for it.
        what: the heading.
        parts: named texts under it.
        below: HTML that ends the card.
    """
    frame = "border:1px solid #8888;border-left:5px solid #d1242f;border-radius:4px;padding:0.6em 1em 0.3em"
    names = "".join(f"<b>{escape_text(name)}</b>{paragraph(text)}" for name, text in parts.items())
    grid = "display:grid;grid-template-columns:max-content 1fr;column-gap:1em;align-items:baseline;margin-bottom:0.6em"
    return (
        f"<div role='alert' style='{frame};margin:0.3em 0;max-width:60em'><div style='opacity:0.75'>{escape_text(kind)}"
        f"</div><div role='heading' aria-level='3' style='font-weight:bold;font-size:1.15em;margin-bottom:0.4em'>"
        f"{paragraph(what)}</div><div style='{grid}'>{names}</div>{below}</div>"
    )


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
        cells = [[visible(cell).replace("\n", " ") for cell in row] for row in [self.headers, *self.rows]]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.headers))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        caption = [visible(self.caption)] if self.caption else []
        return "\n".join([*caption, lines[0], "-" * len(lines[0]), *lines[1:]])

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
        return visible("\n".join([*([self.caption] if self.caption else []), row, self.summary, *names]))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        scale = 100 / max(self.total, self.limit, 1e-9)
        pieces, names = "", ""
        for i, (name, size) in enumerate(self.parts.items()):
            if not size:
                continue
            color = self.COLORS[i % len(self.COLORS)]
            label = f"{name}: {size:.2f} {self.unit}"
            part = f"width:{size * scale:.2f}%;background:{color}"
            pieces += f"<div title='{escape_attribute(label)}' style='{part}'></div>"
            swatch = f"display:inline-block;width:0.8em;height:0.8em;background:{color};margin-right:4px"
            name = f"<span style='{swatch}'></span>{escape_text(label)}"
            names += f"<span style='display:inline-block;margin-right:1.2em'>{name}</span>"
        frame = "position:relative;display:flex;height:1.6em;border:1px solid #8888;max-width:60em"
        line = f"position:absolute;left:{self.limit * scale:.2f}%;top:-3px;bottom:-3px;border-left:2px solid #d1242f"
        words = escape_attribute(self.summary)
        return (
            f"<div style='margin:0.6em 0;max-width:60em'><div>{escape_text(self.caption)}</div>"
            f"<div role='img' aria-label='{words}' style='{frame}'>{pieces}<div style='{line}'></div></div>"
            f"<div>{escape_text(self.summary)}</div><div style='line-height:1.6'>{names}</div></div>"
        )


def join(*parts: object) -> str:
    """The HTML of several pieces, one under the other; None is left out."""
    return "".join(part._repr_html_() for part in parts if part is not None)


def progress(done: float, words: str) -> str:
    """A bar of how much is done, from 0 to 1, and words under it."""
    share = f"{100 * min(max(done, 0.0), 1.0):.0f}"
    bar = f"<progress max='100' value='{share}' aria-label='{share} % done' style='width:100%'></progress>"
    return f"<div style='max-width:60em'>{bar}<div>{escape_text(words)}</div></div>"


def image(png: bytes, words: str) -> str:
    """A picture inside the page, with what it shows in words."""
    data = base64.b64encode(png).decode()
    return f"<img alt='{escape_attribute(words)}' src='data:image/png;base64,{data}' style='max-width:100%'>"


def heading(text: object) -> str:
    return f"<h2>{escape_text(text)}</h2>"


def page(title: str, *parts: str) -> str:
    """A whole document that needs nothing beside it, for a screen, light or dark, and for paper."""
    style = (
        ":root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;"
        "padding:0 1em}table{border-collapse:collapse;margin:0.6em 0}th,td{padding:0.2em 0.8em 0.2em 0;"
        "border-bottom:1px solid #8884}pre{white-space:pre-wrap}caption{margin-bottom:0.3em}"
        "@media print{body{margin:0;max-width:none}h2{break-after:avoid}table,img{break-inside:avoid}}"
    )
    head = "<meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
    head += f"<title>{escape_attribute(title)}</title>"
    body = f"<h1>{escape_text(title)}</h1>" + "".join(parts)
    return f"<!doctype html><html lang='en'><head>{head}<style>{style}</style></head><body>{body}</body></html>"


def marked(pieces: Sequence[tuple[object, bool]]) -> str:
    """Pieces of text one after the other: marked ones underlined on green, the others on grey, both in two shades in
    turn, so that it shows where one ends."""
    shown = ""
    for i, (text, is_marked) in enumerate(pieces):
        tag, shades = ("u", ("#2ea04340", "#2ea04380")) if is_marked else ("span", ("#8c8c8c20", "#8c8c8c48"))
        shown += f"<{tag} style='background:{shades[i % 2]};padding:2px 0'>{escape_text(text)}</{tag}>"
    return (
        "<div style='white-space:pre-wrap;overflow-wrap:anywhere;font-family:monospace;line-height:1.8;max-width:60em;"
        f"margin:0.5em 0'>{shown}</div>"
    )
