"""`report.html` of a run: one page that needs nothing beside it, made from the run's folder alone."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shlex
import statistics
from pathlib import Path

from llamanb import REPOSITORY, __version__
from llamanb.html import Table, heading, image, join, page, paragraph
from llamanb.layout import GIB
from llamanb.run import Run
from llamanb.tape import BUCKETS

REPORT = "report.html"


def write_report(run: Run) -> Path:
    """Writes `report.html` into the run's folder and returns its path."""
    path = run.folder / REPORT
    path.write_text(report(run), encoding="utf-8")
    return path


def report(run: Run) -> str:
    """The page."""
    recipe = Table(["recipe", ""], [*dataclasses.asdict(run.plan.recipe).items()])
    parts = [paragraph(str(run)), heading("Plan"), join(run.plan.table(), run.plan.bar())]
    if run.peaks_plot:
        parts += [heading("Planned and measured"), join(peaks_table(run), buckets_table(run)), _picture(run.peaks_plot)]
    if run.plan.time and len(run.timeline.steps) > 1:
        parts.append(join(times_table(run)))
    parts += [heading("Memory over time"), _picture(run.memory_plot), heading("Loss"), _picture(run.loss_plot)]
    if run.scores:
        parts += [heading("Before and after"), join(*run.scores.tables())]
    parts += [heading("Recipe"), join(recipe), heading("Versions"), join(_versions(run))]
    parts += [heading("The same again"), paragraph(again(run))]
    return page(f"{run.folder.name}: {run.plan.recipe.model}", *parts)


def peaks_table(run: Run) -> Table:
    """Allocated memory at the peak of each part of a step."""
    planned, seen = run.plan.memory.parts, run.timeline.peaks_gib
    rows = [
        [part, f"{size / GIB:.2f}", f"{seen[part]:.2f}", f"{seen[part] * GIB / size - 1:+.1%}" if size else ""]
        for part, size in planned.items()
        if part in seen
    ]
    return Table(["part of a step", "planned, GiB", "measured, GiB", "difference"], rows)


def buckets_table(run: Run) -> Table:
    """Memory at the highest peak by bucket: what lasts was counted, the rest is what it leaves of the measured peak."""
    planned = {name: run.plan.memory.buckets.get(name, 0) / GIB for name in BUCKETS}
    seen = run.buckets_gib
    rows = [[name, f"{planned[name]:.3f}", f"{size:.3f}"] for name, size in seen.items()]
    parts = [part for part in run.plan.memory.parts if part != "load"]  # nothing of that was there yet
    rest = max(run.timeline.peaks_gib.get(part, 0.0) for part in parts) - sum(seen.values())
    others = [name for name in BUCKETS if name not in seen]
    rows.append([", ".join(others), f"{sum(planned[name] for name in others):.3f}", f"{rest:.3f}"])
    return Table(["at the highest peak", "planned, GiB", "measured, GiB"], rows)


def times_table(run: Run) -> Table:
    """Seconds of a step, and of waiting for streamed weights in it: the middle one of all steps but the first."""
    steps, planned = run.timeline.steps, run.plan.time
    apart = statistics.median(now.time_s - then.time_s for then, now in itertools.pairwise(steps))
    rows = [["a step", planned.step_s, apart]]
    if run.plan.streamed:
        rows.append(["of it, waiting for weights", planned.stall_s, statistics.median(s.stall_s for s in steps[1:])])
    cells = [[name, f"{expected:.3f}", f"{seen:.3f}"] for name, expected, seen in rows]
    return Table(["time", "planned, s", "measured, s"], cells)


def again(run: Run) -> str:
    """The command that makes the same run."""
    recipe = shlex.quote(str(run.folder / "recipe.json"))
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", run.folder.name) + "-again"
    command = f"papermill notebooks/04_train.ipynb again.ipynb -p recipe_file {recipe} -p name {name}"
    where = f"in a clone of {REPOSITORY} at v{__version__}, on such a card and with the versions above"
    return f"{command}\n\n{where}; what was chosen beside the recipe (a card, a kernel) has to be chosen again"


def _versions(run: Run) -> Table:
    return Table(["package", "version"], [*run.versions.items(), ("card", run.plan.card.name)])


def _picture(picture) -> str:
    return image(picture.png, picture.words)
