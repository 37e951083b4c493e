"""Checkpoints that bring the adapter to start from, in the folder `start`: written by `shrink.write_start`.

The two belong together. From PiSSA's base its leading directions were taken out, and stand in the adapter: either
alone is wrong. So whoever trains on such a checkpoint starts there, and nothing has to be said for it.
"""

from __future__ import annotations

import json
from pathlib import Path

from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file

from llamanb.errors import ModelError
from llamanb.recipe import Recipe

START, FACTS, WEIGHTS = "start", "start.json", "adapter.safetensors"


def start_facts(recipe: Recipe, kind: str) -> dict:
    """What a recipe must have in common with the one that a start was made for."""
    names = ("rank", "rslora", "dora", *(("method", "double_quant") if kind == "loftq" else ()))
    own = {name: getattr(recipe, name) for name in names}
    return {"targets": sorted(recipe.target_modules), "alpha": recipe.lora_alpha, **own}


def load_start(adapted: PeftModel, recipe: Recipe) -> None:
    """Gives new adapters the values that the recipe's checkpoint brings; nothing where it brings none.

    Raises ModelError where they are not for this recipe, or cannot be read.
    """
    folder = Path(recipe.model).expanduser() / START
    if recipe.model == "tiny" or not folder.is_dir():
        return
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        kind, made_for = facts["kind"], facts["recipe"]
        state = load_file(folder / WEIGHTS)
        other = [name for name, value in start_facts(recipe, kind).items() if made_for[name] != value]
    except Exception as error:  # safetensors raises its own kinds
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise ModelError(f"the adapter in {folder} cannot be read", why, "write it again: shrink.write_start") from None
    if other:
        raise ModelError(
            f"{recipe.model} brings an adapter to start from that is not for this recipe",
            f"it was made for {other[0]} = {made_for[other[0]]!r}",
            f"{other[0]} = {made_for[other[0]]!r}, or write another with shrink.write_start",
        )
    wanted = {name for name, _ in adapted.named_parameters() if ".lora_" in name}
    if {f"base_model.model.model.{name}".replace(".weight", ".default.weight") for name in state} != wanted:
        raise ModelError(f"the adapter in {folder} has other layers", f"of {recipe.model}", "write it again")
    set_peft_model_state_dict(adapted, {f"base_model.model.model.{name}": value for name, value in state.items()})
    print(f"starting from the adapter in {folder} ({kind})", flush=True)
