"""What training leaves: an adapter (or full weights) with a model card, and the way back to a model."""

from __future__ import annotations

import json
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from llamanb import REPOSITORY, __version__, hub
from llamanb.data.encode import load_tokenizer
from llamanb.errors import ModelError
from llamanb.html import visible
from llamanb.layout import Plan
from llamanb.model.load import DTYPES, load_model, lora_config
from llamanb.planner import plan as make_plan
from llamanb.quiet import quiet_libraries
from llamanb.recipe import Recipe

ADAPTER, FULL = "adapter", "model"
ANSWERED_LENGTH = 512
"""Tokens of a row that an answering model is planned for."""


def save_model(model: PreTrainedModel, tokenizer, plan: Plan, folder: Path) -> Path:
    """Writes `folder`/adapter (or `folder`/model after full fine-tuning) with tokenizer and model card; returns it."""
    recipe = plan.recipe
    target = folder / (ADAPTER if recipe.adapters else FULL)
    tokenizer.save_pretrained(target)
    write_model_card(target, plan)  # for peft to add to, until ours is written again; for none it compiles one
    if recipe.adapters:
        model.save_pretrained(target, save_embedding_layers=False)  # "auto" would ask the Hub for the base's config
    else:  # back from the 32 bits it was trained in
        tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
        state = {n: t.to("cpu", DTYPES[plan.dtype]) for n, t in model.state_dict().items() if n not in tied}
        model.save_pretrained(target, state_dict=state)
        config = target / "config.json"  # transformers writes what the model trains in
        fields = json.loads(config.read_text(encoding="utf-8")) | {"dtype": str(DTYPES[plan.dtype]).split(".")[1]}
        config.write_text(json.dumps(fields, indent=2), encoding="utf-8")
    write_model_card(target, plan)
    return target


def write_model_card(target: Path, plan: Plan, scores: str = "") -> None:
    """Writes README.md beside the weights: base, data, recipe, where it ran, and its scores where there are any."""
    (target / "README.md").write_text(training_card(plan.recipe, plan, scores), encoding="utf-8")


def load_adapter(folder: str | Path) -> tuple[PreTrainedModel, object]:
    """The model that a run made, ready to generate: base as its recipe says, with the run's adapter on it.

    Args:
        folder: the run's folder.

    Returns the model and its tokenizer. Raises ModelError where the folder holds no finished run.
    """
    folder = Path(folder)
    recipe_file = folder / "recipe.json"
    if not recipe_file.is_file():
        raise ModelError(
            f"{folder} is not the folder of a run",
            "there is no recipe.json in it",
            "give the folder that train() printed, such as runs/quickstart",
        )
    recipe = Recipe.load(recipe_file)
    saved = folder / (ADAPTER if recipe.adapters else FULL)
    if not any(saved.glob("adapter_model.safetensors" if recipe.adapters else "*.safetensors")):
        raise ModelError(f"{folder} holds no trained weights", f"{saved} is missing or empty", "train to the end first")
    tokenizer = load_tokenizer(saved)
    with quiet_libraries():
        if not recipe.adapters:
            recipe = recipe.replace(model=str(saved.resolve()))
            return load_model(make_plan(recipe, force=True), tokenizer).eval(), tokenizer
        base = load_model(make_plan(_to_answer(recipe), force=True), tokenizer)
        # Without a word of adapter_config.json, which may name modules to import
        return PeftModel.from_pretrained(base, saved, config=lora_config(recipe)).eval(), tokenizer


def _to_answer(recipe: Recipe) -> Recipe:
    """A recipe that takes as much memory as answers may: what is trained on longer rows with weights in host memory
    answers faster where they fit the card."""
    least = {"effective_batch_size": 1, "micro_batch_size": None, "checkpointing": "auto"}
    return recipe.replace(max_length=min(recipe.max_length, ANSWERED_LENGTH), **least)


def training_card(recipe: Recipe, plan: Plan, scores: str) -> str:
    """Its text, as it is while the run still goes on. `push` puts another in its place, which says more."""
    on_the_hub = hub.is_name(recipe.model) and recipe.model != "tiny"
    base = f"[{recipe.model}](https://huggingface.co/{recipe.model})" if on_the_hub else _code(recipe.model)
    base = "the tiny Llama that comes with llamanb" if recipe.model == "tiny" else base
    name = recipe.model.split("/")[-1]
    kind = "LoRA adapter" if recipe.adapters else "fine-tuned model"
    header = ["---", *([f"base_model: {recipe.model}"] if on_the_hub else [])]
    header += ["library_name: " + ("peft" if recipe.adapters else "transformers"), "tags: [llamanb, llama]", "---"]
    return "\n".join(
        [
            *header,
            f"# {kind.capitalize()} for {name if hub.is_name(name) else _code(name)}",
            "",
            f"A {kind} for {base}, trained on {_code(recipe.dataset)} with [llamanb]({REPOSITORY}) {__version__}.",
            "",
            "## Scores on held-out rows",
            "",
            "```",
            visible(scores or "not scored").replace("`", "'"),
            "```",
            "",
            "## How it was trained",
            "",
            f"On {_code(plan.card.name)} in {plan.dtype}, with this recipe:",
            "",
            f"```json\n{recipe.to_json()}\n```",
            "",
        ]
    )


def _code(text: str) -> str:
    """Text that Markdown takes as it is, on one line."""
    return "`{}`".format(" ".join(visible(text).replace("`", "'").split()))
