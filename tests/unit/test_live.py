"""The live view under a clock that the test turns and a display that only remembers."""

import itertools
from types import SimpleNamespace

import pytest

from llamanb.watch import live
from llamanb.watch.live import DRAWING_SHARE, FREE_FRAMES, LINES, LiveView
from llamanb.watch.sampler import MemorySampler, Sample

STEPS = 120


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self):
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


class Display:
    """Remembers every frame."""

    def __init__(self):
        self.frames = []

    def update(self, picture) -> None:
        self.frames.append(picture)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(live, "time", made)
    return made


@pytest.fixture
def display(monkeypatch) -> Display:
    made = Display()
    monkeypatch.setattr(live, "_display_handle", lambda: made)
    return made


@pytest.fixture
def drawing(monkeypatch, clock):
    """`drawing.frame_s`: seconds that the clock moves on while a picture is drawn; `drawing.all_s`: their sum."""
    made = SimpleNamespace(frame_s=0.0, all_s=0.0)

    def draw(sampler, steps, losses, status):
        clock.now_s += made.frame_s
        made.all_s += made.frame_s
        return SimpleNamespace(status=status, steps=list(steps), losses=list(losses))

    monkeypatch.setattr(live, "live_picture", draw)
    return made


def train(clock: Clock, step_s: float, *, steps: int = STEPS, losses=None) -> LiveView:
    """A training of so many steps, each of so many seconds."""
    sampler = MemorySampler(lambda: (1.0, None), "fake")
    sampler.samples.append(Sample(0.0, 1.25, None))
    view, state = LiveView(sampler), SimpleNamespace(max_steps=steps, global_step=0)
    view.on_train_begin(None, state, None)
    for step in range(1, steps + 1):
        clock.now_s += step_s
        state.global_step = step
        view.on_log(None, state, None, logs={"loss": losses[step - 1] if losses else 1.0 / step})
    view.on_train_end(None, state, None)
    return view


def test_outside_a_notebook_it_is_words_only(clock, capsys):
    assert live._display_handle() is None
    view = train(clock, 1.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 1 of 120, loss 1.000, 1.25 GiB, 0:01 gone, 1:59 left"
    assert lines[-1] == "step 120 of 120, loss 0.008, 1.25 GiB, 2:00 gone, 0:00 left"
    assert LINES <= len(lines) <= LINES + 2
    assert (view.steps[0], view.steps[-1], len(view.losses)) == (1, STEPS, STEPS)


@pytest.mark.parametrize("steps", [1, 2, 3, 11, 13, 1000])
def test_words_are_few_and_hold_the_first_and_the_last_step(clock, capsys, steps):
    train(clock, 1.0, steps=steps)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"step 1 of {steps},")
    assert lines[-1].startswith(f"step {steps} of {steps},")
    assert min(steps, LINES) <= len(lines) <= 2 * LINES
    assert len(lines) == len(set(lines))


def test_logs_without_a_loss_are_not_steps(clock, display, drawing, capsys):
    view, state = LiveView(MemorySampler(lambda: (1.0, None), "fake")), SimpleNamespace(max_steps=3, global_step=0)
    view.on_train_begin(None, state, None)
    view.on_log(None, state, None, logs={"train_runtime": 3.0})
    view.on_log(None, state, None, logs=None)
    assert view.steps == []
    assert capsys.readouterr().out == ""


def test_the_first_and_the_last_frame_are_always_drawn(clock, display, drawing):
    drawing.frame_s = 100.0  # far beyond what is granted
    train(clock, 1.0, steps=2)
    assert [frame.status.split(",")[0] for frame in display.frames] == ["step 0 of 2", "step 2 of 2"]
    assert display.frames[-1].steps[-1] == 2


@pytest.mark.parametrize("frame_s", [0.05, 0.25, 1.0])
def test_a_run_of_a_minute_is_seen_to_move(clock, display, drawing, frame_s):
    drawing.frame_s = frame_s
    train(clock, 0.5)
    assert 4 <= len(display.frames) <= 1 + FREE_FRAMES + 1 + 60 * DRAWING_SHARE / frame_s


def test_a_first_frame_that_takes_long_does_not_hold_the_next_ones_up(clock, display, drawing, monkeypatch):
    drawing.frame_s, update = 3.0, display.update

    def warm(picture):
        drawing.frame_s = 0.2
        update(picture)

    monkeypatch.setattr(display, "update", warm)
    train(clock, 0.1)
    assert len(display.frames) >= 4


@pytest.mark.parametrize("frame_s", [0.05, 0.3, 2.0])
def test_drawing_stays_a_small_share_of_a_long_run(clock, display, drawing, frame_s):
    drawing.frame_s = frame_s
    begin_s = clock.now_s
    train(clock, 6.0, steps=3000)
    always_s = (FREE_FRAMES + 1) * frame_s  # and the last one
    assert drawing.all_s <= always_s + DRAWING_SHARE * (clock.now_s - begin_s)
    assert len(display.frames) > 20


def test_frames_come_spread_out(clock, display, drawing, monkeypatch):
    drawing.frame_s = 0.1
    drawn_at = []
    monkeypatch.setattr(display, "update", lambda picture: drawn_at.append(clock.now_s))
    train(clock, 0.01, steps=2000)
    gaps = [after - before for before, after in itertools.pairwise(drawn_at)][:-1]
    assert min(gaps) >= 10 * drawing.frame_s


def test_a_loss_that_is_not_a_number_shows_as_such(clock, display, drawing, capsys):
    train(clock, 1.0, steps=2, losses=[float("nan"), float("inf")])
    assert "loss nan" in capsys.readouterr().out
    assert "loss inf" in display.frames[-1].status


def test_a_real_picture_stays_as_the_last_frame(clock, display):
    train(clock, 1.0, steps=3)
    assert display.frames[-1].png.startswith(b"\x89PNG")
    assert "step 3 of 3" in repr(display.frames[-1])


@pytest.mark.parametrize(("seconds", "words"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3600, "1:00:00")])
def test_a_clock_reads_like_one(seconds, words):
    assert live._clock(seconds) == words


def test_in_a_notebook_the_handle_is_shown_at_once(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setattr("IPython.display.DisplayHandle.display", lambda self, *args, **kwargs: shown.append(args))
    assert live._display_handle() is not None
    assert len(shown) == 1
