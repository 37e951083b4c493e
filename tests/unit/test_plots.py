"""Every picture: a PNG for the eye, and the same figures in words."""

import math
import struct
import subprocess
import sys
import warnings

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from llamanb import plots
from llamanb.scale.picture import losses_picture
from llamanb.timeline import Sample, Step, Timeline
from llamanb.tradeoffs_picture import tradeoffs_picture


def timeline(samples=(), losses=(), **more) -> Timeline:
    """`samples` as (time_s, phase, used_gib) or with torch's allocated and reserved; `losses` step by step."""
    made = Timeline("VRAM in use (test)", **more)
    for sample in samples:
        made.add(Sample(*(*sample, None, None)[:5]))
    made.steps = [Step(i, float(i), loss, 2e-4 / i, 1.0, 100 * i) for i, loss in enumerate(losses, 1)]
    return made


pytestmark = pytest.mark.whole
THREE = [(0.0, "load", 1.0, 0.4, 0.5), (1.0, "forward", 3.0, 1.8, 2.0), (2.0, "backward", 2.0, 1.0, 1.5)]
WATCHED = timeline(THREE, [2.0, 1.0, 0.5], limit_gib=15.0, planned_gib=2.5)
PLANNED, SEEN = {"load": 1.0, "loss": 2.0, "backward": 3.0}, {"load": 1.1, "loss": 1.9}


def size(picture) -> tuple[int, int]:
    """Width and height in pixels, from a PNG's header."""
    assert picture.png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", picture.png[16:24])


def drawn(draw, *args):
    """What `draw` put on its axes."""
    axes = Figure(layout="constrained").subplots()
    draw(axes, *args)
    return axes


def legend(axes) -> dict[str, str]:
    """Color by name."""
    made = axes.get_legend()
    return {
        text.get_text(): to_hex(line.get_color()) for text, line in zip(made.get_texts(), made.get_lines(), strict=True)
    }


def pieces(curve) -> list[list[tuple[float, float]]]:
    """Ends of each piece of a curve that is drawn in pieces."""
    return [[tuple(end.tolist()) for end in piece] for piece in curve.get_segments()]


def levels(axes) -> dict[float, str]:
    """Heights of horizontal lines across the whole picture, and their colors."""
    lines = (line for line in axes.get_lines() if list(line.get_xdata()) == [0, 1])
    return {line.get_ydata()[0]: to_hex(line.get_color()) for line in lines}


