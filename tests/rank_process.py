"""`python -m llamanb` with something going wrong on rank 1: python -m tests.rank_process RECIPE ... (torchrun's command
with another module). FAULTS in the environment says what, and in which optimizer step each: {"broken": 5}."""

import json
import math
import os
import signal
import sys

FAULTS = json.loads(os.environ.get("FAULTS", "{}"))
RANK, COUNT = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", "1"))
SHARDED = "SHARDED" in os.environ


def break_it() -> None:
    import torch

    from llamanb.model.streamed import StreamedLayers
    from llamanb.training.saves import IN_A_ROW
    from llamanb.training.step import StepTrainer

    summed, computed, visit = StepTrainer._summed, StepTrainer.compute_loss, StreamedLayers.visit
    step, seen = [0], []

    def first_time(fault: str) -> bool:
        if FAULTS.get(fault) != step[0] or fault in seen:
            return False
        seen.append(fault)
        return True

    def sum_up(self, *arguments):
        step[0] = self.state.global_step + 1
        total = summed(self, *arguments)
        if first_time("not a number"):
            return total * float("nan")
        fault = "not a number for long"
        if step[0] >= FAULTS.get(fault, math.inf) and seen.count(fault) < IN_A_ROW:
            seen.append(fault)
            return total * float("nan")
        return total

    def compute(self, *arguments, **more):
        if first_time("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if first_time("broken"):
            raise ValueError("this rank is broken")
        if first_time("out of memory"):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return computed(self, *arguments, **more)

    def come_down(self, number):
        if (number, self._at) == (1, 2) and first_time("out of memory in the backward pass"):
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
    if RANK == "1" and FAULTS:
        once_launched(break_it)
    sys.exit(main())
