"""Run: the folder a training leaves, and what can be shown of it, at once or when it is opened again."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import itertools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from llamanb import plots
from llamanb.errors import UNREADABLE, LlamanbError, RecipeError
from llamanb.html import Table, image, join, visible
from llamanb.layout import GIB, Plan
from llamanb.nvml import first_line
from llamanb.plots import Picture
from llamanb.scores import Comparison
from llamanb.timeline import Timeline, replace_text

RUNNING, FINISHED, INTERRUPTED = "running", "finished", "interrupted"
NAME = "name.json"
"""File that says for which name a run's folder was made."""
FILES = {
    "adapter": "what was trained, with tokenizer and model card",
    "model": "what was trained, with tokenizer and model card",
    "report.html": "all of this on one page",
    "recipe.json": "what was asked for",
    "plan.json": "how it ran",
    "metrics.csv": "loss, learning rate and tokens, step by step",
    "memory.csv": "memory, ten times a second in the first hour",
    "scores.json": "before and after",
    "checkpoints": "from which an unfinished run goes on",
    "memory_snapshot.pickle": "torch's allocator when memory ran out, for pytorch.org/memory_viz",
}


@dataclass(frozen=True)
class Run:
    """What came out of a training: where it lies and how it went."""

    folder: Path
    plan: Plan
    timeline: Timeline
    scores: Comparison | None = None
    """Before and after; None where no row was held out."""
    status: str = RUNNING
    """RUNNING, FINISHED, INTERRUPTED, or in words why it ended."""
    train_s: float = 0.0
    """Seconds from the first step to the last."""
    buckets_gib: dict[str, float] = field(default_factory=dict)
    """What lasts during training, measured: by bucket of the plan."""
    versions: dict[str, str] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    """How many were `trained on` and `held out`."""

    _FACTS = ("status", "train_s", "buckets_gib", "versions", "rows")

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """The run in a folder, whether it came to its end or not. Raises RecipeError where there is none."""
        folder = Path(folder).resolve()
        try:
            plan = Plan.from_json((folder / "plan.json").read_text(encoding="utf-8"))
            facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            return cls(folder, plan, Timeline.read(folder), _scores(folder / "scores.json"), **facts)
        except (*UNREADABLE, csv.Error, LlamanbError) as error:
            raise RecipeError(
                f"{folder} holds no run that can be shown",
                f"{type(error).__name__}: {first_line(error)}",
                "give the folder that train() printed, such as runs/quickstart",
            ) from None

    def save(self) -> None:
        """Writes what `open` reads, beside the plan and recipe that lie there from the start."""
        self.timeline.write(self.folder)
        if self.scores:
            replace_text(self.folder / "scores.json", self.scores.to_json())
        self.save_facts()

    def save_facts(self) -> None:
        """Writes how it stands, and nothing of what was watched."""
        facts = {name: getattr(self, name) for name in self._FACTS}
        replace_text(self.folder / "run.json", json.dumps(facts, indent=1))

    def replace(self, **changes) -> Run:
        return dataclasses.replace(self, **changes)

    @property
    def saved(self) -> Path:
        """The adapter, or the whole model after full fine-tuning."""
        return self.folder / ("adapter" if self.plan.recipe.adapters else "model")

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.timeline.steps]

    @property
    def peak_gib(self) -> float:
        """Highest memory sampled, all processes counted; host memory where there is no GPU."""
        return self.timeline.peak_gib

    @functools.cached_property
    def loss_plot(self) -> Picture:
        return plots.loss_picture(self.timeline)

    @functools.cached_property
    def memory_plot(self) -> Picture:
        return plots.memory_picture(self.timeline)

    @functools.cached_property
    def peaks_plot(self) -> Picture | None:
        """Predicted and measured peaks of each part of a step; None without a GPU."""
        if not (self.plan.memory and self.timeline.peaks_gib):
            return None
        planned = {part: size / GIB for part, size in self.plan.memory.parts.items()}
        return plots.peaks_picture(planned, self.timeline.peaks_gib, self.plan.limit_gib)

    def compare(self) -> Comparison:
        """Before and after on the held-out rows."""
        if self.scores is None:
            raise RecipeError("nothing to compare", "the recipe held no rows out", "set eval_rows = 64 and train again")
        return self.scores

    def files(self) -> Table:
        """Where everything lies."""
        rows = [(name, words) for name, words in FILES.items() if (self.folder / name).exists()]
        return Table(["file", "what it is"], rows, f"in {self.folder}")

    def __str__(self) -> str:
        steps = self.timeline.steps
        took = f" in {self.train_s:.0f} s" if self.train_s else ""  # only a training that came to its end has it
        took += f", the first one's end {steps[0].time_s:.0f} s after the start" if steps else ""
        text = f"{steps[-1].step if steps else 0} steps{took}, at most {self.peak_gib:.2f} GiB"
        ended = "" if self.status == FINISHED else f" ({self.status})"
        more = "".join(f"; {words}" for words in (self.timeline.upsets, self.timeline.cards) if words)
        return visible(f"{text}{ended}{more}; in {self.folder}")

    __repr__ = __str__

    def _repr_html_(self) -> str:
        pictures = [p for p in (self.memory_plot, self.peaks_plot, self.loss_plot) if p]
        summary = Table(["run"], [[str(self)]])
        return join(summary) + "".join(image(p.png, p.words) for p in pictures) + join(self.scores)


def show_run(path: str | Path) -> Run:
    """A run redrawn from its folder: memory, loss and scores, as far as it came.

    Raises RecipeError where the folder holds no run.
    """
    return Run.open(path)


def new_folder(runs: Path, name: str) -> Path:
    """Makes `runs`/`name`, or `name`-2, -3 and so on after the last run of that name.

    Raises RecipeError for a name that is more than letters, digits, dots, dashes and underscores (a run stays in its
    folder), and for one whose folder was made for another name.
    """
    for number in itertools.count(max(numbered(runs, name), default=0) + 1):
        folder = runs / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            replace_text(folder / NAME, json.dumps({"name": name, "folder": folder.name}))
            return folder.resolve()


def newest_folder(runs: Path, name: str) -> Path | None:
    """The last of the folders that `new_folder` made for that name; None where there is none. Raises like it."""
    numbers = numbered(runs, name)
    return numbers[max(numbers)] if numbers else None


def numbered(runs: Path, name: str) -> dict[int, Path]:
    """The folders that `new_folder` made for a name, by their number. Raises like it."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", name):
        raise RecipeError(
            f"a run cannot be named {name!r}",
            "the name becomes a folder: letters, digits, dots, dashes and underscores, a letter or digit first",
            "name = 'my-first-run'",
        )
    found = {}
    for path in runs.glob(f"{name}*"):
        match = re.fullmatch(r"(?:-([2-9]|[1-9]\d{1,9}))?", path.name.removeprefix(name))
        if match and path.is_dir() and not path.is_symlink():
            if (other := _name_of(path)) in (name, None):
                found[int(match[1] or 1)] = path
            elif path.name == name:
                raise RecipeError(
                    f"{path} is a run of {other!r}", "a run has one name", f"name = {other!r}, or another"
                )
    return found


def _name_of(folder: Path) -> str | None:
    """The name that a run's folder was made for: `exp-2` may be the second one of `exp`. None where nobody noted it, or
    the folder was renamed since."""
    try:
        noted = json.loads((folder / NAME).read_text(encoding="utf-8"))
        return noted["name"] if noted["folder"] == folder.name else None
    except UNREADABLE:
        return None


def _scores(path: Path) -> Comparison | None:
    return Comparison.from_json(path.read_text(encoding="utf-8")) if path.exists() else None
