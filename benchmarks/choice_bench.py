"""The time of an optimizer step in any layout, for `benchmarks.choice`: one model in one trainer, laid out anew each
time.

A step's micro-batches are alike, so a few are timed, forward and backward. A step is the first of them, as many of the
others as it has, and the optimizer, which no layout changes and which is timed once.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from benchmarks.speed_worker import Gpu, is_out_of_memory
from llamanb.architecture import architecture
from llamanb.layout import Plan

SCREEN_S, SCREENS, FINAL_S = 0.25, 5, 0.5
"""Seconds of a layout that are enough at a first look, or so many micro-batches; and in each pass of the final."""
SETTLING, SHORT = 8, 64
"""Optimizer steps, of rows of so many tokens, in which the optimizer is timed and fp16's scaler settles."""
TIMED, RAN_OUT = "timed", "out of memory"


class Bench:
    """A model with random weights, in a trainer.

    Args:
        plan: any for the model and the card, with fused layers.
        gpu: not limited to the card's memory before this is made: loading takes more than training.
    """

    def __init__(self, plan: Plan, gpu: Gpu):
        from transformers import TrainerCallback

        from benchmarks.speed_stacks import _tokenizer
        from llamanb.data import TrainingData
        from llamanb.model import attach_adapters, load_model
        from llamanb.quiet import quiet_libraries
        from llamanb.training.trainer import build_trainer, use_threads_that_pay

        self.gpu, self._marks, self._inputs, ends = gpu, [], {}, []

        class Steps(TrainerCallback):
            def on_step_end(_, args, state, control, **kwargs):
                ends.append((self._marks[-1], gpu.now()))

        with quiet_libraries(), tempfile.TemporaryDirectory() as folder:
            model = load_model(plan, _tokenizer(), architecture(plan.recipe.model))
            use_threads_that_pay(model)
            self.model = attach_adapters(model, plan.recipe)
            gpu.rest()
            rows = self._rows(SHORT, SETTLING * plan.recipe.effective_batch_size)
            data = TrainingData("random", "token ids", _tokenizer(), rows, [], [], [])
            self.trainer = build_trainer(plan, self.model, data, Path(folder), [Steps()])
            # a layout that runs out of memory is to fail here, and not to go on as a smaller one
            self.trainer._recovering = lambda work: work()
            backward = self.trainer.accelerator.backward

            def marked(*args, **kwargs):
                backward(*args, **kwargs)
                self._marks.append(gpu.now())

            self.trainer.accelerator.backward = marked
            self.trainer.train()
        gpu.sync()
        self.optimizer_s = statistics.median(gpu.seconds(*pair) for pair in ends[len(ends) // 2 :])

    @property
    def facts(self) -> dict:
        import torch

        name = torch.cuda.get_device_name() if self.gpu.here else "CPU"
        return {"gpu": name, "torch": torch.__version__, "optimizer_s": round(self.optimizer_s, 5)}

    def _rows(self, length: int, count: int) -> list:
        import numpy as np

        from llamanb.data.encode import Encoded

        ids = np.random.default_rng(0).integers(0, self.model.config.vocab_size - 300, size=(count, length)).tolist()
        return [Encoded(row, list(row)) for row in ids]

    def _pool(self, length: int, count: int) -> dict:
        """The rows of one optimizer step, on the device."""
        from llamanb.training.step import pool

        if (length, count) not in self._inputs:
            rows = [vars(row) for row in self._rows(length, count)]
            self._inputs[length, count] = self.trainer._prepare_inputs(pool(rows))
        return self._inputs[length, count]

    def lay(self, plan: Plan) -> None:
        """Makes the trainer's next steps those of the plan."""
        self.trainer.plan = plan
        self.trainer.fused.kinds = plan.layers

    def micro_batches(self, plan: Plan, count: int) -> list[float]:
        """Seconds of each of `count` micro-batches of an optimizer step, forward and backward."""
        inputs = self._pool(plan.length, count * plan.micro_batch_size)
        self.model.zero_grad()
        self.gpu.sync()
        self._marks = [self.gpu.now()]
        trained = inputs["labels"].ge(0).sum()
        self.trainer.training_step(self.trainer.model, inputs, num_items_in_batch=trained)
        self.gpu.sync()
        return [self.gpu.seconds(*pair) for pair in itertools.pairwise(self._marks)]

    def screen(self, plan: Plan) -> float:
        """Seconds of an optimizer step, after a short look: at second micro-batches, or second steps of one."""
        count = min(2, plan.accumulation)
        found = self.micro_batches(plan, count)[1:]
        while not found or (sum(found) < SCREEN_S and len(found) < SCREENS):
            found.append(self.micro_batches(plan, count)[-1])
        return plan.accumulation * statistics.median(found) + self.optimizer_s

    def final(self, plan: Plan) -> float:
        """Seconds of an optimizer step, after a longer one."""
        count = min(3, plan.accumulation)
        self.micro_batches(plan, count)
        first, others = [], []
        while not first or sum(first) + sum(others) < FINAL_S:
            one, *more = self.micro_batches(plan, count)
            first.append(one)
            others += more
        inside = (plan.accumulation - 1) * statistics.median(others) if others else 0.0
        return statistics.median(first) + inside + self.optimizer_s

    def attempt(self, plan: Plan, measure: Callable[[Plan], float]) -> dict:
        """{"status": TIMED, "step_s": ..., GiB at the peak}, or {"status": RAN_OUT}. `measure`: `screen` or `final`."""
        self.lay(plan)
        self.gpu.rest()
        self.gpu.reset()
        try:
            return {"status": TIMED, "step_s": round(measure(plan), 5), **self.gpu.memory()}
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the activations
        self.model.zero_grad()
        gc.collect()
        return {"status": RAN_OUT}
