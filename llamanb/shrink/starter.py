"""What notebook 06 starts from: a recipe for the recovery, and rows on which the tiny Llama has something to lose."""

from __future__ import annotations

import json
import random
from pathlib import Path

from llamanb.recipe import Recipe
from llamanb.starter import starter_recipe
from llamanb.tiny import notes

CHATS = "chats.jsonl"
RECOVERY = {"method": "lora", "rank": 8, "alpha": 16.0, "eval_rows": 48}
"""Adapters over 16 bits: a merge is then what was trained, whatever the card."""
ON_CHATS = {"max_length": 256, "steps": 20, "effective_batch_size": 8}


def starter(folder: str | Path, **wanted) -> Recipe:
    """`starter_recipe` for a recovery. The tiny Llama gets chats to be measured on, written into the folder: of its
    fine-tuning rows it answers none before it is fine-tuned, so there would be nothing to lose.

    Fields that are given and not None come first. Raises RecipeError like Recipe.
    """
    given = {name: value for name, value in wanted.items() if value is not None}
    recipe = starter_recipe(**given)
    fields = RECOVERY
    if recipe.model == "tiny" and "dataset" not in given:
        fields = RECOVERY | ON_CHATS | {"dataset": str(write_chats(Path(folder) / CHATS))}
    return recipe.replace(**fields | given)


def write_chats(path: str | Path, count: int = 1000, seed: int = 0) -> Path:
    """Chats of the kind that the tiny Llama was pretrained on, drawn anew: notes, three questions about each, answers.

    Returns the file, jsonl, the same for the same arguments.
    """
    rng = random.Random(f"shrink {seed}")
    lines = [json.dumps({"messages": notes.chat(rng, questions=3)}) for _ in range(count)]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Path(path)
