"""Every picture: a PNG for the eye, and the same figures in words."""

import itertools
import struct
import subprocess
import sys

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from llamanb import plots
from llamanb.watch.sampler import MemorySampler, Phase, Sample


def sampler(samples=(), phases=(), limit_gib=None, missing="") -> MemorySampler:
    made = MemorySampler(lambda: (0.0, None), "VRAM in use (test)", limit_gib)
    made.samples, made.phases, made.missing = [Sample(*s) for s in samples], [Phase(*p) for p in phases], missing
    return made


TWO_SAMPLES = sampler([(0.0, 1.0, 0.5), (1.0, 3.0, 2.0), (2.0, 2.0, 1.5)], [(0.0, "load"), (1.0, "train")], 15.0)


def size(picture) -> tuple[int, int]:
    """Width and height in pixels, from a PNG's header."""
    assert picture.png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", picture.png[16:24])


@pytest.mark.parametrize(
    "picture",
    [
        plots.loss_picture([1, 2, 3], [2.0, 1.0, 0.5]),
        plots.loss_picture([], []),
        plots.loss_picture([1, 2], [float("nan"), float("inf")]),
        plots.memory_picture(TWO_SAMPLES),
        plots.memory_picture(sampler()),
        plots.memory_picture(sampler([(0.0, 1.0, None)], [(0.0, "load")])),
        plots.live_picture(TWO_SAMPLES, [1], [2.0], "step 1 of 3"),
        plots.live_picture(sampler(), [], [], "step 0 of 3"),
    ],
)
def test_every_picture_is_a_png_that_fits_a_notebook(picture, tmp_path):
    width, height = size(picture)
    assert 500 < width < 1200
    assert 200 < height < 500
    assert picture._repr_png_() == picture.png
    picture.save(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes() == picture.png


def test_the_loss_in_words():
    assert repr(plots.loss_picture([1, 2, 3], [2.0, 1.0, 0.5])) == "Loss: 2.000 at step 1, 0.500 at step 3"
    assert repr(plots.loss_picture([], [])) == "Loss: no step yet"


def test_the_memory_in_words():
    words = repr(plots.memory_picture(TWO_SAMPLES))
    assert words == "VRAM in use (test): 2.00 GiB now, 3.00 GiB at most of 15.0 GiB"
    assert repr(plots.memory_picture(sampler())) == "VRAM in use (test): no sample yet"
    gone = sampler([(0.0, 1.0, None)], missing="no more samples after 1 s: OSError: gone")
    assert "no more samples after 1 s" in repr(plots.memory_picture(gone))


def test_the_live_picture_says_all_of_it():
    words = repr(plots.live_picture(TWO_SAMPLES, [1], [2.0], "step 1 of 3, 0:10 left"))
    for part in ("step 1 of 3, 0:10 left", "3.00 GiB at most", "Loss: 2.000 at step 1"):
        assert part in words


@pytest.mark.parametrize("columns", [1, 2])
def test_names_of_phases_never_run_into_each_other(columns):
    samples = [(second, 1.0, None) for second in range(101)]
    shown = set()
    for length in (1, 3, 5, 7, 9, 12, 20, 30):
        phases = [
            (0, "load"),
            (20, "score"),
            (20 + length, "train"),
            (100 - length, "score"),
            (100 - length / 2, "save"),
        ]
        figure = Figure(figsize=(5 + 5 * (columns - 1), 2.8), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, columns, squeeze=False)[0][0]
        plots._draw_memory(axes, sampler(samples, phases))
        figure.draw_without_rendering()
        boxes = sorted((text.get_window_extent().extents[[0, 2]] for text in axes.texts), key=lambda ends: ends[0])
        assert all(before[1] < after[0] for before, after in itertools.pairwise(boxes)), length
        assert boxes[-1][1] <= axes.get_window_extent().x1
        shown |= {text.get_text().strip() for text in axes.texts}
    assert shown == {"load", "score", "train", "save"}


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


def test_pyplot_and_its_global_state_are_never_loaded():
    draw = "from llamanb import plots; plots.loss_picture([1], [1.0])"
    code = f"import sys; {draw}; print('matplotlib.pyplot' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize("lengths", [[5], [70] * 9, [*range(1, 300), 9000], []])
def test_lengths_are_counted_on_both_sides_of_the_limit(lengths):
    picture = plots.lengths_picture(lengths, 128)
    assert size(picture)[0] > 500
    over = sum(length > 128 for length in lengths)
    assert repr(picture) == "no rows" if not lengths else repr(picture).endswith(f"; {over} over max_length = 128")


def test_lengths_in_words_and_in_bars():
    lengths = [100, 128, 129, 3000]
    axes = Figure().subplots()
    words = plots._draw_lengths(axes, lengths, 128)
    assert words == "4 rows of 100 to 3,000 tokens, the middle one 129; 2 over max_length = 128"
    assert {line.get_xdata()[0] for line in axes.lines} == {128}
    within = sum(bar.get_height() for bar in axes.patches if bar.get_x() < 128)
    assert (within, sum(bar.get_height() for bar in axes.patches)) == (2, 4)
