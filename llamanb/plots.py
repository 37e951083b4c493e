"""Every figure, readable on light and dark backgrounds: transparent, in colours that stand out on both."""

from __future__ import annotations

import io
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from llamanb.html import visible
from llamanb.timeline import Timeline

INK = "#7a7a7a"
MEMORY, TORCH, LOSS, PLANNED, LIMIT = "#2f81f7", "#a371f7", "#e8710a", "#1a9e96", "#d1242f"
PHASES = {
    "import": "#8c959f",
    "load": "#6639ba",
    "score": "#d4a72c",
    "forward": MEMORY,
    "loss": LOSS,
    "backward": "#2ea043",
    "optimizer step": "#db61a2",
    "save": "#8c959f",
}
MOST_POINTS = 500
MOST_BARS = 60


class Picture:
    """A figure as a PNG, with the same in words for screen readers, logs and terminals."""

    def __init__(self, figure: Figure, words: str):
        buffer = io.BytesIO()
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format="png", dpi=110, transparent=True)
        self.png, self.words = buffer.getvalue(), words

    def __repr__(self) -> str:
        return visible(self.words)

    def _repr_png_(self) -> bytes:
        return self.png

    def save(self, path: str | Path) -> None:
        Path(path).write_bytes(self.png)


def loss_picture(timeline: Timeline) -> Picture:
    """Loss per trained token (nats) and learning rate at each optimizer step."""
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    words = _draw_loss(figure.subplots(), timeline)
    return Picture(figure, words)


def memory_picture(timeline: Timeline) -> Picture:
    """Memory over the whole run: what tensors take (without a GPU, what is in use), coloured by what the run did."""
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    words = _draw_memory(figure.subplots(), timeline)
    return Picture(figure, words)


def live_picture(timeline: Timeline, status: str) -> Picture:
    """Memory and loss side by side, while training goes on; `status` is said with them."""
    figure = Figure(figsize=(10, 2.8))
    left, right = figure.subplots(1, 2)  # fitted by hand: finding the layout would take longer than drawing it
    figure.subplots_adjust(left=0.05, right=0.94, top=0.9, bottom=0.17, wspace=0.55)
    words = [status, _draw_memory(left, timeline), _draw_loss(right, timeline)]
    return Picture(figure, ". ".join(words))


def peaks_picture(planned_gib: Mapping[str, float], seen_gib: Mapping[str, float], limit_gib: float | None) -> Picture:
    """Allocated memory at the peak of each part of a step: what was planned beside what was seen."""
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.subplots()
    style(axes, "GiB", "")
    for at, part in enumerate(planned_gib):
        for offset, sizes, color in ((-0.2, planned_gib, PLANNED), (0.2, seen_gib, MEMORY)):
            if (size := sizes.get(part)) is None:
                continue  # the run did not come so far
            axes.barh(at + offset, size, height=0.36, color=color)
            inside = size > 0.2 * max(planned_gib.values())  # where no line crosses the number
            place = {"xytext": (-3 if inside else 3, 0), "ha": "right" if inside else "left", "va": "center"}
            look = {"color": "white" if inside else INK, "fontsize": 8, "textcoords": "offset points"}
            axes.annotate(f"{size:.2f}", (size, at + offset), **place, **look)
    axes.set_yticks(range(len(planned_gib)), list(planned_gib))
    axes.invert_yaxis()
    if limit_gib:
        axes.axvline(limit_gib, color=LIMIT, linewidth=1, linestyle="--")
    limit = {"limit of the plan": (LIMIT, "--")} if limit_gib else {}
    _legend(axes, {"planned": (PLANNED, "-"), "measured": (MEMORY, "-"), **limit})
    seen = {part: f"{seen_gib[part]:.2f} measured" if part in seen_gib else "not reached" for part in planned_gib}
    parts = (f"{part} {planned_gib[part]:.2f} planned, {seen[part]}" for part in planned_gib)
    return Picture(figure, "Allocated at most, GiB: " + "; ".join(parts))


def _draw_loss(axes, timeline: Timeline) -> str:
    style(axes, "optimizer step", "loss per token")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if not timeline.steps:
        axes.set(xticks=[], yticks=[])
        return "Loss: no step yet"
    first, last = timeline.steps[0], timeline.steps[-1]
    steps = [s.step for s in timeline.steps]
    rates = axes.twinx()
    rates.plot(*_thinned(steps, [s.learning_rate for s in timeline.steps]), color=INK, linewidth=0.8, linestyle=":")
    style(rates, "", "learning rate")
    rates.grid(visible=False)
    rates.ticklabel_format(style="sci", axis="y", scilimits=(-2, 2))
    rates.yaxis.get_offset_text().set(color=INK, fontsize=8)
    rates.set_ylim(bottom=0)
    axes.set_zorder(rates.get_zorder() + 1)  # the loss over the rate
    axes.patch.set_visible(False)
    axes.plot(*_thinned(steps, [s.loss for s in timeline.steps]), color=LOSS, linewidth=1.5)
    axes.set_title(f"loss {last.loss:.3f}", color=LOSS, fontsize=9, loc="left")
    words = f"Loss: {first.loss:.3f} at step {first.step}, {last.loss:.3f} at step {last.step}"
    return f"{words}; learning rate {last.learning_rate:.2g}"


