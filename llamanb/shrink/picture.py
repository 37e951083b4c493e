"""The figure of 06_shrink: quality against what was taken away, one plot for each method."""

from __future__ import annotations

import math
from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from llamanb.plots import INK, LOSS, MEMORY, Picture, style

COLORS = {"as written": LOSS, "recovered": MEMORY}
COLUMNS = 3


def shrink_picture(methods: Mapping[str, Mapping[str, list[tuple[float, float]]]]) -> Picture:
    """Curves of (share, quality) by method and name; the quality of the dense model, 1, is a line."""
    lines = max(1, math.ceil(len(methods) / COLUMNS))
    figure = Figure(figsize=(9, 2.7 * lines), dpi=110, layout="constrained")
    places = figure.subplots(lines, COLUMNS, sharey=True, squeeze=False).flatten()
    words = []
    for i, (axes, (method, curves)) in enumerate(zip(places, methods.items(), strict=False)):
        low_rank = "SVD" in method
        across = "rank budget: parameters kept" if low_rank else "sparsity"
        style(axes, across, "" if i % COLUMNS else "dense perplexity by its own")
        axes.set_title(method, fontsize=9, color=INK)
        axes.axhline(1, color=INK, linewidth=0.8, linestyle="--")
        for name, points in curves.items():
            axes.plot(*zip(*points, strict=True), color=COLORS[name], marker="o", markersize=4, label=name)
            words.append(f"{method}, {name}: " + ", ".join(f"{good:.2f} at {share:.0%}" for share, good in points))
        axes.set_xlim((1.03, -0.03) if low_rank else (-0.03, 1.03))  # to the right there is less model
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(bottom=0)
    for axes in places[len(methods) :]:
        axes.set_axis_off()
    if words:
        places[0].legend(fontsize=8, frameon=False, labelcolor=INK, loc="lower left")
    return Picture(figure, "; ".join(words) or "nothing was measured")