@pytest.mark.parametrize(
    "picture",
    [
        lambda: plots.loss_picture(WATCHED),
        lambda: plots.loss_picture(timeline()),
        lambda: plots.loss_picture(timeline(losses=[1.0])),
        lambda: plots.loss_picture(timeline(losses=[float("nan"), float("inf")])),
        lambda: plots.memory_picture(WATCHED),
        lambda: plots.memory_picture(timeline()),
        lambda: plots.memory_picture(timeline([(0.0, "load", 1.0)])),
        lambda: plots.memory_picture(timeline([(0.0, "load", 0.0)])),
        lambda: plots.memory_picture(timeline([(0.0, "a phase of tomorrow", 1.0), (1.0, "load", 1.0)])),
        lambda: plots.live_picture(WATCHED, "step 1 of 3"),
        lambda: plots.live_picture(timeline(), "step 0 of 3"),
        lambda: plots.peaks_picture(PLANNED, SEEN, 14.0),
        lambda: plots.peaks_picture(PLANNED, {}, None),
        lambda: losses_picture({"one": [2.0, 1.0], "two": [2.0, math.nan], "none": []}),
    ],
)
def test_every_picture_is_a_png_that_fits_a_notebook(picture, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = picture()
    width, height = size(made)
    assert 500 < width < 1200
    assert 200 < height < 500
    assert made._repr_png_() == made.png
    made.save(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes() == made.png


def test_the_loss_in_words():
    words = "Loss: 2.000 at step 1, 0.500 at step 3; learning rate 6.7e-05"
    assert repr(plots.loss_picture(WATCHED)) == words
    assert repr(plots.loss_picture(timeline())) == "Loss: no step yet"
    assert "nan at step 2" in repr(plots.loss_picture(timeline(losses=[1.0, math.nan])))


def test_the_losses_of_several_runs_in_words():
    words = "Loss of one: 2.000 at step 1, 0.500 at step 3; two: 2.000 at step 1, 2.000 at step 1"
    assert repr(losses_picture({"one": [2.0, 1.0, 0.5], "two": [2.0], "none": []})) == words


def test_the_memory_in_words():
    words = "VRAM in use (test): 2.00 GiB now, 3.00 GiB at most of 15.0 GiB; planned for torch: 2.50"
    assert repr(plots.memory_picture(WATCHED)) == words
    assert repr(plots.memory_picture(timeline())) == "VRAM in use (test): no sample yet"
    host = plots.memory_picture(timeline([(0.0, "load", 1.0)]))
    assert repr(host) == "VRAM in use (test): 1.00 GiB now, 1.00 GiB at most"
    gone = timeline(THREE, missing="NVML stopped answering after 1 s", peaks_gib={"load": 0.5, "loss": 1.25})
    words = repr(plots.memory_picture(gone))
    assert words.endswith("; tensors at most: load 0.50, loss 1.25 (NVML stopped answering after 1 s)")


def test_the_live_picture_says_all_of_it():
    words = repr(plots.live_picture(WATCHED, "step 1 of 3, 0:10 left"))
    for part in ("step 1 of 3, 0:10 left", "3.00 GiB at most", "planned for torch: 2.50", "Loss: 2.000 at step 1"):
        assert part in words


def test_peaks_in_words():
    words = repr(plots.peaks_picture(PLANNED, SEEN, 14.0))
    assert words == (
        "Allocated at most, GiB: load 1.00 planned, 1.10 measured; loss 2.00 planned, 1.90 measured; "
        "backward 3.00 planned, not reached"
    )


def test_memory_is_coloured_by_what_the_run_did():
    axes = drawn(plots._draw_memory, WATCHED)
    [curve] = axes.collections
    assert [to_hex(color) for color in curve.get_colors()] == [plots.PHASES["forward"], plots.PHASES["backward"]]
    assert pieces(curve) == [[(0, 0.4), (1, 1.8)], [(1, 1.8), (2, 1.0)]], "what torch's tensors take"
    names = legend(axes)
    assert {name: names[name] for name in ("load", "forward", "backward")} == {
        name: plots.PHASES[name] for name in ("load", "forward", "backward")
    }


def test_on_a_gpu_what_is_in_use_and_reserved_stand_beside_it():
    axes = drawn(plots._draw_memory, WATCHED)
    used, reserved = ([*line.get_ydata()] for line in axes.get_lines()[:2])
    assert used == [1.0, 3.0, 2.0]
    assert reserved == [0.5, 2.0, 1.5]
    names = legend(axes)
    assert (names["in use"], names["reserved by torch"]) == (plots.INK, plots.TORCH)


def test_without_a_gpu_it_is_what_is_in_use_that_is_coloured():
    axes = drawn(plots._draw_memory, timeline([(0.0, "load", 1.0), (1.0, "forward", 3.0)]))
    [curve] = axes.collections
    assert pieces(curve) == [[(0, 1), (1, 3)]]
    assert len(axes.get_lines()) == 0
    assert set(legend(axes)) == {"load", "forward"}


def test_every_phase_of_a_run_has_a_colour():
    from llamanb.memory import SEEN as PARTS

    assert {"import", "load", "score", "save", *PARTS} <= plots.PHASES.keys()
    apart = [color for name, color in plots.PHASES.items() if name not in ("import", "save")]
    assert len(set(apart)) == len(apart)


def test_lines_of_plan_and_limit_are_there():
    axes = drawn(plots._draw_memory, WATCHED)
    assert levels(axes) == {2.5: plots.PLANNED, 15.0: plots.LIMIT}
    names = legend(axes)
    assert names["planned for torch"] == plots.PLANNED
    assert names["all there is"] == plots.LIMIT
    assert axes.get_ylim()[1] > 15.0


def test_a_plan_that_was_exceeded_is_still_in_the_picture():
    axes = drawn(plots._draw_memory, timeline(THREE, planned_gib=20.0))
    assert axes.get_ylim()[1] > 20.0


def test_of_many_samples_few_points_are_drawn_and_the_highest_is_one():
    samples = [(i / 10, "forward", 1.0 + i % 7 / 10, 0.5, 0.75) for i in range(100_000)]
    samples[54_321] = (5432.1, "loss", 9.0, 8.0, 8.5)
    axes = drawn(plots._draw_memory, timeline(samples))
    [curve] = axes.collections
    points = {point for piece in pieces(curve) for point in piece}
    assert len(points) <= plots.MOST_POINTS
    assert (5432.1, 8.0) in points
    used, reserved = axes.get_lines()
    assert len(used.get_xdata()) <= plots.MOST_POINTS
    assert len(reserved.get_xdata()) <= plots.MOST_POINTS
    assert (max(used.get_ydata()), max(reserved.get_ydata())) == (9.0, 8.5)
    assert "9.00 GiB at most" in repr(plots.memory_picture(timeline(samples)))


def test_of_many_steps_few_points_are_drawn():
    axes = drawn(plots._draw_loss, timeline(losses=[1.0 + i % 3 for i in range(100_000)]))
    assert all(len(line.get_xdata()) <= plots.MOST_POINTS for one in axes.figure.axes for line in one.get_lines())


def test_thinning_keeps_the_peak_the_order_and_few_points():
    x = list(range(100_003))
    y = [float(i % 7) for i in x]
    y[54_321] = 1000.0
    thin_x, thin_y = plots._thinned(x, y)
    assert len(thin_x) == len(thin_y) <= plots.MOST_POINTS
    assert max(thin_y) == 1000.0
    assert thin_x[thin_y.index(1000.0)] == 54_321
    assert thin_x == sorted(thin_x)


def test_few_points_stay_as_they_are():
    assert plots._thinned([1, 2, 3], [3.0, 1.0, 2.0]) == ([1, 2, 3], [3.0, 1.0, 2.0])
    assert plots._thinned([], []) == ([], [])


def test_a_loss_that_is_not_a_number_hides_no_other():
    y = [math.nan if i % 4 == 0 else 1.0 for i in range(10_000)]
    y[5_001] = 7.0
    assert 7.0 in plots._thinned(range(10_000), y)[1]


def test_peaks_stand_beside_each_other_under_the_limit():
    figures = []

    class Kept(plots.Picture):
        def __init__(self, figure, words):
            figures.append(figure)
            super().__init__(figure, words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "Picture", Kept)
        plots.peaks_picture(PLANNED, SEEN, 14.0)
    [axes] = figures[0].axes
    bars = {
        (round(bar.get_y() + bar.get_height() / 2, 1), to_hex(bar.get_facecolor())): bar.get_width()
        for bar in axes.patches
    }
    assert bars[(-0.2, plots.PLANNED)] == 1.0
    assert bars[(0.2, plots.MEMORY)] == 1.1
    assert bars[(1.8, plots.PLANNED)] == 3.0
    assert [label.get_text() for label in axes.get_yticklabels()] == ["load", "loss", "backward"]
    assert [list(line.get_xdata()) for line in axes.get_lines()] == [[14.0, 14.0]]
    assert legend(axes) == {"planned": plots.PLANNED, "measured": plots.MEMORY, "limit of the plan": plots.LIMIT}


def test_names_from_a_folder_are_no_formulas():
    odd = timeline([(0.0, r"$\no$ formula", 1.0), (1.0, "load", 1.0)])
    odd.source = r"$\(memory$ of $\another{machine"
    plots.memory_picture(odd)
    odd.samples.clear()
    plots.memory_picture(odd)


def test_pyplot_and_its_global_state_are_never_loaded():
    draw = "from llamanb import plots, timeline; plots.loss_picture(timeline.Timeline('test'))"
    code = f"import sys; {draw}; print('matplotlib.pyplot' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize(
    "points", [{}, {"baseline": (1.0, 2.0)}, {f"variant {i}": (4800.0 + i, 10_000.0 - i) for i in range(12)}]
)
def test_names_in_the_picture_of_tradeoffs_lie_apart_and_inside(points, monkeypatch):
    figures = []
    made = plots.Picture

    def taking(figure, words):
        figures.append(figure)
        return made(figure, words)

    monkeypatch.setattr("llamanb.tradeoffs_picture.Picture", taking)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = tradeoffs_picture(points, "MiB at the peak")
    width, height = size(picture)
    assert width < 1200
    assert height < 500
    assert repr(picture).count("tokens/s") == len(points)
    [axes] = figures[0].axes
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
    assert boxes.keys() == points.keys()
    for name, box in boxes.items():
        assert not [other for other in boxes if other != name and box.overlaps(boxes[other])], name
        assert figures[0].bbox.contains(box.x0, box.y0), name
        assert figures[0].bbox.contains(box.x1, box.y1), name


def test_the_tradeoffs_in_words():
    words = repr(tradeoffs_picture({"baseline": (4800.2, 1234.0), "int8": (6000, 900)}, "MiB at the peak"))
    assert words == "baseline: 4,800.2 MiB at the peak, 1,234 tokens/s; int8: 6,000.0 MiB at the peak, 900 tokens/s"
    assert repr(tradeoffs_picture({}, "MiB")) == "nothing was measured"
