"""The offline default: a tiny Llama that is already able to do a little, and rows that teach it something new.

`CHECKPOINT` is a folder that `AutoModelForCausalLM.from_pretrained` loads like any other Llama; `rows` makes the data.
Neither needs a network, and this module imports neither torch nor transformers.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Literal

from llamanb.tiny.notes import ticket_row

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""The shipped model and tokenizer; `python -m llamanb.tiny.make` makes them again."""

COUNTS = {"train": 1200, "eval": 120}
"""Rows in each split unless asked otherwise."""

DEFAULTS = {
    "learning_rate": 5e-3,
    "schedule": "linear",
    "steps": 70,
    "effective_batch_size": 16,
    "max_length": 128,
    "rank": 16,
    "alpha": 32.0,
}
"""Recipe fields under which fine-tuning `CHECKPOINT` on `rows("train")` reaches what the tests hold, with LoRA on all
linear layers as with QLoRA. A learning rate 25 times an 8B's: a model this small and a run this short need it."""


def rows(split: Literal["train", "eval"], *, seed: int = 0, count: int | None = None) -> list[dict]:
    """Notes to turn into tickets, as chat rows with a "messages" key; the same rows for the same arguments.

    The buyers of held-out rows appear neither in training rows nor in pretraining, whatever the seeds, so no
    held-out input is ever a training input.

    Args:
        split: "train" to learn from, "eval" held out.
        seed: another seed, other rows of the same kind.
        count: how many; 1,200 for "train" and 120 for "eval" by default. The first rows do not depend on it.
    """
    if split not in COUNTS:
        raise ValueError(f"split is 'train' or 'eval', not {split!r}")
    rng = random.Random(f"{split} {seed}")
    return [ticket_row(rng, split) for _ in range(COUNTS[split] if count is None else count)]
