"""Timeline: what a run was seen to do. Memory and phase ten times a second and later less often, loss and tokens step
by step, the highest memory of each phase. Plain data, written into the run's folder as it grows, so that a run that
died can be shown too.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import math
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

MEMORY, METRICS, FACTS = "memory.csv", "metrics.csv", "timeline.json"


class Sample(NamedTuple):
    """One look at the memory."""

    time_s: float
    """Since the run began."""
    phase: str
    used_gib: float
    allocated_gib: float | None
    """What torch's tensors take on the GPU; None without one."""
    reserved_gib: float | None
    """What torch's allocator holds for them; None without a GPU."""


class Step(NamedTuple):
    """One optimizer step."""

    step: int
    time_s: float
    loss: float
    """Per trained token, in nats."""
    learning_rate: float
    grad_norm: float
    tokens: int
    """Trained on so far, padding left out."""
    scale: float = 1.0
    """What fp16's GradScaler multiplied the loss by; 1 without one."""
    stall_s: float = 0.0
    """Of the step, waited for the weights of streamed layers."""

    @property
    def skipped(self) -> bool:
        """Whether loss or gradients were not finite, so that the weights stayed as they were."""
        return not (math.isfinite(self.loss) and math.isfinite(self.grad_norm))


@dataclass
class Timeline:
    """A run as it was watched."""

    source: str
    """What `used_gib` counts, in words."""
    limit_gib: float | None = None
    """What there is; None where it does not matter."""
    planned_gib: float | None = None
    """What the plan said torch would reserve."""
    samples: list[Sample] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    peaks_gib: dict[str, float] = field(default_factory=dict)
    """Highest allocated memory of each phase, by torch's own counter; empty without a GPU."""
    missing: str = ""
    """What could not be watched to the end, in words."""
    returns: list[list[int]] = field(default_factory=list)
    """For each time that the run went back to a checkpoint, with half the learning rate: from which step, to which."""
    cards_gib: list[float] = field(default_factory=list)
    """Most that torch reserved on each card, where several train together; empty else."""
    phase: str = "import"
    """What the run does now."""

    def __post_init__(self):
        self._begin_s = time.monotonic()
        self.peak_gib = max((sample.used_gib for sample in self.samples), default=0.0)
        """Most memory in use at any look, every process counted."""
        self._resumed = 0
        """Steps of earlier sessions."""
        self._written: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()

    @property
    def time_s(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._begin_s

    def follow(self, folder: Path, steps: Iterable[Step], returns: list[list[int]]) -> None:
        """Goes on after these steps and returns, time and all, with the memory until then and the later returns that
        the files in `folder` show, as far as they can be read."""
        self.steps[:], self.returns = steps, returns
        self._resumed, end_s = len(self.steps), self.steps[-1].time_s
        with contextlib.suppress(OSError, ValueError, TypeError, csv.Error):
            earlier = Timeline.read(folder)
            self.peaks_gib, self.returns = earlier.peaks_gib, max(returns, earlier.returns, key=len)
            for sample in itertools.takewhile(lambda sample: sample.time_s <= end_s, earlier.samples):
                self.add(sample)
        self._begin_s = time.monotonic() - end_s

    def go_back(self, steps: Sequence[Step]) -> None:
        """Forgets what came after these steps, but for the time it took, and notes the return."""
        self.returns.append([self.steps[-1].step, steps[-1].step])
        with self._lock:
            self.steps[:], self._resumed = steps, len(steps)
            self._written.pop(METRICS, None)

    def add(self, sample: Sample) -> None:
        self.samples.append(sample)
        self.peak_gib = max(self.peak_gib, sample.used_gib)

    def misses(self, words: str) -> None:
        """Says what can no longer be watched."""
        self.missing = f"{self.missing}. {words}" if self.missing else words

    @property
    def phases(self) -> list[str]:
        """Every phase that a sample fell into, in the order of their first."""
        return list(dict.fromkeys(sample.phase for sample in list(self.samples)))

    @property
    def upsets(self) -> str:
        """What was not finite and what became of it, in words; empty where all was."""
        skipped = sum(step.skipped for step in self.steps)
        words = [f"{skipped} skipped, not finite"] if skipped else []
        if skipped and self.steps[0].scale > 1:
            words[0] += f" (fp16's scale {self.steps[0].scale:g} at first, now {self.steps[-1].scale:g})"
        words += [f"back from step {now} to {then} with half the learning rate" for now, then in self.returns]
        return ", ".join(words)

    @property
    def cards(self) -> str:
        """Each card's peak, in words; empty for one card, and without a GPU."""
        peaks = " | ".join(f"{gib:.2f}" for gib in self.cards_gib)
        return f"cards at most {peaks} GiB" if any(self.cards_gib) else ""

    @property
    def tokens_per_s(self) -> float | None:
        """Real tokens a second since this session's first step, which also warms up; None before the second."""
        if len(self.steps) < self._resumed + 2:
            return None
        first, last = self.steps[self._resumed], self.steps[-1]
        return (last.tokens - first.tokens) / max(last.time_s - first.time_s, 1e-9)

    def write(self, folder: Path) -> None:
        """Appends what is new to the run's files. Raises OSError; what was cut off then is written again later."""
        with self._lock:
            self._append(folder / MEMORY, Sample._fields, list(self.samples))
            self._append(folder / METRICS, Step._fields, list(self.steps))
            facts = {name: getattr(self, name) for name in self._FACTS}
            replace_text(folder / FACTS, json.dumps(facts, indent=1))

    _FACTS = ("source", "limit_gib", "planned_gib", "peaks_gib", "missing", "returns", "cards_gib")

    def _append(self, path: Path, header: Iterable[str], rows: list) -> None:
        done, size = self._written.get(path.name, (0, 0))
        text = io.StringIO(newline="")
        csv.writer(text).writerows([*([] if size else [header]), *rows[done:]])
        new = text.getvalue().encode()
        place = path if size else path.with_name(f"{path.name}.new")
        with place.open("r+b" if size else "wb") as file:
            file.truncate(size)  # half a row of a disk that was full
            file.seek(size)
            file.write(new)
        place.replace(path)  # what an earlier session wrote is there until then
        self._written[path.name] = (len(rows), size + len(new))

    @classmethod
    def read(cls, folder: Path) -> Timeline:
        """The timeline of a run's folder; a last line that was cut off is left out. Raises OSError and ValueError."""
        made = cls(**json.loads((folder / FACTS).read_text(encoding="utf-8")))
        for time_s, phase, *numbers in _rows(folder / MEMORY, {len(Sample._fields)}):
            made.add(Sample(float(time_s), phase, *(float(n) if n else None for n in numbers)))
        columns = len(Step._fields)  # runs of before have no stalls
        for step, *seen in _rows(folder / METRICS, {columns - 1, columns}):
            made.steps.append(Step(int(step), *map(float, seen[:4]), int(seen[4]), *map(float, seen[5:])))
        made.phase, made.returns = "over", [[int(began), int(end)] for began, end in made.returns]
        return made


def replace_text(path: Path, text: str) -> None:
    """Writes a file in one go: a process that dies meanwhile leaves the old one whole."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def _rows(path: Path, columns: set[int]) -> Iterator[list[str]]:
    written = path.read_bytes()
    whole = written[: written.rfind(b"\n") + 1].decode("utf-8")  # half a number is a number too
    rows = csv.reader(io.StringIO(whole, newline=""))
    next(rows, None)
    yield from (row for row in rows if len(row) in columns)
