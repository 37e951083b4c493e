"""The figure of 08_scale: the losses of several runs in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from llamanb.plots import LOSS, MEMORY, PLANNED, TORCH, Picture, style


def losses_picture(runs: Mapping[str, Sequence[float]]) -> Picture:
    """Loss per trained token (nats) at each optimizer step, by the run's name; where lines meet, each shows at the
    sides of the one over it."""
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.subplots()
    style(axes, "optimizer step", "loss per token")
    axes.xaxis.get_major_locator().set_params(integer=True)
    for n, (name, losses) in enumerate(runs.items()):
        look = {"color": (MEMORY, LOSS, PLANNED, TORCH)[n % 4], "linewidth": 1.5 + 4 * (len(runs) - 1 - n), "zorder": 3}
        axes.plot(range(1, len(losses) + 1), losses, label=name, **look)
    axes.legend(fontsize=8, frameon=False, labelcolor="linecolor")
    words = (
        f"{name}: {losses[0]:.3f} at step 1, {losses[-1]:.3f} at step {len(losses)}"
        for name, losses in runs.items()
        if losses
    )
    return Picture(figure, "Loss of " + "; ".join(words))
