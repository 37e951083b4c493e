"""Out of memory, explained: what the GPU held when it happened, which part of it was not planned, and what would fit.

A `Scene` is set before a training and knows what the training puts on the GPU. What lasts is counted tensor by tensor,
the rest is what the phase at hand was making; whatever was there before, and what other processes hold, is told apart.
"""

from __future__ import annotations

import contextlib
import gc
import re
from dataclasses import replace
from pathlib import Path

import torch

from llamanb.advice import changes_that_fit
from llamanb.architecture import architecture
from llamanb.attempts import forget, is_out_of_memory
from llamanb.errors import LlamanbError
from llamanb.html import Bar, Table
from llamanb.layout import GIB, Plan
from llamanb.memory import SEEN, outline
from llamanb.planner import search, workload_of
from llamanb.run import Run
from llamanb.tape.workload import ACTIVATIONS, GRADIENTS, LOSS, OPTIMIZER, TEMPORARIES, WEIGHTS
from llamanb.timeline import Timeline
from llamanb.watch.buckets import lasting_bytes

SNAPSHOT = "memory_snapshot.pickle"
EARLIER, OTHERS, GAPS, CONTEXT = "earlier cells of this notebook", "other processes", "fragmentation", "CUDA context"
MAKING = {"load": WEIGHTS, "forward": ACTIVATIONS, "loss": LOSS, "backward": ACTIVATIONS, "optimizer step": OPTIMIZER}
"""What each phase makes beside what can be counted."""
LEAST_GIB = 0.1
"""What is planned with where nothing is left."""
ALIKE = 0.9
"""Of the largest bucket: what is as large may be named instead of it."""


class OutOfMemoryError(LlamanbError):
    """The GPU's memory was not enough. `bucket` is what took it, `held` all that was there, `changes` would fit."""

    def __init__(self, what: str, why: str, fix: str, phase: str, bucket: str, held: Bar, changes: Table):
        super().__init__(what, why, fix)
        self.phase, self.bucket, self.held, self.changes = phase, bucket, held, changes
        self.details = (held, changes) if changes.rows else (held,)


class Scene:
    """What a training has put on the GPU so far. Made before anything of it is there."""

    def __init__(self, plan: Plan, folder: Path):
        self.plan, self.folder = plan, folder
        self.run: Run = Run(folder, plan, Timeline("nothing yet"))
        """As far as it came."""
        self.model = self.trainer = self.instants = None
        self._earlier = torch.cuda.memory_allocated() if plan.card.is_gpu else 0
        if plan.card.is_gpu:
            torch.cuda.reset_peak_memory_stats()  # peaks of earlier cells are no part of this training

    @property
    def buckets_gib(self) -> dict[str, float]:
        """What lasts, as counted after the first step; empty before."""
        lasting = self.instants.lasting if self.instants else {}
        return {bucket: size / GIB for bucket, size in lasting.items()}

    def clear(self, error: BaseException | None = None) -> None:
        """Lets go of the model, also where the error's traceback holds it, and gives its memory back."""
        if self.trainer is not None:  # the functions in a traceback hold the trainer whatever becomes of its frames
            self.trainer.accelerator.free_memory()
            vars(self.trainer).clear()
        for module in list(self.model.modules()) if self.model is not None else ():  # and trl's forward holds the model
            vars(module).clear()
        self.model = self.trainer = None
        forget(error)
        gc.collect()
        if self.plan.card.is_gpu:
            torch.cuda.empty_cache()

    def explain(self, error: BaseException, timeline: Timeline) -> OutOfMemoryError | None:
        """The error as a person can act on it; None where it is no lack of the GPU's memory, or where a GPU in that
        state no longer answers."""
        if not (self.plan.card.is_gpu and self.plan.memory and is_out_of_memory(error)) or isinstance(
            error, MemoryError
        ):
            return None
        with contextlib.suppress(OSError, RuntimeError):  # the disk may be full too
            torch.cuda.memory._dump_snapshot(str(self.folder / SNAPSHOT))
        with contextlib.suppress(LlamanbError, RuntimeError):  # then torch's own words stand
            return self._explain(error, timeline.phase)

    def _explain(self, error: BaseException, phase: str) -> OutOfMemoryError:
        plan = self.plan
        held, planned, asked = self._held(phase), _planned(plan, phase), _asked(error)
        held[MAKING.get(phase, ACTIVATIONS)] += asked
        bucket = _culprit(plan, phase, held, planned)
        room = _room()
        missed = 0 if bucket in (EARLIER, OTHERS) else _missed(held, planned)
        changes = self._changes(held, room, missed, by_rows=MAKING.get(phase) in (ACTIVATIONS, LOSS))
        what = f"out of memory in the phase {phase!r}, on {bucket}"
        why = f"{asked / GIB:.2f} GiB more were asked for. " if asked else ""
        why += f"{bucket}: {held.get(bucket, 0) / GIB:.2f} GiB, {max(0, planned.get(bucket, 0)) / GIB:.2f} planned"
        if not plan.fits:
            why += "; the plan said that it would not fit, and was forced"
        fix = str(changes.rows[0][0]) if changes.rows else "no single change is enough: a smaller model, shorter rows"
        caption = f"what the GPU held in that phase; torch's own record of it: {self.folder / SNAPSHOT}"
        limit = room + held[CONTEXT] + held[OTHERS]
        bar = Bar({name: size / GIB for name, size in held.items()}, limit / GIB, "GiB", caption)
        return OutOfMemoryError(what, why, fix, phase, bucket, bar, changes)

    def _held(self, phase: str) -> dict[str, int]:
        """Bytes by bucket, as it is now."""
        optimizer = getattr(self.trainer, "optimizer", None)
        held = lasting_bytes(self.model, optimizer) if self.model is not None else {WEIGHTS: 0, OPTIMIZER: 0}
        held |= {ACTIVATIONS: 0, LOSS: 0}
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        rest = max(0, allocated - self._earlier - sum(held.values()))
        if phase == "loss":
            held[ACTIVATIONS] = min(rest, _planned(self.plan, phase)[ACTIVATIONS])
        held[MAKING.get(phase, ACTIVATIONS)] += rest - held[ACTIVATIONS]
        free, total = torch.cuda.mem_get_info()
        context = round((self.plan.card.context_gib or 0) * GIB)
        whole = torch.cuda.get_per_process_memory_fraction() == 1  # else a pretend card, which nobody shares
        others = max(0, total - free - reserved - context) if whole else 0
        return held | {EARLIER: self._earlier, GAPS: reserved - allocated, CONTEXT: context, OTHERS: others}

    def _changes(self, held: dict[str, int], room: int, missed: int, *, by_rows: bool) -> Table:
        """What would fit into `room` bytes, if the plan is wrong by `missed` again, or by less where that grows with
        the rows computed at once."""
        plan, model = self.plan, architecture(self.plan.recipe.model, self.plan.recipe.revision)
        recipe, left = plan.recipe.replace(max_length=plan.length), (room - held[EARLIER]) / GIB
        made = changes_that_fit(recipe, replace(plan.card, free_gib=max(left - missed / GIB, LEAST_GIB)), model)
        found = Table(made.headers, made.rows, made.caption)
        if missed:  # a larger card was planned for as if nothing were wrong
            found.rows = [row for row in found.rows if not row[0].startswith("a larger card")]
        if missed and by_rows and plan.micro_batch_size > 1:
            single = search(recipe.replace(micro_batch_size=1), replace(plan.card, free_gib=left), model, force=True)
            needs = single.needs_gib + missed / GIB / plan.micro_batch_size
            if needs <= left:
                found.rows.insert(0, ["micro_batch_size = 1", f"about {needs:.2f} GiB", "nothing that is learned"])
        for bucket, words in ((OTHERS, "end them: 00_check_gpu lists them"), (EARLIER, "restart the kernel")):
            if held[bucket] > 0.02 * (room + held[OTHERS]) and plan.needs_gib * GIB <= room + held[OTHERS]:
                row = [f"free what {bucket} hold ({words})", f"{plan.needs_gib:.2f} GiB", "nothing that is learned"]
                found.rows.insert(0, row)
        return found


