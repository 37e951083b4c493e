"""What each part of a training step takes: torch's own peaks, read and reset where one part ends."""

from __future__ import annotations

import itertools
import statistics
import time

import torch
from transformers import Trainer, TrainerCallback

from llamanb.memory import SEEN


class Instants(TrainerCallback):
    """Peaks of allocated memory by the part of the step they fall into, and when each micro-batch had its loss.

    `attach` wraps the trainer's loss and backward; nothing of what they compute changes, and nothing waits for the GPU
    that did not: trl reads the loss of every micro-batch anyway.
    """

    def __init__(self):
        self.peaks = dict.fromkeys(SEEN, 0)
        """Bytes."""
        self.reserved = 0
        """Most bytes that torch held of the GPU."""
        self.losses_s: list[float] = []
        """When the loss of each micro-batch was there, in seconds of a clock."""

    def attach(self, trainer: Trainer) -> None:
        compute_loss, backward = trainer.compute_loss, trainer.accelerator.backward

        def watched_loss(*args, **kwargs):
            self.ends("optimizer step")
            loss = compute_loss(*args, **kwargs)
            self.losses_s.append(time.perf_counter())
            self.ends("forward")
            return loss

        def watched_backward(*args, **kwargs):
            backward(*args, **kwargs)
            self.ends("backward")

        trainer.compute_loss, trainer.accelerator.backward = watched_loss, watched_backward
        trainer.add_callback(self)

    def ends(self, part: str) -> None:
        """Counts the peak since the last call to `part`."""
        self.peaks[part] = max(self.peaks[part], torch.cuda.max_memory_allocated())
        self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()

    def times(self, accumulation: int) -> tuple[float, float]:
        """Seconds of a micro-batch and, beside them, of the optimizer; medians, the first step left out."""
        apart = [after - before for before, after in itertools.pairwise(self.losses_s)]
        if accumulation == 1:
            return statistics.median(apart[1:] or apart), 0.0
        within = [s for i, s in enumerate(apart, 1) if i % accumulation and i > accumulation]
        across = [s for i, s in enumerate(apart, 1) if i % accumulation == 0 and i > accumulation]
        micro = statistics.median(within)
        return micro, max(0.0, statistics.median(across) - micro) if across else 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.ends("load")

    def on_train_end(self, args, state, control, **kwargs):
        self.ends("optimizer step")
