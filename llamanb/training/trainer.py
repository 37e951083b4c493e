"""trl's SFTTrainer, set up so that what a plan says is what runs."""

from __future__ import annotations

import os
import signal
import time
import warnings
from pathlib import Path

import torch
from bitsandbytes.optim import GlobalOptimManager
from datasets import Dataset
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, TrainerCallback
from trl import SFTConfig

from llamanb.data import TrainingData
from llamanb.data.encode import Encoded
from llamanb.layout import Plan
from llamanb.planner import steps_of
from llamanb.ranks import ALONE, Ranks
from llamanb.training.checkpoints import ASIDE
from llamanb.training.interrupts import set_handler
from llamanb.training.resume import CHECKPOINTS
from llamanb.training.saves import CheckpointedTrainer
from llamanb.training.step import pool

OPTIMIZERS = {"adamw_8bit": "adamw_bnb_8bit"}
"""The recipe's names that transformers spells differently."""
SMALL_PARAMETERS = 20_000_000
"""Below this a second CPU thread gains nothing worth its price; the tiny Llama has 1.8 million, the smallest real one
1.2 billion."""


def build_trainer(
    plan: Plan,
    model: PreTrainedModel,
    data: TrainingData,
    folder: Path,
    callbacks: list[TrainerCallback],
    report_to: str = "none",
    ranks: Ranks = ALONE,
) -> CheckpointedTrainer:
    """A trainer for rows that are encoded already, on a model that is loaded already. It makes checkpoints once `Saves`
    is attached to it."""
    recipe = plan.recipe
    length = {"max_steps": recipe.steps} if recipe.steps else {"num_train_epochs": recipe.epochs}
    config = SFTConfig(
        output_dir=str(folder / CHECKPOINTS / ASIDE),
        per_device_train_batch_size=plan.recipe.effective_batch_size,  # a whole step; StepTrainer splits it
        **length,
        learning_rate=recipe.highest_learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup if steps_of(recipe, data) > 1 else 0,  # a share; the first step's rate is 0 then
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        optim=OPTIMIZERS.get(plan.optimizer, plan.optimizer),
        fp16=plan.dtype == "fp16",
        bf16=plan.dtype == "bf16",  # trl's default is True
        use_cpu=not plan.card.is_gpu,
        seed=recipe.seed,
        max_length=None,  # the rows were checked against it
        dataset_kwargs={"skip_prepare_dataset": True},
        gradient_checkpointing=False,  # the layers' own flags are set (model.layers.lay_out)
        logging_steps=1,
        logging_nan_inf_filter=False,  # a NaN is a NaN, not 0.0
        save_strategy="no",
        report_to=report_to,
        disable_tqdm=True,
        dataloader_pin_memory=plan.card.is_gpu,
    )
    if plan.card.is_gpu:
        config._n_gpu = 1  # with two visible the Trainer would take both, and trl 1.16 refuses that
    trainer = CheckpointedTrainer(
        plan,
        ranks,
        model=model,
        args=config,
        train_dataset=_dataset(data.train),
        data_collator=pool,
        processing_class=data.tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    widen_trained(model)
    return trainer


def widen_trained(model: PreTrainedModel) -> None:
    """Trained parameters in fp32, whatever they were made in.

    SFTTrainer casts a quantized model's adapters to bf16, which fp16's GradScaler cannot unscale: the first step fails
    with "_amp_foreach_non_finite_check_and_unscale_cuda not implemented for 'BFloat16'" (trl 1.16). In 16 bits small
    updates would be lost besides.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def let_go() -> None:
    """Lets go of embeddings: where all weights are trained, the Trainer registers them with bitsandbytes'
    GlobalOptimManager, which would hold them on the GPU, 1 GiB of 8B, for as long as the process lives."""
    GlobalOptimManager.get_instance().initialize()


def warn_of_gaps() -> None:
    """Warns where torch had made its allocator before `import llamanb` could ask for segments that grow.

    The setting is read once. Without it memory breaks into gaps that no tensor fits: an out-of-memory error with
    gigabytes free.
    """
    wanted = "expandable_segments:True" in os.environ.get("PYTORCH_ALLOC_CONF", "")
    if wanted and not torch.cuda.memory._snapshot()["allocator_settings"].get("expandable_segments"):
        warnings.warn(
            "torch used the GPU before llamanb was imported, so its memory cannot use expandable segments and may "
            "fragment. To mend it, restart the kernel and import llamanb first.",
            stacklevel=2,
        )


def use_threads_that_pay(model: PreTrainedModel) -> None:
    """One CPU thread for a small model on a CPU: its products are too short to share, and threads that wait for each
    other spin, which beside a browser or another notebook slows a step many times over (docs/decisions/0006)."""
    if model.device.type == "cpu" and model.num_parameters() < SMALL_PARAMETERS:
        torch.set_num_threads(1)


class StopAfter(TrainerCallback):
    """Ends training after so many minutes, at the end of a step."""

    def __init__(self, minutes: float):
        self._end_s = time.monotonic() + 60 * minutes

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() >= self._end_s:
            control.should_training_stop = True


class StopOnInterrupt(TrainerCallback):
    """Ends training at the end of a step when the kernel is interrupted (Ctrl-C); a second interrupt ends it at once.

    A context manager around `trainer.train()`. Outside of the main thread, where Python hands no signals, it does
    nothing.
    """

    def __init__(self):
        self.asked = False

    def __enter__(self) -> StopOnInterrupt:
        self._before = signal.getsignal(signal.SIGINT)
        set_handler(self._interrupt)
        return self

    def __exit__(self, *exc) -> None:
        set_handler(self._before)

    def _interrupt(self, number, frame) -> None:
        if self.asked:
            set_handler(self._before)  # this may come in the midst of __exit__
            raise KeyboardInterrupt
        self.asked = True
        print("interrupted: ending after this step and saving; once more ends at once", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= self.asked

    on_save = on_step_end  # it came while the step's checkpoint was made


def _dataset(rows: list[Encoded]) -> Dataset:
    return Dataset.from_dict({"input_ids": [r.input_ids for r in rows], "labels": [r.labels for r in rows]})
