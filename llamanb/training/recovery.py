"""What a training does when memory runs out: the same step again in a way that takes less, or the optimizer's from
where it came to. What is learned stays the same."""

from __future__ import annotations

import itertools
import statistics
import types
from collections.abc import Callable
from dataclasses import replace

from torch.optim import Optimizer
from transformers import TrainerCallback

from llamanb.architecture import architecture
from llamanb.attempts import attempt
from llamanb.layout import GIB, Plan
from llamanb.memory import predict
from llamanb.planner import search, workload_of
from llamanb.tape import CHECKPOINTED
from llamanb.timeline import Timeline

SMALLER = 0.95
"""Share of what the plan takes that the next one is made for; it keeps a margin of its own besides."""


SLOWER, MOST_STEPS = 4, 50
"""Times as slow as the middle one of so many steps, two steps in a row: no usual step is."""


def smaller(plan: Plan) -> Plan | None:
    """The fastest plan for the same steps that takes less memory, by prediction; None where this one takes least.

    Where the plan was wrong, or others took memory, one after the other is tried.
    """
    recipe, shape = plan.recipe, architecture(plan.recipe.model, plan.recipe.revision)
    if plan.memory is None:  # a CPU, whose memory nothing is planned for
        if plan.micro_batch_size > 1:
            rows = next(n for n in range(plan.micro_batch_size // 2, 0, -1) if plan.share % n == 0)
            return _with(plan, rows, plan.layers)
        least = (CHECKPOINTED,) * shape.layers
        return _with(plan, 1, least) if plan.layers != least else None
    takes = predict(workload_of(plan, shape)).reserved / GIB
    free = recipe.replace(max_length=plan.length, micro_batch_size=None, checkpointing="auto")
    free = free.replace(effective_batch_size=plan.share, weights="resident")  # what is loaded stays where it is
    card = replace(plan.card, free_gib=min(SMALLER * takes, plan.card.free_gib))  # a forced plan may take more than all
    found = search(free, card, shape, force=True, streamed=len(plan.streamed), shards=plan.shards)
    if found.needs_gib >= takes:
        return None
    less = _with(plan, found.micro_batch_size, found.layers)
    return less.replace(memory=found.memory, time=found.time, offloaded_gib=found.offloaded_gib)


def _with(plan: Plan, rows: int, layers: tuple[str, ...]) -> Plan:
    return plan.replace(micro_batch_size=rows, accumulation=plan.share // rows, layers=layers, alternatives=())


def go_on(optimizer: Optimizer) -> None:
    """Makes the optimizer's step go on, once, where memory runs out in it: with the parameters that it had not come to,
    after the allocator's cache is given back.

    bitsandbytes makes each parameter's states just before it updates that parameter; torch's fused AdamW makes all of
    them first.
    """
    step = optimizer.step

    def steps(_, closure: Callable | None = None):
        before = {parameter: _count(state) for parameter, state in optimizer.state.items()}

        def rest():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    count = _count(optimizer.state.get(parameter, {}))
                    if count > before.get(parameter, 0):
                        parameter.grad = None  # done
                    elif parameter not in before:
                        optimizer.state.pop(parameter, None)  # half made
            return step()

        return attempt(lambda: step(closure), lambda error: rest)

    optimizer.step = types.MethodType(steps, optimizer)


def _count(state: dict) -> int:
    return int(state.get("step", 0))


class Spills(TrainerCallback):
    """Says once when steps have become much slower: on WSL2 a full GPU moves memory to the host's instead of failing.

    Args:
        timeline: what `LiveView` adds steps to; it comes first.
    """

    def __init__(self, timeline: Timeline):
        self._timeline, self._said = timeline, False

    def on_log(self, args, state, control, **kwargs):
        pairs = list(itertools.pairwise(self._timeline.steps[-MOST_STEPS:]))
        rates = [(now.tokens - then.tokens) / max(now.time_s - then.time_s, 1e-9) for then, now in pairs]
        if self._said or len(rates) < 4 or SLOWER * max(rates[-2:]) >= statistics.median(rates):
            return
        self._said = True
        print(
            f"steps are {statistics.median(rates) / max(rates[-2:]):.0f} times slower than they were: the GPU may be "
            "full, and its Windows driver moving memory to the host's. Close what else uses it, or interrupt and go "
            "on with a smaller micro_batch_size",
            flush=True,
        )
