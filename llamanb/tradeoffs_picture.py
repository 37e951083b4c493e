"""The figure of 05_tradeoffs: memory against speed, every point named."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from llamanb.plots import INK, LOSS, MEMORY, Picture, style


def tradeoffs_picture(points: Mapping[str, tuple[float, float]], memory: str) -> Picture:
    """Memory against speed: (memory, tokens a second) by name, the first one marked; `memory` names its axis."""
    figure = Figure(figsize=(8.5, 4.4), dpi=110, layout="constrained")
    axes = figure.subplots()
    style(axes, memory, "tokens a second")
    for color, shown in ((MEMORY, list(points.values())[1:]), (LOSS, list(points.values())[:1])):
        axes.scatter([size for size, _ in shown], [speed for _, speed in shown], color=color, s=20, zorder=3)
    axes.margins(0.12, 0.15)
    _label(figure, axes, points)
    words = (f"{name}: {size:,.1f} {memory}, {speed:,.0f} tokens/s" for name, (size, speed) in points.items())
    return Picture(figure, "; ".join(words) or "nothing was measured")


def _label(figure: Figure, axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Writes each point's name in the nearest free place around it, with a line to it where that is not beside it."""
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    places = [tuple(axes.transData.transform(at)) for at in points.values()]  # in pixels
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    left, bottom, right, top = axes.get_window_extent().extents
    for (name, at), (x, y) in zip(points.items(), places, strict=True):
        label = axes.annotate(name, at, (0, 0), textcoords="offset points", ha="center", va="center", fontsize=8)
        label.set(color=INK, in_layout=False)
        size, best = label.get_window_extent(), None
        for far, turn in itertools.product(range(6, 150, 8), range(0, 360, 15)):
            dx = (size.width / 2 + far) * math.cos(math.radians(turn))
            dy = (size.height / 2 + far) * math.sin(math.radians(turn))
            box = (x + dx - size.width / 2 - 2, y + dy - size.height / 2, x + dx + size.width / 2 + 2)
            box = (*box, y + dy + size.height / 2)
            out = max(left - box[0], 0) + max(box[2] - right, 0) + max(bottom - box[1], 0) + max(box[3] - top, 0)
            cost = sum(_shared(box, other) for other in taken) + 50 * out
            best = min(best or (cost, far, dx, dy, box), (cost, far, dx, dy, box))
            if not cost:
                break
        _, far, dx, dy, box = best
        taken.append(box)
        label.set_position((dx * 72 / figure.dpi, dy * 72 / figure.dpi))
        if far > 6:
            end = axes.transData.inverted().transform((x + dx, y + dy))
            axes.plot((at[0], end[0]), (at[1], end[1]), color=INK, linewidth=0.5, alpha=0.6, zorder=1)


def _shared(one: tuple, other: tuple) -> float:
    """Square pixels that two boxes (left, bottom, right, top) have in common."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)
