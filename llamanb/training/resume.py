"""Which run `train` goes on with, and how far that one is. Reads no data, and torch only to look at a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from array import array
from dataclasses import dataclass, field
from pathlib import Path

from llamanb.data import TrainingData
from llamanb.errors import UNREADABLE, LlamanbError, ModelError, RecipeError
from llamanb.html import Table
from llamanb.layout import Plan
from llamanb.run import FINISHED, newest_folder
from llamanb.scores import Scores
from llamanb.timeline import Step
from llamanb.training.checkpoints import lock, newest

CHECKPOINTS, PROGRESS = "checkpoints", "progress.json"
LONGER = {"steps", "epochs"}
CADENCE = {"stop_after_min", "checkpoint_every_min", "checkpoint_every_steps"}
RAN_OUT = "ran out of memory"
"""Begins the reason of a plan's layers where it took the place of another in the middle of a run."""
FREE = LONGER | CADENCE | {"micro_batch_size", "checkpointing"}
"""Fields that decide neither what is trained nor on what: a run may go on with others."""


@dataclass(frozen=True)
class Progress:
    """How far a run is, beside its weights and states; a file of each checkpoint."""

    rows: str
    """What it is trained and scored on, as `rows_hash` gives it."""
    before: Scores | None = None
    train_s: float = 0.0
    steps: tuple[Step, ...] = ()
    returns: list[list[int]] = field(default_factory=list)
    """As in the Timeline."""

    def save(self, checkpoint: Path) -> None:
        (checkpoint / PROGRESS).write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, checkpoint: Path) -> Progress:
        fields = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
        before = fields["before"] and Scores.read(fields["before"])
        return cls(**{**fields, "before": before, "steps": tuple(Step(*step) for step in fields["steps"])})


def rows_hash(data: TrainingData) -> str:
    """The same for the same rows in the same order, split the same way."""
    digest = hashlib.sha256()
    for rows in (data.train, data.held_out):
        digest.update(array("q", [len(rows)]))
        for row in rows:
            digest.update(array("q", [len(row.input_ids), *row.input_ids, *row.labels]))
    return digest.hexdigest()


def pick_up(plan: Plan, runs: Path, name: str, resume: bool | None, held: contextlib.ExitStack) -> Path | None:
    """The checkpoint to go on from, of the newest run of that name, locked until `held` ends; None: a new run.

    Raises RecipeError where that run is unfinished and of another recipe, and where `resume` asks for what cannot be.
    """
    folder = newest_folder(runs, name)
    if resume is False or (folder is None and not resume):
        return None
    if folder is None:
        return _nothing(f"there is no run {name!r} in {runs}", resume)
    if not held.enter_context(lock(folder)):
        return _nothing(f"{folder} is being trained by another process", resume)
    finished = _status(folder) == FINISHED
    if finished and not resume:
        return None
    checkpoint = newest(folder / CHECKPOINTS)
    if checkpoint is None:
        return _nothing(f"{folder} has no checkpoint to go on from", resume)
    try:
        changed = _changed(Plan.from_json((folder / "plan.json").read_text(encoding="utf-8")), plan)
    except (*UNREADABLE, LlamanbError) as error:
        return _nothing(f"{folder}/plan.json cannot be read ({type(error).__name__})", resume)
    if finished and changed.keys().isdisjoint(LONGER):
        return _nothing(f"{folder} is finished, and no more steps are asked for", resume)
    if changed and (not resume or changed.keys() - FREE):
        raise _another_recipe(folder, changed)
    return checkpoint


def as_it_ran(plan: Plan, folder: Path) -> Plan:
    """The plan, with what became of it in that run when memory ran out; unless it is for another card by now, or asks
    for a layout of its own."""
    with contextlib.suppress(*UNREADABLE, LlamanbError):  # what cannot be read is as if it had not been
        was = Plan.from_json((folder / "plan.json").read_text(encoding="utf-8"))
        asked = [
            (p.card.name, p.cards, p.streamed, p.recipe.micro_batch_size, p.recipe.checkpointing) for p in (was, plan)
        ]
        if was.reasons.get("layers", "").startswith(RAN_OUT) and asked[0] == asked[1]:
            kept = ("micro_batch_size", "accumulation", "layers", "memory", "time", "reasons", "alternatives")
            return plan.replace(offloaded_gib=was.offloaded_gib, **{name: getattr(was, name) for name in kept})
    return plan


def require_states(checkpoint: Path) -> None:
    """Raises ModelError where a file that torch will read there is more than states. Nothing in it runs."""
    import torch
    from transformers.trainer_pt_utils import safe_globals

    for path in sorted(checkpoint.glob("*.pt*")):
        numpys = safe_globals() if path.name.startswith("rng_state") else contextlib.nullcontext()
        try:
            with numpys:
                torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # whatever comes of a file that anybody may have written
            raise ModelError(
                f"{path} is not what a training leaves there; nothing in it was run",
                f"beside numbers it asks for code, or is no file of torch's ({type(error).__name__}); the manifest "
                "vouches for it, so somebody wrote both",
                f"find out who; or remove {checkpoint} to go on from the one before it, or resume=False for a new run",
            ) from error


def _nothing(why: str, resume: bool | None) -> None:
    if resume:
        raise RecipeError("there is nothing to resume", why, "leave resume out: that begins a new run")
    print(f"{why}; beginning a new run", flush=True)


def _status(folder: Path) -> str | None:
    """As the run itself wrote it; None where it cannot be read."""
    with contextlib.suppress(*UNREADABLE):
        return json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"]


def _changed(was: Plan, now: Plan) -> dict[str, tuple]:
    """Recipe fields that differ, with both values; what a plan chooses by the card counts as it was chosen, and where
    weights lie, which changes no bit, not at all."""
    old, new = ({**dataclasses.asdict(p.recipe), "precision": p.dtype, "optimizer": p.optimizer} for p in (was, now))
    return {name: (old[name], new[name]) for name in new if old[name] != new[name] and name != "weights"}


def _another_recipe(folder: Path, changed: dict[str, tuple]) -> RecipeError:
    decisive = ", ".join(name for name in changed if name not in FREE)
    fix = "give another name=, or resume=False for a new run beside it"
    fix += f"; {decisive} decided what is trained from its first step on" if decisive else ", or resume=True to go on"
    why = "; ".join(f"{name}: {old!r} there, {new!r} now" for name, (old, new) in changed.items())
    error = RecipeError(f"{folder} is there already, unfinished, with another recipe", why, fix)
    error.details = (Table(["field", "there", "now"], [(name, *values) for name, values in changed.items()]),)
    return error
