"""The live view under a clock that the test turns and a display that only remembers."""

import itertools
import math
from types import SimpleNamespace

import pytest

from llamanb.timeline import Sample, Timeline
from llamanb.watch import live
from llamanb.watch.live import DRAWING_SHARE, FREE_FRAMES, LINES, WORDS_S, LiveView

pytestmark = pytest.mark.whole

STEPS = 120


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self):
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


class Display:
    """Remembers every picture and every state of the bar, and when it came."""

    def __init__(self, clock: Clock):
        self.frames, self.drawn_s, self.bars, self.bars_s = [], [], [], []
        self._clock = clock

    def update(self, shown, raw=False) -> None:
        shows, times = (self.bars, self.bars_s) if raw else (self.frames, self.drawn_s)
        shows.append(shown)
        times.append(self._clock.now_s)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(live, "time", made)
    monkeypatch.setattr("llamanb.timeline.time", made)
    return made


@pytest.fixture
def display(monkeypatch, clock) -> Display:
    made = Display(clock)
    monkeypatch.setattr(live, "_display_handle", lambda: made)
    return made


@pytest.fixture
def drawing(monkeypatch, clock):
    """`drawing.frame_s`: seconds that the clock moves on while a picture is drawn; `drawing.all_s`: their sum."""
    made = SimpleNamespace(frame_s=0.0, all_s=0.0)

    def draw(timeline, status):
        clock.now_s += made.frame_s
        made.all_s += made.frame_s
        return SimpleNamespace(status=status, steps=list(timeline.steps))

    monkeypatch.setattr(live, "live_picture", draw)
    return made


@pytest.fixture
def train(clock, tmp_path):
    """`train(step_s)`: a training of STEPS steps, each of so many seconds and of 1000 tokens."""

    def trained(step_s: float, *, steps: int = STEPS, losses=None) -> LiveView:
        samples = [Sample(0.0, "load", 2.5, None, None), Sample(0.1, "forward", 1.25, None, None)]
        timeline = Timeline("fake", samples=samples)
        view, state = LiveView(timeline), SimpleNamespace(max_steps=steps, global_step=0)
        view.on_train_begin(None, state, None)
        for step in range(1, steps + 1):
            clock.now_s += step_s
            state.global_step = step
            logs = {"loss": losses[step - 1] if losses else 1.0 / step, "learning_rate": 2e-4, "grad_norm": 0.5}
            view.on_log(None, state, None, logs={**logs, "num_tokens": 1000.0 * step})
        view.on_train_end(None, state, None)
        return view

    return trained


def test_outside_a_notebook_it_is_words_only(train, capsys):
    assert live._display_handle() is None
    steps = train(1.0).timeline.steps
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 1 of 120, loss 1.000, 1.25 GiB, at most 2.50, 0:01 gone, 1:59 left"
    assert lines[-1] == "step 120 of 120, loss 0.008, 1,000 tokens/s, 1.25 GiB, at most 2.50, 2:00 gone, 0:00 left"
    assert LINES <= len(lines) <= LINES + 2
    assert (steps[0].step, steps[-1].step, len(steps)) == (1, STEPS, STEPS)


def test_a_step_holds_what_was_logged(train):
    first = train(1.5, steps=2).timeline.steps[0]
    assert (first.step, first.time_s, first.loss, first.tokens) == (1, 1.5, 1.0, 1000)
    assert (first.learning_rate, first.grad_norm) == (2e-4, 0.5)


@pytest.mark.parametrize("steps", [1, 2, 3, 11, 13, 1000])
def test_words_are_few_and_hold_the_first_and_the_last_step(train, capsys, steps):
    train(1.0, steps=steps)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"step 1 of {steps},")
    assert lines[-1].startswith(f"step {steps} of {steps},")
    assert min(steps, LINES) <= len(lines) <= 2 * LINES
    assert len(lines) == len(set(lines))


def test_logs_without_a_loss_are_not_steps(clock, display, drawing, tmp_path, capsys):
    view, state = LiveView(Timeline("fake")), SimpleNamespace(max_steps=3, global_step=0)
    view.on_train_begin(None, state, None)
    view.on_log(None, state, None, logs={"train_runtime": 3.0})
    view.on_log(None, state, None, logs=None)
    assert view.timeline.steps == []
    assert capsys.readouterr().out == ""


def test_waiting_for_weights_is_shown_where_there_was_some(clock, capsys):
    view, state = LiveView(Timeline("fake")), SimpleNamespace(max_steps=3, global_step=1)
    view.on_train_begin(None, state, None)
    for stall_s in (0.25, 0.0):
        view.on_log(None, state, None, logs={"loss": 1.0, "stall_s": stall_s})
        state.global_step += 1
    first, second = capsys.readouterr().out.splitlines()
    assert "0.25 s of the step waiting for weights" in first
    assert "waiting" not in second
    assert [step.stall_s for step in view.timeline.steps] == [0.25, 0.0]


def test_logs_that_lack_the_rest_are_steps(clock, tmp_path):
    view, state = LiveView(Timeline("fake")), SimpleNamespace(max_steps=3, global_step=1)
    view.on_train_begin(None, state, None)
    view.on_log(None, state, None, logs={"loss": 0.0, "grad_norm": None})
    assert [(s.loss, s.grad_norm, s.tokens) for s in view.timeline.steps] == [(0.0, 0.0, 0)]


