"""What was measured of each variant: a table that says what saves what, a picture, and the one that is chosen."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from llamanb.errors import RecipeError
from llamanb.html import Table
from llamanb.plots import Picture
from llamanb.shrink.picture import shrink_picture
from llamanb.shrink.prune import UNSTRUCTURED
from llamanb.shrink.speed import try_two_of_four
from llamanb.shrink.write import require_free

DENSE = "dense"
NOTES = {
    DENSE: "as it was",
    "unstructured": "zeros take as much room as other numbers: no memory is saved by themselves",
    "2:4": "as large with zeros as without; {kernel}",
    "structured": "smaller shapes: less on disk, loaded, and in training",
    "low rank": "loads smaller; trains as its products, as large as the dense one",
}
BESIDE = "; recovered with the adapter beside it, for a merge would fill the zeros"
MB, MIB_A_GIB = 1e6, 1024


@dataclass(frozen=True)
class State:
    """One model, measured as it lies on disk."""

    folder: str
    adapter: str | None
    """Folder of an adapter that is loaded with it."""
    disk: int
    """Bytes of all weights."""
    loaded: int
    """Bytes of the parameters in memory, in the dtype that they compute in here."""
    loaded_s: float
    tokens_per_s: float
    loss: float
    """Nats per trained token of the held-out rows."""
    exact_match: float | None
    kept: float | None = None
    """Factored: share of the linear layers' parameters."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class Row:
    """A variant before and after its recovery."""

    method: str
    share: float
    """What goes; for the SVDs, what stays."""
    before: State | None = None
    after: State | None = None
    """None where nothing was recovered."""
    planned_gib: float | None = None
    """What a training of it is planned to reserve."""
    trained_gib: float | None = None
    """What its recovery took: the highest peak on a GPU, on a CPU what lasts from step to step."""
    failed: str = ""

    @property
    def name(self) -> str:
        return DENSE if self.method == DENSE else f"{self.method} {self.share:.0%}"

    @property
    def kind(self) -> str:
        """Which of NOTES holds."""
        if self.method == DENSE or "2:4" in self.method:
            return DENSE if self.method == DENSE else "2:4"
        if "SVD" in self.method:
            return "low rank"
        return "unstructured" if self.method in UNSTRUCTURED else "structured"

    @classmethod
    def from_dict(cls, fields: dict) -> Row:
        return cls(**fields | {name: State(**fields[name]) if fields[name] else None for name in ("before", "after")})

    def __str__(self) -> str:
        if self.failed:
            return f"{self.name}: {self.failed}"
        recovered = f", {self.after.perplexity:.4g} recovered" if self.after else ""
        size = f"{self.before.disk / MB:.3g} MB on disk"
        return f"{self.name}: perplexity {self.before.perplexity:.4g}{recovered}, {size}"


@dataclass(frozen=True)
class Shrunken:
    """All variants, the dense model first."""

    rows: list[Row]
    card: str
    """Whose memory a training was planned for."""

    def table(self) -> Table:
        """Bytes, memory, speed and scores; and what is saved where."""
        kernel = try_two_of_four() if any(row.kind == "2:4" for row in self.rows) else ""
        headers = ["variant", "MB on disk", "MB loaded", f"MiB to train on {self.card}, planned", "measured here"]
        headers += ["tokens/s", "perplexity", "exact match", "recovered: MB on disk", "tokens/s", "perplexity"]
        headers += ["exact match", "what is saved"]
        lines = []
        for row in self.rows:
            note = row.failed or NOTES[row.kind].format(kernel=kernel)
            note += BESIDE if row.after and row.after.adapter else ""
            sizes = [f"{row.before.disk / MB:.4g}", f"{row.before.loaded / MB:.4g}"] if row.before else ["", ""]
            sizes += [f"{gib * MIB_A_GIB:,.4g}" if gib else "" for gib in (row.planned_gib, row.trained_gib)]
            after = [f"{row.after.disk / MB:.4g}", *_figures(row.after)] if row.after else [""] * 4
            lines.append([row.name, *sizes, *(_figures(row.before) if row.before else [""] * 3), *after, note])
        return Table(headers, lines, "before and after recovery, on rows that training never saw")

    def picture(self) -> Picture:
        """Quality against what was taken away, one plot a method; recovered above it."""
        methods: dict[str, list[Row]] = {}
        for row in self.rows[1:]:
            if row.before:
                methods.setdefault(row.method, []).append(row)
        return shrink_picture({name: self._curves(rows) for name, rows in methods.items()})

    def apply(self, name: str, to: str | Path, *, recovered: bool = True) -> Path:
        """Writes the chosen variant: a folder of weights, with its adapter in it where that is no part of them.

        Args:
            name: of a row.
            to: the folder to make.
            recovered: with what a recovery regained, where there was one.

        Raises RecipeError where there is no such variant, or `to` is taken.
        """
        found = {row.name: row for row in self.rows if row.before}
        if name not in found:
            raise RecipeError(f"no variant is called {name!r}", f"these are: {', '.join(found)}", "take one of those")
        row, target = found[name], require_free(to)
        state = row.after if recovered and row.after else row.before
        shutil.copytree(state.folder, target)
        if state.adapter:
            shutil.copytree(state.adapter, target / "adapter")
        return target

    def quality(self, state: State) -> float:
        """The dense model's perplexity by this one's: 1 is as good."""
        return math.exp(min(self.rows[0].before.loss - state.loss, 700.0))

    def _curves(self, rows: list[Row]) -> dict[str, list[tuple[float, float]]]:
        """(share, quality) before and after, from the dense model on. An adapter makes factors larger: those stand at
        what they came to."""
        dense, whole = self.rows[0], 1.0 if rows[0].kind == "low rank" else 0.0
        curves = {"as written": [(whole, 1.0)], "recovered": []}
        if dense.after:
            curves["recovered"].append((whole, self.quality(dense.after)))
        for row in sorted(rows, key=lambda row: abs(row.share - whole)):
            curves["as written"].append((row.share, self.quality(row.before)))
            if row.after:
                curves["recovered"].append((row.after.kept or row.share, self.quality(row.after)))
        return {name: points for name, points in curves.items() if points}

    def __str__(self) -> str:
        return str(self.table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _figures(state: State) -> list[str]:
    match = "" if state.exact_match is None else f"{state.exact_match:.0%}"
    return [f"{state.tokens_per_s:,.0f}", f"{state.perplexity:.4g}", match]