def _room() -> int:
    """Bytes that torch may take of the GPU, with what it has: a pretend card's limit, or what others leave."""
    free, total = torch.cuda.mem_get_info()
    limit = torch.cuda.get_per_process_memory_fraction() * total
    return round(min(limit, free + torch.cuda.memory_reserved()))


def _planned(plan: Plan, phase: str) -> dict[str, int]:
    """Bytes by bucket that the plan expected at the peak of a phase, in the buckets that `_held` tells apart."""
    peaks = outline(workload_of(plan, architecture(plan.recipe.model, plan.recipe.revision))).peaks
    instants = [instant for instant in SEEN.get(phase, SEEN["backward"]) if instant in peaks]
    found = dict(max((peaks[instant] for instant in instants), key=lambda buckets: sum(buckets.values())))
    making = MAKING.get(phase, ACTIVATIONS)
    for name in (LOSS, TEMPORARIES) if making != LOSS else (TEMPORARIES,):
        found[making] = found.get(making, 0) + found.pop(name, 0)
    card = plan.card
    found[GAPS] = plan.memory.gaps
    found[OTHERS] = round(max(0.0, card.vram_gib - card.free_gib - (card.context_gib or 0)) * GIB)
    return found


def _missed(held: dict[str, int], planned: dict[str, int]) -> int:
    """Bytes that the training took beyond its plan."""
    took = sum(size for name, size in held.items() if name not in (OTHERS, CONTEXT, EARLIER))
    return max(0, took - sum(size for name, size in planned.items() if name != OTHERS))


def _culprit(plan: Plan, phase: str, held: dict[str, int], planned: dict[str, int]) -> str:
    """The bucket that grew most beyond a plan that fits; of one that was forced, the largest."""
    counted = {name: held.get(name, 0) for name in {**planned, **held} if name != CONTEXT}
    if plan.fits:
        return max(counted, key=lambda name: counted[name] - planned.get(name, 0))
    expected = {name: max(size, planned.get(name, 0)) for name, size in counted.items()}
    largest = max(expected, key=expected.get)
    own = [name for name in (MAKING.get(phase), GRADIENTS if phase == "backward" else None) if name]
    alike = [name for name in own if expected.get(name, 0) >= ALIKE * expected[largest]]
    return alike[-1] if alike else largest


def _asked(error: BaseException) -> int:
    """Bytes of the allocation that failed; 0 where the message does not say."""
    match = re.search(r"Tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", str(error))
    scale = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    return round(float(match[1]) * scale[match[2]]) if match else 0
