"""`python -m llamanb` with something going wrong on rank 1: python -m tests.rank_process RECIPE ... (torchrun's command
with another module). FAULT in the environment says what."""

import os
import signal
import sys

FAULT, RANK = os.environ.get("FAULT", ""), os.environ.get("RANK", "0")
STEP = 5
"""The optimizer step in which it goes wrong."""


def break_it() -> None:
    import torch

    from llamanb.training import step

    inner, seen = step.StepTrainer._summed, []

    def summed(self, model, inputs, count):
        if self.state.global_step + 1 != STEP or seen:
            return inner(self, model, inputs, count)
        seen.append(FAULT)
        if FAULT == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if FAULT == "broken":
            raise ValueError("this rank is broken")
        if FAULT == "out of memory":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        total = inner(self, model, inputs, count)
        return total * float("nan") if FAULT == "not a number" else total

    step.StepTrainer._summed = summed


if __name__ == "__main__":
    from llamanb.scale.lead import main

    if RANK == "1" and FAULT:
        break_it()
    sys.exit(main())
