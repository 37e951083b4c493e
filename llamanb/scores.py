"""What a model does on the held-out rows before and after training, and what that says: plain data, shown as tables."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llamanb.html import Table, alert, join, visible

CHANCE = 2.3
"""Beyond this, a sum of differences between pairs is no accident: it would be farther from 0, in standard deviations,
than one in fifty whose signs were drawn. Six rows that agree reach it, five do not."""


class RowScore(NamedTuple):
    """What a model does on one held-out row. None where the row has no right answer to compare with."""

    nats: float
    """Cross entropy, summed over the row's trained tokens."""
    tokens: int
    """Trained ones."""
    answer: str = ""
    """Generated."""
    ended: bool | None = None
    """Whether the answer came to its end by itself, with an end token."""
    exact: bool | None = None
    """Whether the answer equals a reference: as SQuAD compares where rows are SQuAD's, else but for white space."""
    f1: float | None = None
    """SQuAD's F1 of answer and reference, 0 to 1; None for rows of other formats."""


@dataclass(frozen=True)
class Scores:
    """What a model does on the held-out rows."""

    rows: tuple[RowScore, ...]

    @classmethod
    def read(cls, fields: dict) -> Scores:
        """From what `dataclasses.asdict` gave, by way of JSON."""
        rows = [RowScore(*row) for row in fields["rows"]]
        return cls(tuple(row._replace(nats=float(row.nats), tokens=int(row.tokens)) for row in rows))

    @property
    def loss(self) -> float:
        """Cross entropy per trained token, in nats."""
        return sum(row.nats for row in self.rows) / sum(row.tokens for row in self.rows)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def exact_match(self) -> float | None:
        """Share of generated answers that are right; None where no row has a right answer."""
        return self._mean("exact")

    @property
    def f1(self) -> float | None:
        """Mean of SQuAD's F1, 0 to 1; None for rows of other formats."""
        return self._mean("f1")

    @property
    def ended(self) -> float | None:
        """Share of answers that came to their end by themselves."""
        return self._mean("ended")

    @property
    def answers(self) -> tuple[str, ...]:
        """Generated answers, in the order of the rows."""
        return tuple(row.answer for row in self.rows)

    def _mean(self, name: str) -> float | None:
        values = [value for row in self.rows if (value := getattr(row, name)) is not None]
        return sum(values) / len(values) if values else None


SCORES: tuple[tuple[str, str, str], ...] = (
    ("loss", "loss per token", ".3f"),
    ("perplexity", "perplexity", ".2f"),
    ("exact_match", "exact match", ".0%"),
    ("f1", "F1", ".0%"),
    ("ended", "answers that end by themselves", ".0%"),
)
"""Attributes of Scores, in words, and how they are written."""
BETTER, WORSE, MIXED, UNCLEAR = "better", "worse", "mixed", "no clear difference"


class Verdict(NamedTuple):
    """Whether training helped. Prints as a sentence."""

    word: str
    """BETTER, WORSE, MIXED or UNCLEAR."""
    why: str
    fix: str = ""

    def __str__(self) -> str:
        return visible(f"{self.word}: {self.why}" + (f"\n  fix: {self.fix}" if self.fix else ""))

    def _repr_html_(self) -> str:
        if self.fix:
            return alert("on held-out rows", self.word, {"why": self.why, "fix": self.fix})
        return join(Table(["on held-out rows", "why"], [[self.word, self.why]]))


@dataclass(frozen=True)
class Comparison:
    """Scores before and after, on the same held-out rows. Prints as a table and shows as one in a notebook."""

    before: Scores
    after: Scores
    questions: tuple[str, ...]
    references: tuple[str, ...]
    """One right answer a row; what really followed, where rows are plain text."""
    shown: int = 3
    """How many rows are shown in full."""

    def to_json(self) -> str:
        """Row by row, and for who opens it, the means."""
        fields = dataclasses.asdict(self)
        for name, scores in (("before", self.before), ("after", self.after)):
            fields[name] |= {score: getattr(scores, score) for score, _, _ in SCORES}
        return json.dumps(fields | {"verdict": self.verdict.word}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        fields = json.loads(text)
        scores = {name: Scores.read(fields[name]) for name in ("before", "after")}
        texts = {name: tuple(fields[name]) for name in ("questions", "references")}
        return cls(**scores, **texts, shown=fields["shown"])

    @property
    def verdict(self) -> Verdict:
        """Judged row by row, before against after, by the loss and by the answers."""
        pairs = list(zip(self.before.rows, self.after.rows, strict=True))
        loss = _judged(pairs, lambda row: -row.nats)
        right = _judged(pairs, lambda row: row.exact if row.f1 is None else row.f1)
        ended = _judged(pairs, lambda row: row.ended)
        found = {"loss": loss, "right answers": right, "answers that end by themselves": ended}
        said = [f"{words} {before} → {after}" for words, before, after in self._rows() if words != "perplexity"]
        why = f"{', '.join(said)}, on {len(pairs)} row{'s' * (len(pairs) != 1)} that training never saw"
        worse, better = ([name for name, sign in found.items() if sign == wanted] for wanted in (-1, 1))
        if worse:
            fix = "the model from before may serve you better; or train again with a lower learning rate or fewer steps"
            return Verdict(MIXED if better else WORSE, f"{why}. Worse: {', '.join(worse)}", fix)
        if better:
            return Verdict(BETTER, why)
        return Verdict(UNCLEAR, f"{why}. More rows would tell (eval_rows)")

    def tables(self) -> list[Table]:
        """The scores, and the first rows with their answers."""
        caption = f"{len(self.questions) or 'no'} rows that training never saw"
        tables = [Table(["held-out rows", "before", "after"], self._rows(), caption)]
        columns = self.questions, self.before.answers, self.after.answers, self.references
        if samples := list(zip(*columns, strict=False))[: self.shown]:
            tables.append(Table(["question", "before", "after", "right answer"], samples))
        return tables

    def _rows(self) -> list[tuple[str, str, str]]:
        both = [(words, form, getattr(self.before, name), getattr(self.after, name)) for name, words, form in SCORES]
        return [(words, f"{one:{form}}", f"{two:{form}}") for words, form, one, two in both if None not in (one, two)]

    def __str__(self) -> str:
        return "\n\n".join(map(str, (self.verdict, *self.tables())))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return join(self.verdict, *self.tables())


def _judged(pairs: Sequence[tuple[RowScore, RowScore]], value: Callable[[RowScore], float | None]) -> int:
    """1 where the rows' values rose by more than chance would have it, -1 where they fell, 0 where neither is sure.

    Paired: by chance, each row's difference has either sign, so their sum has the variance of the sum of squares.
    """
    both = [(value(before), value(after)) for before, after in pairs]
    differences = [after - before for before, after in both if None not in (before, after)]
    if not all(map(math.isfinite, differences)):
        return -1 if any(not math.isfinite(after) for _, after in both) else 1
    total, spread = sum(differences), math.sqrt(sum(d * d for d in differences))
    return 0 if abs(total) <= CHANCE * spread else round(math.copysign(1, total))
