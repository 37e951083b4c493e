"""`trainable`: what a card can train at all."""

from __future__ import annotations

from dataclasses import replace

from llamanb import streaming
from llamanb.advice import SMALLER, STEP, most_steps
from llamanb.architecture import Architecture, architecture
from llamanb.card import Card
from llamanb.html import Table
from llamanb.recipe import Recipe

MODELS = (*reversed(SMALLER), "meta-llama/Llama-3.3-70B-Instruct")
METHODS = ("qlora-nf4", "qlora-int8", "lora", "full")


def trainable(card: Card | str | None = None) -> Table:
    """What a card can train: for each model and method the longest row, in tokens, with every layer recomputed; and
    where the weights have to wait in host memory or on disk for that, that they do."""
    card = streaming.in_its_machine(card)
    headers = ["model", "parameters", *METHODS]
    if not card.is_gpu:
        return Table(headers, [], 'a CPU: its memory is not planned for; trainable("T4") asks for a card')
    rows = []
    for name in MODELS:
        model = architecture(name)
        cells = [_reached(model, method, card) for method in METHODS]
        rows.append([name.split("/")[1], f"{model.parameters / 1e9:.2f} B", *cells])
    caption = f"longest row in tokens on {card.name} ({card.free_gib:.2f} GiB, less a margin): one row at a time, "
    caption += "every layer recomputed, rank 16 on all linear layers"
    for word, where in (("streamed", "in host memory"), ("from disk", "on disk as well, which is slow")):
        if any(word in cell for row in rows for cell in row):
            caption += f"; {word}: weights wait {where}"
    return Table(headers, rows, caption)


def _reached(model: Architecture, method: str, card: Card) -> str:
    """Longest row that fits with every layer recomputed and one row at a time; gaps are guessed, not replayed."""
    recipe = Recipe(model=model.name, method=method, effective_batch_size=1, checkpointing="all")
    ways = ("resident", card, ""), ("auto", replace(card, disk_gib=0.0), " streamed"), ("auto", card, " from disk")
    for weights, machine, words in ways:
        if steps := most_steps(model.max_positions // STEP, recipe.replace(weights=weights), machine, model):
            return f"{STEP * steps:,}{words}"
    return "no"
