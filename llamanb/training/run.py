"""Run: the folder a training leaves, and what can be shown of it."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from llamanb.errors import RecipeError
from llamanb.evaluate import Comparison
from llamanb.html import Table
from llamanb.layout import Plan
from llamanb.plots import Picture


@dataclass(frozen=True)
class Run:
    """What came out of a training: where it lies and how it went."""

    folder: Path
    plan: Plan
    steps: list[int]
    losses: list[float]
    loss_plot: Picture
    memory_plot: Picture
    saved: Path
    """The adapter, or the whole model after full fine-tuning."""
    scores: Comparison | None
    """Before and after; None where no row was held out."""
    train_s: float
    """Seconds from the first step to the last."""
    peak_gib: float
    """Highest memory sampled, all processes counted; host memory where there is no GPU."""

    def compare(self) -> Comparison:
        """Before and after on the held-out rows."""
        if self.scores is None:
            raise RecipeError("nothing to compare", "the recipe held no rows out", "set eval_rows = 64 and train again")
        return self.scores

    def files(self) -> Table:
        """Where everything lies."""
        what = {
            self.saved.name: "what was trained, with tokenizer and model card",
            "recipe.json": "what was asked for",
            "plan.json": "how it ran",
            "metrics.csv": "loss and learning rate, step by step",
            "memory.csv": "memory, ten times a second",
            "loss.png": "the loss curve",
            "memory.png": "the memory plot",
            "scores.txt": "before and after",
        }
        rows = [(name, words) for name, words in what.items() if (self.folder / name).exists()]
        return Table(["file", "what it is"], rows, f"in {self.folder}")

    def __str__(self) -> str:
        steps = self.steps[-1] if self.steps else 0
        return f"{steps} steps in {self.train_s:.0f} s, at most {self.peak_gib:.2f} GiB; in {self.folder}"

    __repr__ = __str__


def new_folder(runs: Path, name: str) -> Path:
    """Makes `runs`/`name`, or `name`-2, -3 and so on where a run of that name is there already.

    Raises RecipeError for a name that is more than letters, digits, dots, dashes and underscores: a run stays in its
    folder.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", name):
        raise RecipeError(
            f"a run cannot be named {name!r}",
            "the name becomes a folder: letters, digits, dots, dashes and underscores, a letter or digit first",
            "name = 'my-first-run'",
        )
    number = 1
    while True:
        folder = runs / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder.resolve()


def write_csv(path: Path, header: tuple[str, ...], rows) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