def _draw_memory(axes, timeline: Timeline) -> str:
    samples = list(timeline.samples)
    style(axes, "seconds", "GiB")
    if not samples:
        axes.set(xticks=[], yticks=[])
        axes.set_title(timeline.source, color=INK, fontsize=9, loc="left", parse_math=False)
        return f"{timeline.source}: no sample yet"
    highest = max(sample.used_gib for sample in samples)
    title = f"{timeline.source}: at most {highest:.2f} GiB"
    axes.set_title(title, color=INK, fontsize=9, loc="left", parse_math=False)
    on_gpu = samples[-1].allocated_gib is not None
    shown = [s.allocated_gib or 0.0 for s in samples] if on_gpu else [s.used_gib for s in samples]
    kept, lines = _kept(shown), {}
    if on_gpu:
        times = [s.time_s for s in samples]
        axes.plot(*_thinned(times, [s.used_gib for s in samples]), color=INK, linewidth=1)
        axes.plot(*_thinned(times, [s.reserved_gib or 0.0 for s in samples]), color=TORCH, linewidth=1)
        lines = {"in use": (INK, "-"), "reserved by torch": (TORCH, "-")}
    points = [(samples[i].time_s, shown[i]) for i in kept]
    colors = [PHASES.get(samples[i].phase, INK) for i in kept]
    axes.add_collection(LineCollection([*itertools.pairwise(points)], colors=colors[1:], linewidth=1.5))
    lines |= {name: (PHASES.get(name, INK), "-") for name in timeline.phases}
    levels = {"planned for torch": (timeline.planned_gib, PLANNED), "all there is": (timeline.limit_gib, LIMIT)}
    for name, (size, color) in levels.items():
        if size:
            axes.axhline(size, color=color, linewidth=1, linestyle="--")
            lines[name] = (color, "--")
    axes.set_xlim(0, max(samples[-1].time_s, 1.0))
    axes.set_ylim(0, 1.08 * max(highest, timeline.limit_gib or 0.0, timeline.planned_gib or 0.0, 0.01))
    _legend(axes, lines)
    limit = f" of {timeline.limit_gib:.1f} GiB" if timeline.limit_gib else ""
    peaks = ", ".join(f"{part} {size:.2f}" for part, size in timeline.peaks_gib.items())
    words = f"{timeline.source}: {samples[-1].used_gib:.2f} GiB now, {highest:.2f} GiB at most{limit}"
    words += f"; planned for torch: {timeline.planned_gib:.2f}" if timeline.planned_gib else ""
    words += f"; tensors at most: {peaks}" if peaks else ""
    return words + (f" ({timeline.missing})" if timeline.missing else "")


def _legend(axes, lines: Mapping[str, tuple[str, str]]) -> None:
    """Names of lines, in their colours, beside the picture."""
    handles = [Line2D([], [], color=color, linestyle=style, label=name) for name, (color, style) in lines.items()]
    beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
    made = axes.legend(handles=handles, fontsize=7, frameon=False, labelcolor=INK, handlelength=1.2, **beside)
    for text in made.get_texts():
        text.set_parse_math(False)


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    kept = _kept(y)
    return [x[i] for i in kept], [y[i] for i in kept]


def _kept(y: Sequence[float]) -> list[int]:
    """Where at most MOST_POINTS points lie; of each stretch the highest is kept, so that no peak is lost."""
    stride = -(-len(y) // MOST_POINTS) or 1

    def height(i: int) -> float:
        return -math.inf if math.isnan(y[i]) else y[i]  # nan is neither more nor less, and would hide what follows it

    return [max(range(i, min(i + stride, len(y))), key=height) for i in range(0, len(y), stride)]


def style(axes, x_label: str, y_label: str) -> None:
    """Labels, ticks and grid that stand out on any background."""
    axes.set_xlabel(x_label, color=INK, fontsize=9)
    axes.set_ylabel(y_label, color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    axes.grid(visible=True, color=INK, alpha=0.2, linewidth=0.5)


def lengths_picture(lengths: Sequence[int], max_length: int) -> Picture:
    """How many rows are how long (tokens), and which are over `max_length`."""
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.subplots()
    style(axes, "tokens of a row", "rows")
    words, lengths = "no rows", sorted(lengths)
    if lengths:
        over = sum(length > max_length for length in lengths)
        words = f"{len(lengths):,} rows of {lengths[0]:,} to {lengths[-1]:,} tokens, the middle one "
        words += f"{lengths[len(lengths) // 2]:,}; {over:,} over max_length = {max_length:,}"
        _draw_lengths(axes, lengths, max_length)
    axes.set_title(words, color=INK, fontsize=9, loc="left")
    return Picture(figure, words)


def _draw_lengths(axes, lengths: list[int], max_length: int) -> None:
    width = -(-max(lengths[-1], max_length) // MOST_BARS)
    rows = Counter((length - max_length - 1) // width for length in lengths)  # one bar ends at max_length, one begins
    for places, look in (
        ([i for i in rows if i < 0], {"color": MEMORY}),
        ([i for i in rows if i >= 0], {"facecolor": "none", "edgecolor": LIMIT, "hatch": "////"}),
    ):
        axes.bar([max_length + i * width for i in places], [rows[i] for i in places], width * 0.9, align="edge", **look)
    axes.axvline(max_length, color=LIMIT, linewidth=1, linestyle="--")
    at_the_top = {"xycoords": ("data", "axes fraction"), "va": "top"}
    axes.annotate(" max_length", (max_length, 1), color=LIMIT, fontsize=8, **at_the_top)
    axes.set_xlim(0, max(lengths[-1], max_length) * 1.03)
