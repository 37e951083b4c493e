"""When a training makes checkpoints, and what of torch's is in them: trained weights, optimizer, scheduler, scaler,
random states and the Trainer's own state. A checkpoint that cannot be written stops nothing."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback

from llamanb.attempts import attempt
from llamanb.nvml import first_line
from llamanb.recipe import Recipe
from llamanb.timeline import Timeline
from llamanb.training.checkpoints import commit, flush
from llamanb.training.optimizer import page_again
from llamanb.training.resume import CHECKPOINTS, Progress
from llamanb.training.step import StepTrainer

WEIGHTS = "trained.safetensors"
APART = 20
"""Times as long as a checkpoint takes that the next one waits at least, whatever the recipe says of minutes."""
IN_A_ROW = 5
"""Bad steps after which a run goes back: odd rows make single ones, and waiting for more costs time."""
RETRY_S = 60.0
"""Until the next try, where one failed."""


class CheckpointedTrainer(StepTrainer):
    """With what is trained and nothing else in a checkpoint: no card, no tokenizer, no pickled arguments, and
    no question to the Hub about the base model's config."""

    learns, bad = True, 0
    """Whether the last step was learned from; and how many in a row were not, but for those in which fp16's scale
    settles: each halves it, until it is so low (1) that no gradient which is a number overflows."""

    def _save_checkpoint(self, model, trial) -> None:
        Trainer._save_checkpoint(self, model, trial)

    def _clip_grad_norm(self, model) -> torch.Tensor:
        """Drops gradients that are not finite, or whose loss is not: optimizers then leave weights and states as they
        are. They wait for the backward pass to know, as they do for GradScaler."""
        norm, scaler = super()._clip_grad_norm(model), self.accelerator.scaler
        scale = scaler.get_scale() if scaler else 1.0
        self._metrics["train"]["scale"] = [scale]
        loss_is, norm_is = torch.stack([self._tr_loss, norm.float()]).isfinite().tolist()
        if self.streamed:
            self._metrics["train"]["stall_s"] = [self.streamed.stalled_s()]
        self.learns = loss_is and norm_is
        if not self.learns:
            model.zero_grad()
        self.bad = 0 if self.learns else self.bad + (not loss_is or scale <= 1)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        self._tr_loss.zero_()  # the Trainer subtracts it from itself, which leaves a NaN one
        ends = self.control.should_training_stop
        self.control.should_save &= ends or self.learns  # the last two must not all be of the same weights
        if self.bad >= IN_A_ROW or (ends and not self.weights_are_finite()):
            raise FloatingPointError("loss, gradients or weights that are not finite")

    def weights_are_finite(self) -> bool:
        """Of what is trained; without a copy of any of it."""
        return all(torch.linalg.vector_norm(p.detach(), torch.inf).isfinite() for _, p in self._trained())

    def save_model(self, output_dir: str, _internal_call: bool = False) -> None:
        if not self.weights_are_finite():
            raise RuntimeError("weights that are not finite")
        Path(output_dir).mkdir(parents=True)
        save_file({name: p.detach().contiguous() for name, p in self._trained()}, Path(output_dir) / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        # From a mapped file, safetensors (0.8) leaves 64 bytes a tensor behind
        with safe_open(Path(resume_from_checkpoint) / WEIGHTS, "pt", backend="pread") as saved:
            for name, parameter in self._trained():
                parameter.data.copy_(saved.get_tensor(name))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint:
            page_again(self.optimizer)
            # What the saved states say was meant for as many steps and for the rate that there were to be then
            highest, step = self.args.learning_rate, self.lr_scheduler.last_epoch
            rates = [highest * rule(step) for rule in self.lr_scheduler.lr_lambdas]
            self.lr_scheduler.base_lrs = [highest] * len(rates)
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            self.lr_scheduler._last_lr = rates

    def _trained(self):
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)


class Saves(TrainerCallback):
    """Makes a checkpoint every so many minutes or steps, and when training ends, however it was asked to.

    Args:
        recipe: says how often.
        progress: as far as the run was when this session began.
        timeline: of the run; what it has seen until then is flushed with each checkpoint.
        folder: of the run.
    """

    def __init__(self, recipe: Recipe, progress: Progress, timeline: Timeline, folder: Path):
        self.step: int | None = None
        """Of the last checkpoint that was made here."""
        self._recipe, self.progress, self.timeline, self.folder = recipe, progress, timeline, folder
        self._failed = False

    def attach(self, trainer: CheckpointedTrainer, begins: Callable[[str], None]) -> None:
        """Stands between the trainer and its `_save_checkpoint`; `begins` is told that the phase "save" does."""
        write = trainer._save_checkpoint

        def save(model, trial) -> None:
            begins("save")
            begin_s, step = time.monotonic(), trainer.state.global_step
            made = Path(trainer.args.output_dir) / f"checkpoint-{step}"

            def anew() -> None:
                shutil.rmtree(made.parent, ignore_errors=True)
                write(model, trial)

            try:
                attempt(anew, lambda error: anew)
                self._commit(made, step)
            except (OSError, RuntimeError, MemoryError, SafetensorError) as error:  # a full disk by any other name
                shutil.rmtree(made.parent, ignore_errors=True)
                self._tell(step, error, trainer.control.should_training_stop)
                self._next_s = time.monotonic() + RETRY_S
            else:
                self.step, self._failed = step, False
                took_s = time.monotonic() - begin_s
                self._next_s = time.monotonic() + max(60 * self._recipe.checkpoint_every_min, APART * took_s)

        trainer._save_checkpoint = save
        trainer.add_callback(self)

    def on_train_begin(self, args, state, control, **kwargs):
        self._begin_s = time.monotonic()
        self._next_s = self._begin_s + 60 * self._recipe.checkpoint_every_min

    def on_step_end(self, args, state, control, **kwargs):
        every = self._recipe.checkpoint_every_steps
        due = time.monotonic() >= self._next_s or (every and state.global_step % every == 0)
        control.should_save |= bool(due or control.should_training_stop)

    def _commit(self, made: Path, step: int) -> None:
        timeline, took_s = self.timeline, self.progress.train_s + time.monotonic() - self._begin_s
        steps, returns = tuple(timeline.steps), timeline.returns
        dataclasses.replace(self.progress, train_s=took_s, steps=steps, returns=returns).save(made)
        timeline.write(self.folder)
        files = (path for path in self.folder.iterdir() if path.suffix in (".json", ".csv"))
        for path in (*files, self.folder, self.folder.parent):
            flush(path)
        commit(made, self.folder / CHECKPOINTS, step)

    def _tell(self, step: int, error: Exception, last: bool) -> None:
        if last or not self._failed:  # else it has been said
            then = "" if last else "; training goes on, and tries again"
            why = f"{type(error).__name__}: {first_line(error)}"
            print(f"no checkpoint at step {step} ({why}). Earlier ones stay{then}", flush=True)
        self._failed = True
