"""Every figure, readable on light and dark backgrounds: transparent, in colours that stand out on both."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK = "#7a7a7a"
MEMORY, TORCH, LOSS, LIMIT = "#2f81f7", "#a371f7", "#e8710a", "#d1242f"
PHASES = ("#8883", "#8881")
MOST_POINTS = 500
LETTER_IN = 0.07
"""Width of a letter of a phase's name, in inches."""


class Picture:
    """A figure as a PNG, with the same in words for screen readers, logs and terminals."""

    def __init__(self, figure: Figure, words: str):
        buffer = io.BytesIO()
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format="png", dpi=110, transparent=True)
        self.png, self.words = buffer.getvalue(), words

    def __repr__(self) -> str:
        return self.words

    def _repr_png_(self) -> bytes:
        return self.png

    def save(self, path: str | Path) -> None:
        Path(path).write_bytes(self.png)


def loss_picture(steps: Sequence[int], losses: Sequence[float]) -> Picture:
    """Loss per trained token (nats) at each optimizer step."""
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    words = _draw_loss(figure.subplots(), steps, losses)
    return Picture(figure, words)


def memory_picture(sampler) -> Picture:
    """Memory over the whole run, with the names of what the run did."""
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    words = _draw_memory(figure.subplots(), sampler)
    return Picture(figure, words)


def live_picture(sampler, steps: Sequence[int], losses: Sequence[float], status: str) -> Picture:
    """Memory and loss side by side under one line of status, while training goes on."""
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    words = [status, _draw_memory(left, sampler), _draw_loss(right, steps, losses)]
    figure.suptitle(status, color=INK, fontsize=10)
    return Picture(figure, ". ".join(words))


def _draw_loss(axes, steps: Sequence[int], losses: Sequence[float]) -> str:
    _style(axes, "optimizer step", "loss per token")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if not losses:
        axes.set(xticks=[], yticks=[])
        return "Loss: no step yet"
    axes.plot(*_thinned(steps, losses), color=LOSS, linewidth=1.5)
    beside = {"xytext": (4, 0), "textcoords": "offset points", "ha": "left", "va": "center"}  # the curve stays clear
    axes.annotate(f"{losses[-1]:.3f}", (steps[-1], losses[-1]), color=LOSS, fontsize=9, **beside)
    return f"Loss: {losses[0]:.3f} at step {steps[0]}, {losses[-1]:.3f} at step {steps[-1]}"


def _draw_memory(axes, sampler) -> str:
    samples, phases = list(sampler.samples), list(sampler.phases)
    _style(axes, "seconds", "GiB")
    if not samples:
        axes.set(xticks=[], yticks=[])
        axes.set_title(sampler.source, color=INK, fontsize=9, loc="left")
        return f"{sampler.source}: no sample yet"
    times, used = [s.time_s for s in samples], [s.used_gib for s in samples]
    axes.set_title(f"{sampler.source}: at most {max(used):.2f} GiB", color=INK, fontsize=9, loc="left")
    axes.set_xlim(0, max(times[-1], 1.0))
    axes.plot(*_thinned(times, used), color=MEMORY, linewidth=1.5, label="in use")
    if samples[-1].torch_gib is not None:
        axes.plot(
            *_thinned(times, [s.torch_gib or 0.0 for s in samples]), color=TORCH, linewidth=1, label="reserved by torch"
        )
    if sampler.limit_gib:
        axes.axhline(sampler.limit_gib, color=LIMIT, linewidth=1, linestyle="--", label="all there is")
    top = max(max(used), sampler.limit_gib or 0.0)
    axes.set_ylim(0, top * 1.18)
    letter_s = LETTER_IN / (axes.get_window_extent().width / axes.figure.dpi) * axes.get_xlim()[1]
    for i, phase in enumerate(phases):
        end = phases[i + 1].start_s if i + 1 < len(phases) else times[-1]
        axes.axvspan(phase.start_s, end, color=PHASES[i % 2], linewidth=0)
        if end - phase.start_s > (len(phase.name) + 2) * letter_s:  # a name needs room
            axes.text(phase.start_s, top * 1.1, " " + phase.name, color=INK, fontsize=8, va="center")
    if len(axes.lines) > 1:
        axes.legend(fontsize=8, frameon=False, labelcolor=INK, loc="lower right")
    limit = f" of {sampler.limit_gib:.1f} GiB" if sampler.limit_gib else ""
    note = f" ({sampler.missing})" if sampler.missing else ""
    return f"{sampler.source}: {used[-1]:.2f} GiB now, {max(used):.2f} GiB at most{limit}{note}"


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MOST_POINTS points; of each stretch the highest is kept, so that no peak is lost."""
    stride = -(-len(x) // MOST_POINTS) or 1
    kept = [max(range(i, min(i + stride, len(x))), key=lambda j: y[j]) for i in range(0, len(x), stride)]
    return [x[i] for i in kept], [y[i] for i in kept]


def _style(axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label, color=INK, fontsize=9)
    axes.set_ylabel(y_label, color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    axes.grid(visible=True, color=INK, alpha=0.2, linewidth=0.5)