@pytest.mark.parametrize("step_s", [0.01, 0.3, 5.0])
def test_the_bar_is_updated_at_most_once_a_second(display, drawing, train, step_s):
    train(step_s, steps=1000)
    gaps = [after - before for before, after in itertools.pairwise(display.bars_s)]
    assert min(gaps[:-1]) >= WORDS_S, "the last one comes when training ends"
    assert len(display.bars) >= min(1000, 1000 * step_s / (WORDS_S + step_s))


def test_the_bar_says_how_much_is_done(display, drawing, train):
    train(1.0, steps=4)
    shares = ["value='0'", "value='25'", "value='50'", "value='75'", "value='100'"]
    for share in shares:
        assert any(share in bar["text/html"] for bar in display.bars)
    assert "value='0'" in display.bars[0]["text/html"]
    assert "value='100'" in display.bars[-1]["text/html"]


def test_the_bar_s_words_are_those_of_the_log(display, drawing, train):
    train(1.0, steps=4)
    words = "step 4 of 4, loss 0.250, 1,000 tokens/s, 1.25 GiB, at most 2.50, 0:04 gone, 0:00 left"
    assert display.bars[-1]["text/plain"] == words
    assert words in display.bars[-1]["text/html"]
    assert display.frames[-1].status == words


def test_what_cannot_be_shown_harms_no_training_and_is_said(display, drawing, train, monkeypatch):
    def closed(*args, **kwargs):
        raise RuntimeError("comm is closed")

    monkeypatch.setattr(display, "update", closed)
    view = train(1.0)
    assert len(view.timeline.steps) == STEPS
    assert "the live view ended: RuntimeError: comm is closed" in view.timeline.missing


def test_a_picture_that_cannot_be_drawn_harms_no_training(display, train):
    view = train(1.0, losses=[1e308, -1e308] * (STEPS // 2))
    assert len(view.timeline.steps) == STEPS


def test_the_last_frame_is_always_drawn(display, drawing, train):
    train(0.1, steps=2)
    assert [frame.status.split(",")[0] for frame in display.frames] == ["step 2 of 2"]
    assert display.frames[-1].steps[-1].step == 2


def test_pictures_that_take_very_long_are_three(display, drawing, train):
    drawing.frame_s = 100.0  # far beyond what is granted
    train(40.0)
    assert 2 <= len(display.frames) <= FREE_FRAMES + 1


@pytest.mark.parametrize("frame_s", [0.05, 0.25, 1.0])
def test_a_run_of_a_minute_is_seen_to_move(display, drawing, train, frame_s):
    drawing.frame_s = frame_s
    train(0.5)
    assert 4 <= len(display.frames) <= FREE_FRAMES + 1 + 60 * DRAWING_SHARE / frame_s


def test_a_first_frame_that_takes_long_does_not_hold_the_next_ones_up(display, drawing, train, monkeypatch):
    drawing.frame_s, update = 3.0, display.update

    def warm(shown, raw=False):
        drawing.frame_s = drawing.frame_s if raw else 0.2
        update(shown, raw)

    monkeypatch.setattr(display, "update", warm)
    train(0.1)
    assert len(display.frames) >= 4


@pytest.mark.parametrize("frame_s", [0.05, 0.3, 2.0])
def test_drawing_stays_a_small_share_of_a_long_run(clock, display, drawing, train, frame_s):
    drawing.frame_s = frame_s
    begin_s = clock.now_s
    train(6.0, steps=3000)
    always_s = (FREE_FRAMES + 1) * frame_s  # and the last one
    assert drawing.all_s <= always_s + DRAWING_SHARE * (clock.now_s - begin_s)
    assert len(display.frames) > 20


def test_frames_come_spread_out(display, drawing, train):
    drawing.frame_s = 0.1
    train(0.01, steps=2000)
    gaps = [after - before for before, after in itertools.pairwise(display.drawn_s)][:-1]
    assert min(gaps) >= 10 * drawing.frame_s


def test_a_loss_that_is_not_a_number_shows_as_such(display, drawing, train, capsys):
    view = train(1.0, steps=2, losses=[float("nan"), float("inf")])
    assert "loss nan" in capsys.readouterr().out
    assert "loss inf" in display.frames[-1].status
    assert math.isnan(view.timeline.steps[0].loss)


def test_a_skipped_step_is_told_at_once_though_not_for_ever(train, capsys):
    train(0.01, steps=1000, losses=[1.0] * 500 + [math.nan] * 2 * LINES + [1.0] * (500 - 2 * LINES))
    told = [line for line in capsys.readouterr().out.splitlines() if "loss nan" in line]
    assert [line.split(",")[0] for line in told] == [f"step {n} of 1000" for n in range(501, 501 + LINES)]
    assert "1 skipped, not finite" in told[0]


def test_a_run_that_goes_back_is_drawn_where_it_was(display, drawing, monkeypatch):
    handles = []
    monkeypatch.setattr(live, "_display_handle", lambda: handles.append(1) or display)
    view, state = LiveView(Timeline("fake")), SimpleNamespace(max_steps=3, global_step=0)
    view.on_train_begin(None, state, None)
    view.on_train_begin(None, state, None)
    assert len(handles) == 2, "a bar and a picture"


def test_a_real_picture_stays_as_the_last_frame(display, train):
    train(1.0, steps=3)
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
