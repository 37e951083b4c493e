"""The live view: a picture that is updated while training runs, and the same in words.

Everything here runs in the training thread (a background thread may not display in a notebook), and draws so seldom
that drawing stays under one hundredth of the time. Outside a notebook only the words are printed.
"""

from __future__ import annotations

import time

from transformers import TrainerCallback

from llamanb.plots import live_picture
from llamanb.watch.sampler import MemorySampler

DRAWING_SHARE = 0.01
FREE_FRAMES = 6
"""Pictures that every run gets before that share is counted, so that a run of one minute is seen to move too."""
APART = 10
"""Times its own drawing time that a picture stays before the next."""
LINES = 12
"""Lines of words over a whole run, about."""


class LiveView(TrainerCallback):
    """Shows a run as it goes: memory, loss and time left."""

    def __init__(self, sampler: MemorySampler):
        self.sampler = sampler
        self.steps: list[int] = []
        self.losses: list[float] = []
        self._display = None
        self._frames, self._counted_s = 0, 0.0
        self._frame_s = 0.3  # a guess, until the second one: the first also warms matplotlib up

    def on_train_begin(self, args, state, control, **kwargs):
        self._start_s = self._last_draw_s = time.monotonic()
        self._display = _display_handle()
        self._draw(f"step 0 of {state.max_steps}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        self.steps.append(state.global_step)
        self.losses.append(float(logs["loss"]))
        status = self._status(state)
        if state.global_step % max(1, state.max_steps // LINES) == 0 or state.global_step in (1, state.max_steps):
            print(status, flush=True)
        now = time.monotonic()
        allowed = DRAWING_SHARE * (now - self._start_s)
        due = now - self._last_draw_s > APART * self._frame_s
        if due and (self._frames < FREE_FRAMES or self._counted_s + self._frame_s < allowed):
            self._draw(status)

    def on_train_end(self, args, state, control, **kwargs):
        self._draw(self._status(state))

    def _status(self, state) -> str:
        elapsed = time.monotonic() - self._start_s
        left = elapsed / max(1, state.global_step) * (state.max_steps - state.global_step)
        loss = f", loss {self.losses[-1]:.3f}" if self.losses else ""
        memory = f", {self.sampler.samples[-1].used_gib:.2f} GiB" if self.sampler.samples else ""
        return (
            f"step {state.global_step} of {state.max_steps}{loss}{memory}, {_clock(elapsed)} gone, {_clock(left)} left"
        )

    def _draw(self, status: str) -> None:
        if self._display is None:
            return
        begin = time.monotonic()
        self._display.update(live_picture(self.sampler, self.steps, self.losses, status))
        self._last_draw_s = time.monotonic()
        if self._frames:
            self._frame_s = self._last_draw_s - begin
        if self._frames >= FREE_FRAMES:
            self._counted_s += self._frame_s
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
