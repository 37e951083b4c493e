"""Runs without a training: a base, an adapter of random numbers, and the files that a run leaves."""

from pathlib import Path

import torch

from llamanb import Card, Recipe, plan
from llamanb.data.encode import load_tokenizer
from llamanb.hub import checkpoint_folder
from llamanb.model import attach_adapters, load_model, save_model
from llamanb.run import FINISHED, Run
from llamanb.timeline import Timeline
from llamanb.training import write_base


def adapted_run(folder: Path, **fields):
    """Makes a run in `folder` and returns its base with the adapter on it. Fields are the recipe's."""
    recipe = Recipe(**fields)
    made = plan(recipe, Card("CPU", None))
    base = checkpoint_folder(recipe.model)
    tokenizer = load_tokenizer(base)
    model = attach_adapters(load_model(made, tokenizer), recipe)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.02)
        if "magnitude" in name:
            weight.data *= 1 + 0.1 * torch.rand_like(weight)
    folder.mkdir(parents=True)
    save_model(model, tokenizer, made, folder)
    recipe.save(folder / "recipe.json")
    (folder / "plan.json").write_text(made.to_json(), encoding="utf-8")
    write_base(base, folder)
    Run(folder, made, Timeline("nothing"), status=FINISHED).save()
    return model.eval()
