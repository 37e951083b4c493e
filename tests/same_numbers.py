"""The same training twice, for tests that hold one to the other on a CPU or a GPU: by trl's SFTTrainer as it comes,
with transformers' and peft's layers and rows padded to the longest of each micro-batch; and as a plan lays it out, cut
off and picked up from a checkpoint in between."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from llamanb.data import TrainingData
from llamanb.data.encode import IGNORE, Encoded
from llamanb.layout import Plan
from llamanb.recipe import Recipe
from llamanb.tape import CHECKPOINTED, HALVED, OFFLOADED, STORED

STEPS, PASS, CUT = 6, 4, 3
"""Optimizer steps, those of one pass over the rows, and the one after which the planned training is cut off."""
LAYOUTS = {
    "stored": (STORED,),
    "mlp checkpointed": (HALVED,),
    "checkpointed": (CHECKPOINTED,),
    "offloaded": (OFFLOADED,),
    "mixed": (OFFLOADED, CHECKPOINTED, HALVED, STORED),
}
"""What becomes of the layers, over and over."""


class Batch(NamedTuple):
    """Rows of an optimizer step."""

    accumulation: int
    micro: int
    even: bool


BATCHES = {
    "1 x 1 row": Batch(1, 1, False),
    "1 x 4 even rows": Batch(1, 4, True),
    "1 x 4 uneven rows": Batch(1, 4, False),
    "8 x 1 row": Batch(8, 1, False),
    "8 x 2 even rows": Batch(8, 2, True),
    "8 x 2 uneven rows": Batch(8, 2, False),
}
SHARED = {"dataset": "random", "schedule": "constant", "warmup": 0.0, "optimizer": "adamw_torch_fused", "eval_rows": 0}


def recipe(batch: Batch, longest: int, **fields) -> Recipe:
    """The training, on rows of at most `longest` tokens."""
    sizes = {"effective_batch_size": batch.accumulation * batch.micro, "micro_batch_size": batch.micro}
    return Recipe(**{**SHARED, **sizes, "max_length": longest, "steps": STEPS, "learning_rate": 5e-3, **fields})


def layers(layout: str, depth: int) -> tuple[str, ...]:
    kinds = LAYOUTS[layout]
    return tuple(kinds[i % len(kinds)] for i in range(depth))


def random_rows(batch: Batch, longest: int, vocabulary: int, seed: int = 0) -> list[Encoded]:
    """As many as one pass has; of some tokens the label is not trained. Uneven ones have from a fifth of `longest` to
    all of it."""
    source, made = random.Random(seed), []
    for i in range(PASS * batch.accumulation * batch.micro):
        length = longest if batch.even or i % 5 == 0 else source.randint(longest // 5, longest)
        ids = [source.randrange(vocabulary) for _ in range(length)]
        made.append(Encoded(ids, [IGNORE, *(token if source.random() < 0.7 else IGNORE for token in ids[1:])]))
    return made


class Seen(NamedTuple):
    """What a step showed."""

    loss: float
    grad_norm: float


def plainly(model, tokenizer, rows: list[Encoded], of: Recipe, folder: Path, *, fp16: bool = False) -> list[Seen]:
    """Each step of trl's own trainer on a model with adapters."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=of.micro_batch_size,
        gradient_accumulation_steps=of.effective_batch_size // of.micro_batch_size,
        max_steps=of.steps,
        learning_rate=of.learning_rate,
        lr_scheduler_type=of.schedule,
        warmup_steps=0,
        optim=of.optimizer,
        weight_decay=of.weight_decay,
        max_grad_norm=of.max_grad_norm,
        fp16=fp16,
        bf16=False,
        use_cpu=not fp16,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    columns = {"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}
    trainer = SFTTrainer(model=model, args=config, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    for parameter in model.parameters():
        if parameter.requires_grad:  # fp16's scaler refuses trl's bf16
            parameter.data = parameter.data.float()
    trainer.train()
    return _seen(trainer)


def as_planned(plan: Plan, make_model: Callable, tokenizer, rows: list[Encoded], folder: Path) -> list[Seen]:
    """Each step of the plan's training, cut off after step CUT and gone on with from its checkpoint by another trainer
    with another model."""
    from transformers import TrainerCallback

    from llamanb.training.trainer import build_trainer

    class Cut(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == CUT:
                control.should_save = control.should_training_stop = True

    def trainer(*callbacks):
        data = TrainingData("random", "token ids", tokenizer, rows, [], [], [])
        made = build_trainer(plan, make_model(plan), data, folder, list(callbacks))
        made.args.train_sampling_strategy = "sequential"
        assert (made.fused is not None) == plan.fused
        return made

    first = trainer(Cut())
    first.train()
    assert first.state.global_step == CUT
    checkpoint, before = Path(first.args.output_dir) / f"checkpoint-{CUT}", _seen(first)
    del first
    second = trainer()
    second.train(resume_from_checkpoint=str(checkpoint))
    seen = _seen(second)
    assert seen[:CUT] == before
    return seen


def _seen(trainer) -> list[Seen]:
    return [Seen(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]


def furthest(seen: list[Seen], right: list[Seen]) -> tuple[float, float]:
    """By how much, of each, loss and gradient norm are apart in the step in which they are furthest."""
    assert len(seen) == len(right) == STEPS
    assert all(math.isfinite(number) for step in (*seen, *right) for number in step)
    pairs = list(zip(seen, right, strict=True))
    return tuple(max(abs(a[i] - b[i]) / abs(b[i]) for a, b in pairs) for i in range(2))
