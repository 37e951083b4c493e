"""Trainings that are cut off, and what is looked at of them; for tests of checkpoints."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from transformers import TrainerCallback

from llamanb import Card, Recipe, plan, train
from llamanb.run import FINISHED
from llamanb.training import trainer
from llamanb.training.checkpoints import holds
from llamanb.training.resume import CHECKPOINTS

CPU = Card("CPU", None)
STEPS, PASS = 8, 5
"""Optimizer steps of a run, and of one pass over its rows; the last one of a pass has fewer rows."""
STATES = ("trained.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


def recipes(mini, folder: Path):
    """`recipes(mini, folder)(**fields)`: a recipe over 20 rows in that folder."""
    path = folder / "rows.jsonl"
    rows = [{"instruction": f"Say {n}.", "output": f"It is {n}, and {n * n}."} for n in range(20)]
    path.write_text("\n".join(map(json.dumps, rows)))
    fields = {"model": str(mini), "dataset": str(path), "max_length": 128, "effective_batch_size": 4, "steps": STEPS}
    fields |= {"micro_batch_size": 2, "dropout": 0.2, "eval_rows": 2, "learning_rate": 1e-2}
    return lambda **more: Recipe(**{**fields, **more})


class Ends(TrainerCallback):
    """Ends a training in the step after `step` as a dying process would: without a checkpoint more."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise SystemExit(f"after step {self.step}")


def ending(monkeypatch, kept: Path):
    """`ending(monkeypatch, kept)(recipe, runs, step)`: a run that made checkpoints at each step and ended after that
    one. The first of each kind is trained, and kept in that folder; the others are copies."""
    build = trainer.build_trainer

    def train_until(recipe, runs, step, name, asked):
        def built(plan, model, data, folder, callbacks, *rest):
            return build(plan, model, data, folder, [*callbacks, Ends(step)], *rest)

        with monkeypatch.context() as patch:
            patch.setattr(trainer, "build_trainer", built)
            with pytest.raises(SystemExit):
                train(plan(recipe, CPU), name=name, runs=runs, **asked)

    def end(recipe, runs, step, name="run", **asked):
        recipe, folder = recipe.replace(checkpoint_every_steps=1), runs / name
        if folder.exists() or asked:
            train_until(recipe, runs, step, name, asked)
            return folder
        copy = kept / hashlib.sha256(f"{recipe.to_json()} {step}".encode()).hexdigest()
        if not copy.exists():
            train_until(recipe, runs, step, name, asked)
            shutil.copytree(folder, copy)
        else:
            shutil.copytree(copy, folder)
        return folder

    return end


def states(run) -> list[bytes]:
    """Everything that decides how a training goes on, as it was at the end."""
    last = run.folder / CHECKPOINTS / f"step-{len(run.losses):08d}"
    assert holds(last)
    return [(last / name).read_bytes() for name in STATES]


def files(folder) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(run, whole) -> None:
    """Two runs came to the same, bit for bit."""
    assert [step._replace(time_s=0) for step in run.timeline.steps] == [
        step._replace(time_s=0) for step in whole.timeline.steps
    ]
    assert states(run) == states(whole)
    for path in whole.saved.glob("*.safetensors"):
        assert (run.saved / path.name).read_bytes() == path.read_bytes()
    assert run.scores == whole.scores
    assert run.status == whole.status == FINISHED
