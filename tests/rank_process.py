"""`python -m llamanb` with something going wrong on rank 1: python -m tests.rank_process RECIPE ... (torchrun's command
with another module). FAULT in the environment says what."""

import os
import signal
import sys

FAULT, RANK, COUNT = os.environ.get("FAULT", ""), os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", "1"))
SHARDED = "SHARDED" in os.environ
STEP = 5
"""The optimizer step in which it goes wrong."""


def break_it() -> None:
    import torch

    from llamanb.model.streamed import StreamedLayers
    from llamanb.training.saves import IN_A_ROW
    from llamanb.training.step import StepTrainer

    summed, computed, visit = StepTrainer._summed, StepTrainer.compute_loss, StreamedLayers.visit
    now, seen = [False], []

    def first_time() -> bool:
        if not now[0] or seen:
            return False
        seen.append(FAULT)
        return True

    def sum_up(self, *arguments):
        now[0] = self.state.global_step + 1 == STEP
        total = summed(self, *arguments)
        if FAULT == "not a number" and first_time():
            return total * float("nan")
        if FAULT == "not a number for long" and self.state.global_step + 1 >= STEP and len(seen) < IN_A_ROW:
            seen.append(FAULT)
            return total * float("nan")
        return total

    def compute(self, *arguments, **more):
        if FAULT == "killed" and first_time():
            os.kill(os.getpid(), signal.SIGKILL)
        if FAULT == "broken" and first_time():
            raise ValueError("this rank is broken")
        if FAULT == "out of memory" and first_time():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return computed(self, *arguments, **more)

    def come_down(self, number):
        if FAULT == "out of memory in the backward pass" and (number, self._at) == (1, 2) and first_time():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return visit(self, number)

    StepTrainer._summed, StepTrainer.compute_loss, StreamedLayers.visit = sum_up, compute, come_down


def share_layers() -> None:
    """Plans as a GPU would have them: fused layers, all kinds of activations, weights shared."""
    from llamanb.scale import lead
    from llamanb.tape import CHECKPOINTED, HALVED, OFFLOADED, STORED

    inner, layers = lead.plan, (OFFLOADED, CHECKPOINTED, HALVED, STORED)
    shared = {"fused": True, "layers": layers, "streamed": (0, 1, 2, 3), "shards": COUNT}
    lead.plan = lambda *args, **more: inner(*args, **more).replace(**shared)


def once_launched(then) -> None:
    """Calls `then` as soon as this process has its own GPU; torch is not to be imported before."""
    from llamanb.scale import lead

    launched = lead.launched

    def and_then():
        found = launched()
        then()
        return found

    lead.launched = and_then


if __name__ == "__main__":
    from llamanb.scale.lead import main

    if SHARDED:
        share_layers()
    if RANK == "1" and FAULT:
        once_launched(break_it)
    sys.exit(main())
