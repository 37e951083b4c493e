"""Adapters that start from something: from a weight's leading directions (PiSSA), or from what quantizing it loses
(LoftQ). Each with its base as a checkpoint; `train` on that checkpoint starts there."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import inject_adapter_in_model
from safetensors.torch import save_file

from llamanb.errors import RecipeError
from llamanb.export.base import Base
from llamanb.model.load import DTYPES, lora_config
from llamanb.model.start import FACTS, START, WEIGHTS, start_facts
from llamanb.planner import plan
from llamanb.recipe import Recipe
from llamanb.shrink.low_rank import outputs
from llamanb.shrink.walk import Checkpoint, Layer, Walk, path_of
from llamanb.shrink.write import require_free, written

KINDS = {
    "pissa": "the leading directions of each weight, which are taken out of it (Meng et al. 2024)",
    "loftq": "the leading directions of what quantizing loses, the weights staying as they are (Li et al. 2023)",
}
PISSA = "pissa_niter_16"
"""peft's name for 16 rounds of subspace iteration. What they miss stays in the base: the sum is the same."""


def write_start(recipe: Recipe, to: str | Path, *, kind: str = "pissa") -> Path:
    """Writes the recipe's checkpoint with adapters to start from, a layer at a time: train with the same recipe and
    `model` = the folder.

    PiSSA trains what matters most of each weight, at first exactly the model that it was; quantized, the rest has
    smaller errors. Its base alone is not that model: it counts with its adapter only. LoftQ's adapter makes up for
    part of what this recipe's `method` loses; the base is a copy.

    Args:
        recipe: whose rank, alpha and targets the adapters have.
        to: the folder to make.
        kind: one of KINDS.

    Returns the folder.

    Raises:
        RecipeError: a kind that is none, adapters that cannot be started so, or the folder is taken.
        ModelError: the checkpoint is quantized, or not complete.
        DiskFullError: there is too little room.
    """
    checkpoint = Checkpoint.open(recipe.model, recipe.revision)
    _require(kind, recipe, checkpoint)
    require_free(to)
    adapters: dict[str, torch.Tensor] = {}
    computed = DTYPES[plan(recipe, force=True).dtype]
    trained = Base(checkpoint.tensors, computed, recipe.quantization, recipe.double_quant)
    with written(checkpoint, to, checkpoint.shape.layers, share=1.1) as output:
        walk = Walk(checkpoint, recipe)
        torch.manual_seed(recipe.seed)
        for number in range(checkpoint.shape.layers):
            layer = walk.layer(number)
            found = _leading(layer, recipe) if kind == "pissa" else _lost(layer, number, trained, recipe)
            adapters |= {f"layers.{number}.{name}": tensor for name, tensor in found.items()}
            output.layer(layer.state)
        (output.aside / START).mkdir()
        save_file(adapters, output.aside / START / WEIGHTS)
        made_for = {"kind": kind, "recipe": start_facts(recipe, kind)}
        (output.aside / START / FACTS).write_text(json.dumps(made_for, indent=1), encoding="utf-8")
        output.finish({}, {"method": kind}, f"adapters to start from: {KINDS[kind]}")
    return Path(to)


def _leading(layer: Layer, recipe: Recipe) -> dict[str, torch.Tensor]:
    """A and B by peft's own `init_lora_weights`, which leaves the weights without them."""
    module, found = layer.module.float(), {}
    config = lora_config(recipe)
    config.init_lora_weights = PISSA
    inject_adapter_in_model(config, module)
    for name in recipe.target_modules:
        path = path_of(name)
        adapted, stem = module.get_submodule(path.removesuffix(".weight")), path.removesuffix("weight")
        layer.state[path] = adapted.base_layer.weight.detach().to("cpu", layer.state[path].dtype)
        for part in ("lora_A", "lora_B"):
            found[f"{stem}{part}.weight"] = getattr(adapted, part)["default"].weight.detach().cpu().contiguous()
    return found


def _lost(layer: Layer, number: int, trained: Base, recipe: Recipe) -> dict[str, torch.Tensor]:
    """B A = the best of that rank for W - Q, with Q the weight that training holds, to the bit."""
    found, scale = {}, lora_scale(recipe)
    for name in recipe.target_modules:
        path, weight = path_of(name), layer.weight(name)
        held = torch.cat([rows for _, rows in trained.rows(f"model.layers.{number}.{path}")]).to(weight.device)
        lost = weight - held
        energies, directions = outputs(lost, None, recipe.rank)
        root = energies[: recipe.rank].sqrt().sqrt().clamp(min=1e-12)  # of the singular values
        down, up = (directions / root).T @ lost, directions * root / scale
        stem = path.removesuffix("weight")
        found |= {f"{stem}lora_A.weight": down.cpu().contiguous(), f"{stem}lora_B.weight": up.cpu().contiguous()}
    return found


def lora_scale(recipe: Recipe) -> float:
    """What B A is multiplied with."""
    return recipe.lora_alpha / (recipe.rank**0.5 if recipe.rslora else recipe.rank)


def _require(kind: str, recipe: Recipe, checkpoint: Checkpoint) -> None:
    if kind not in KINDS:
        raise RecipeError(f"kind = {kind!r}", "no such start", f"one of {', '.join(KINDS)}")
    if not recipe.adapters or recipe.dora:
        why = "DoRA's magnitudes would have to start elsewhere too" if recipe.dora else "there are no adapters"
        fix = "dora = False" if recipe.dora else "method = 'lora' or 'qlora-nf4'"
        raise RecipeError(f"method = {recipe.method!r} cannot start from {kind}", why, fix)
    if kind == "loftq" and not recipe.quantization:
        why = "without quantization nothing is lost that an adapter could start from"
        raise RecipeError(f"method = {recipe.method!r} cannot start from loftq", why, "method = 'qlora-nf4'")
    narrowest = min(recipe.target_modules, key=lambda name: min(checkpoint.shape.linear(name)))
    if recipe.rank > min(checkpoint.shape.linear(narrowest)):
        full = min(checkpoint.shape.linear(narrowest))
        why = f"the full rank of {narrowest} is {full}"
        raise RecipeError(f"rank = {recipe.rank} has no {recipe.rank} directions to start from", why, f"rank = {full}")
