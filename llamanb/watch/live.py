"""The live view: a picture that is updated while training runs, a bar, and the same in words.

Everything here runs in the training thread (a background thread may not display in a notebook), and draws so seldom
that watching takes less than one hundredth of the time. Outside a notebook only the words are printed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

from transformers import TrainerCallback

from llamanb.html import progress
from llamanb.plots import live_picture
from llamanb.timeline import Step, Timeline

DRAWING_SHARE = 0.004
"""Of the time, for pictures; words, files and the sampler take as much again (benchmarks/watching.py)."""
FREE_FRAMES = 3
"""Pictures that every run gets, whatever their share, so that a run of half a minute is seen to move too."""
APART = 10
"""Times its own drawing time that a picture stays before the next."""
WORDS_S = 1.0
"""Seconds between two updates of the bar and its words."""
LINES = 12
"""Lines of words over a whole run, about."""


class LiveView(TrainerCallback):
    """Shows a run as it goes: memory, loss, speed and time left. What cannot be shown harms no training."""

    def __init__(self, timeline: Timeline):
        self.timeline = timeline
        self._picture = self._bar = None
        self._frames, self._drawing_s = 0, 0.0
        self._frame_s = 0.2  # a guess, until the second one: the first also warms matplotlib up

    def on_train_begin(self, args, state, control, **kwargs):
        self._start_s = self._last_draw_s = self._last_words_s = time.monotonic()
        self._first_step = state.global_step  # of this session; an earlier one may have made some
        if self._bar is None:  # else it goes back to a checkpoint
            self._bar, self._picture = _display_handle(), _display_handle()
        self._say(state, self._status(state))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        seen = (float(logs.get(name) or 0) for name in ("loss", "learning_rate", "grad_norm"))
        counted = int(logs.get("num_tokens") or 0), float(logs.get("scale", 1)), float(logs.get("stall_s", 0))
        step = Step(state.global_step, self.timeline.time_s, *seen, *counted)
        self.timeline.steps.append(step)
        status, now = functools.cache(lambda: self._status(state)), time.monotonic()
        ends = self._first_step + 1, state.max_steps
        told = step.skipped and sum(step.skipped for step in self.timeline.steps) <= LINES
        if state.global_step % max(1, state.max_steps // LINES) == 0 or state.global_step in ends or told:
            print(status(), flush=True)
        if now - self._last_words_s >= WORDS_S:
            self._say(state, status())
            self._last_words_s = now
        allowed = DRAWING_SHARE * (now - self._start_s)
        due = now - self._last_draw_s > APART * self._frame_s
        if due and (self._frames < FREE_FRAMES or self._drawing_s + self._frame_s < allowed):
            self._draw(status())

    def on_train_end(self, args, state, control, **kwargs):
        self._say(state, self._status(state))
        self._draw(self._status(state))

    def _status(self, state) -> str:
        timeline, elapsed = self.timeline, time.monotonic() - self._start_s
        done = state.global_step - self._first_step
        left = elapsed / max(1, done) * (state.max_steps - state.global_step)
        parts = [f"step {state.global_step} of {state.max_steps}"]
        if timeline.steps:
            parts.append(f"loss {timeline.steps[-1].loss:.3f}")
        if timeline.upsets:
            parts.append(timeline.upsets)
        if timeline.tokens_per_s:
            parts.append(f"{timeline.tokens_per_s:,.0f} tokens/s")
        if timeline.steps and timeline.steps[-1].stall_s:
            parts.append(f"{timeline.steps[-1].stall_s:.2g} s of the step waiting for weights")
        if timeline.samples:
            parts.append(f"{timeline.samples[-1].used_gib:.2f} GiB, at most {timeline.peak_gib:.2f}")
        if timeline.cards:
            parts.append(timeline.cards)
        parts.append(f"{_clock(elapsed)} gone")
        if done:
            parts.append(f"{_clock(left)} left")
        return ", ".join(parts)

    def _say(self, state, status: str) -> None:
        if self._bar is not None:
            markup = progress(state.global_step / max(1, state.max_steps), status)
            self._show(lambda: self._bar.update({"text/plain": status, "text/html": markup}, raw=True))

    def _show(self, show: Callable[[], None]) -> None:
        try:
            show()
        except Exception as error:  # a page that was closed, a number that no axis can hold
            self._bar = self._picture = None
            self.timeline.misses(f"the live view ended: {type(error).__name__}: {error}")

    def _draw(self, status: str) -> None:
        if self._picture is None:
            return
        begin = time.monotonic()
        self._show(lambda: self._picture.update(live_picture(self.timeline, status)))
        self._last_draw_s = time.monotonic()
        took_s = self._last_draw_s - begin
        if self._frames:
            self._frame_s = took_s
        self._drawing_s += took_s
        self._frames += 1


def _display_handle():
    """An updatable place in the notebook's output; None outside a notebook."""
    try:
        from IPython import get_ipython
        from IPython.display import DisplayHandle
    except ImportError:
        return None
    shell = get_ipython()
    if shell is None or not hasattr(shell, "kernel"):
        return None
    handle = DisplayHandle()
    handle.display({"text/plain": ""}, raw=True)
    return handle


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
