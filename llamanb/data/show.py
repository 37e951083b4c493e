"""A row as the model sees it: each token, and which of them are learned."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from llamanb.data.encode import IGNORE, Encoded
from llamanb.html import marked, paragraph, visible

SEEN = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥"})
MARKS = "· is a space, ↵ a new line, ⇥ a tab"
MOST_TOKENS = 300
"""Of a longer row the middle is left out, and counted."""


class Tokens:
    """The tokens of one row: learned ones underlined on green in a notebook, between « and » in a terminal."""

    def __init__(self, tokenizer, row: Encoded):
        total = len(row.input_ids)
        head = tail = total
        if total > MOST_TOKENS:  # how the row begins, and how its last answer ends
            head, tail = MOST_TOKENS * 2 // 3, total - MOST_TOKENS // 3
        self.head, self.tail = list(_pieces(tokenizer, row, 0, head)), list(_pieces(tokenizer, row, tail, total))
        self.summary = f"{row.trained_tokens:,} of {total:,} tokens are learned"
        learned = sum(label != IGNORE for label in row.labels[head:tail])
        self.gap = f"… {tail - head:,} tokens are not shown, {learned:,} of them learned …" if tail > head else ""

    def __str__(self) -> str:
        shown = [_bracketed(self.head)] + ([self.gap, _bracketed(self.tail)] if self.gap else [])
        return "\n".join([f"{self.summary}, those between « and »; {MARKS}", *shown])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        legend = marked([("learned: green, underlined\n", True), ("only read: grey", False)])
        shown = marked(self.head) + (paragraph(self.gap) + marked(self.tail) if self.gap else "")
        return paragraph(f"{self.summary}; {MARKS}") + legend + shown


def _pieces(tokenizer, row: Encoded, start: int, end: int) -> Iterator[tuple[str, bool]]:
    """What each token adds to the text, and whether it is learned; the tokens of one letter come as one piece."""
    before: list[int] = []
    while start < end:
        for stop in range(start + 1, min(start + 4, end) + 1):  # a letter is four bytes, so four tokens, at most
            ids = row.input_ids[start:stop]
            text = tokenizer.decode(before + ids)[len(tokenizer.decode(before)) :]
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                break
        yield _seen(text), row.labels[start] != IGNORE
        before, start = ids, stop


def _seen(text: str) -> str:
    return visible(text).translate(SEEN) + "\n" * ("\n" in text)


def _bracketed(pieces: list[tuple[str, bool]]) -> str:
    runs = [("".join(text for text, _ in run), learned) for learned, run in groupby(pieces, lambda piece: piece[1])]
    return "".join(f"«{text}»" if learned else text for text, learned in runs).rstrip("\n")
