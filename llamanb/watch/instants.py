"""What each part of a training step takes: torch's own peaks, read and reset where one part ends."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import deque

import torch
from transformers import Trainer, TrainerCallback

from llamanb.memory import SEEN
from llamanb.timeline import Timeline
from llamanb.watch.buckets import lasting_bytes

GIB = 2**30
MOST_TIMES = 1000
"""Micro-batches whose times are kept."""
LOAD, FORWARD, LOSS, BACKWARD, OPTIMIZER = SEEN


class Instants(TrainerCallback):
    """Tells the parts of a step apart: which one runs, its peak of allocated memory, when each loss was there.

    `attach` wraps the trainer's loss and backward; nothing of what they compute changes, and nothing waits for the GPU
    that did not.

    Args:
        timeline: gets the parts as phases, and their peaks.
        gpu: whether torch counts peaks.
    """

    def __init__(self, timeline: Timeline | None = None, *, gpu: bool = True):
        self.peaks = dict.fromkeys(SEEN, 0)
        """Bytes, by part."""
        self.reserved = 0
        """Most bytes that torch held of the GPU."""
        self._losses: deque = deque(maxlen=MOST_TIMES)
        """Moments at which the loss of a micro-batch was there."""
        self.lasting: dict[str, int] = {}
        """Bytes by bucket after the first step, its gradients still there."""
        self._timeline, self._gpu, self._part = timeline, gpu, LOAD

    def attach(self, trainer: Trainer) -> None:
        compute_loss, backward = trainer.compute_loss, trainer.accelerator.backward

        def watched_loss(*args, **kwargs):
            self.begins(FORWARD)
            loss = compute_loss(*args, **kwargs)
            self._losses.append(_now(self._gpu))
            self.begins(BACKWARD)
            return loss

        def watched_backward(*args, **kwargs):
            backward(*args, **kwargs)
            self.begins(OPTIMIZER)

        def layers_done(*_):
            if self._part == FORWARD:
                self.begins(LOSS)

        trainer.compute_loss, trainer.accelerator.backward = watched_loss, watched_backward
        trainer.layers_done = layers_done
        trainer.model.get_decoder().register_forward_hook(layers_done)
        trainer.add_callback(self)

    def begins(self, part: str) -> None:
        """Counts the peak since the last call to the part that ends, and begins another."""
        if self._gpu:
            stats = torch.cuda.memory_stats_as_nested_dict()
            self.peaks[self._part] = max(self.peaks.get(self._part, 0), stats["allocated_bytes"]["all"]["peak"])
            self.reserved = max(self.reserved, stats["reserved_bytes"]["all"]["peak"])
            torch.cuda.reset_peak_memory_stats()
        if self._timeline:
            self._timeline.phase = part
            if self._gpu:
                self._timeline.peaks_gib[self._part] = self.peaks[self._part] / GIB
        self._part = part

    def times(self, accumulation: int) -> tuple[float, float]:
        """Seconds of a micro-batch and, beside them, of the optimizer; medians, the first step left out."""
        if self._gpu:
            torch.cuda.synchronize()
            apart = [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(self._losses)]
        else:
            apart = [after - before for before, after in itertools.pairwise(self._losses)]
        if accumulation == 1:
            return statistics.median(apart[1:] or apart), 0.0
        within = [s for i, s in enumerate(apart, 1) if i % accumulation and i > accumulation]
        across = [s for i, s in enumerate(apart, 1) if i % accumulation == 0 and i > accumulation]
        micro = statistics.median(within)
        return micro, max(0.0, statistics.median(across) - micro) if across else 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.begins(FORWARD)

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if not self.lasting and optimizer is not None and optimizer.state:  # fp16's scaler may skip the first steps
            self.lasting = lasting_bytes(model, optimizer)

    def on_train_end(self, args, state, control, **kwargs):
        self.begins(OPTIMIZER)


def _now(gpu: bool):
    """A moment of the GPU, which works behind, or of the clock."""
    if not gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
