"""What a run does when its numbers stay other than finite: it goes back to an earlier checkpoint with half the learning
rate, and at last ends with the reason. Single steps are skipped by the trainer itself (`saves.CheckpointedTrainer`)."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from llamanb.errors import LlamanbError
from llamanb.model import save_model
from llamanb.training.checkpoints import holds, step_of
from llamanb.training.resume import CHECKPOINTS, Progress, require_states
from llamanb.training.saves import CheckpointedTrainer, Saves

MOST_RETURNS = 3
"""Of a run. When an eighth of the learning rate has not helped, it is something else."""


class NotFiniteError(LlamanbError):
    """Loss, gradients or weights are not finite, and a lower learning rate did not mend it."""


def train_finite(trainer: CheckpointedTrainer, saves: Saves, checkpoint: Path | None):
    """trainer.train() from a checkpoint, and again from earlier ones where it must be. Raises NotFiniteError."""
    timeline, highest = saves.timeline, trainer.plan.recipe.highest_learning_rate
    while True:
        trainer.args.learning_rate = highest / 2 ** len(timeline.returns)
        trainer.tokens = timeline.steps[-1].tokens if timeline.steps else 0
        trainer.learns, trainer.bad = True, 0
        trainer.ranks.tell((checkpoint, trainer.args.learning_rate))
        with contextlib.suppress(FloatingPointError):
            return trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        checkpoint = _go_back(trainer, saves)


def _go_back(trainer: CheckpointedTrainer, saves: Saves) -> Path:
    """To the newest checkpoint after which something was learned: the same weights would give the same numbers."""
    timeline = saves.timeline
    learned = max((step.step for step in timeline.steps if not step.skipped), default=0)
    there = sorted(filter(holds, (saves.folder / CHECKPOINTS).glob("step-*")), reverse=True)
    checkpoint = next((path for path in there if step_of(path) < learned), None)
    if checkpoint is None or len(timeline.returns) == MOST_RETURNS:
        raise _error(trainer, saves, learned, checkpoint)
    require_states(checkpoint)
    for path in there[: there.index(checkpoint)]:  # or they would be the newest
        shutil.rmtree(path, ignore_errors=True)
    saves.progress = Progress.load(checkpoint)
    timeline.go_back(saves.progress.steps)
    with contextlib.suppress(OSError):
        timeline.write(saves.folder)  # should this session die now, the next one knows
    trainer.optimizer.state.clear()  # makes room for the checkpoint's
    print(
        "not finite at step {}: back to step {} with half the learning rate".format(*timeline.returns[-1]), flush=True
    )
    return checkpoint


def _error(trainer: CheckpointedTrainer, saves: Saves, learned: int, checkpoint: Path | None) -> NotFiniteError:
    """What ends the run. The weights of its last good checkpoint become its adapter."""
    plan, timeline = trainer.plan, saves.timeline
    why = f"none of its steps was: weights or rows are broken, or numbers too large for {plan.dtype}"
    if learned:
        back = f"{len(timeline.returns)} returns to earlier checkpoints did not help"
        why = f"step {learned} was the last to learn from; {back if checkpoint else 'no checkpoint is from before it'}"
    fix = f"a learning_rate well below {trainer.args.learning_rate:g}, rows without oddities (02_data shows them)"
    fix += ", precision = 'bf16' where the card can, else 'fp32'" if plan.dtype == "fp16" else ""
    fix += "; with another name=, or resume=False"
    with contextlib.suppress(OSError):  # a full disk must not hide the error
        if checkpoint:
            trainer._load_from_checkpoint(checkpoint)
            saved = save_model(trainer.model, trainer.processing_class, plan, saves.folder)
            fix += f". What was learned until step {step_of(checkpoint)} is in {saved}"
    return NotFiniteError(f"loss, gradients or weights are not finite at step {timeline.steps[-1].step}", why, fix)
