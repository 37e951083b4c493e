"""What would fit: the smallest changes to a recipe that does not, and what a card can train at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from llamanb.architecture import Architecture, architecture
from llamanb.card import Card
from llamanb.cards import ROWS
from llamanb.html import Table
from llamanb.layout import GIB, Plan
from llamanb.planner import DoesNotFitError, search, smallest_fits
from llamanb.recipe import Recipe

STEP = 128
"""Tokens between two lengths that are tried."""
SHORTEST = 128
SMALLER = ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.2-1B-Instruct")
TABLE_MODELS = (*reversed(SMALLER), "meta-llama/Llama-3.3-70B-Instruct")
TABLE_METHODS = ("qlora-nf4", "qlora-int8", "lora", "full")


def does_not_fit(plan: Plan, model: Architecture, limit: float) -> DoesNotFitError:
    """The error for a plan that needs more than `limit` bytes: what takes them, and what would fit."""
    memory, card = plan.memory, plan.card
    changes = changes_that_fit(plan.recipe, card, model)
    bucket = max(memory.buckets, key=memory.buckets.get)
    what = (
        f"{plan.recipe.model} ({plan.recipe.method}) needs {plan.needs_gib:.2f} GiB at the least, and {card.name} has "
    )
    what += f"{limit / GIB:.2f} to plan with"
    why = (
        f"at the peak ({memory.instant}) {memory.allocated / GIB:.2f} GiB are in use, the largest part of it {bucket}: "
    )
    why += f"{memory.buckets[bucket] / GIB:.2f} GiB"
    fix = (
        changes.rows[0][0]
        if changes.rows
        else "no single change is enough: take a smaller model and a shorter max_length"
    )
    return DoesNotFitError(what, why, str(fix), plan, changes)


def changes_that_fit(recipe: Recipe, card: Card, model: Architecture) -> Table:
    """Single changes after which the recipe fits, those that cost least first, with what it then needs."""
    rows = []
    for change, costs, attempt in _changes(recipe, card, model):
        made = attempt()
        if made is not None:
            rows.append([change(made) if callable(change) else change, f"{made.needs_gib:.2f} GiB", costs])
    return Table(["change", "then it needs", "what it costs"], rows, "what would fit")


def _changes(recipe: Recipe, card: Card, model: Architecture) -> Iterable[tuple]:
    """(change, its cost in words, what tries it: a plan that fits or None), cheapest first."""

    def tried(**fields) -> Callable[[], Plan | None]:
        return lambda: fitting(recipe.replace(**fields), card, model)

    if recipe.checkpointing == "none":
        yield "checkpointing = 'auto'", "time: some layers are computed twice", tried(checkpointing="auto")
    if recipe.micro_batch_size and recipe.micro_batch_size > 1:
        yield (
            "micro_batch_size = None",
            "nothing that is learned: more, smaller micro-batches",
            tried(micro_batch_size=None),
        )
    if recipe.precision == "fp32":
        yield "precision = 'auto'", "digits that training does not need", tried(precision="auto")
    if recipe.quantization in ("nf4", "fp4") and not recipe.double_quant and model.quantization is None:
        yield "double_quant = True", "hardly anything", tried(double_quant=True)
    if recipe.optimizer not in ("auto", "paged_adamw_8bit"):
        yield "optimizer = 'paged_adamw_8bit'", "hardly anything", tried(optimizer="paged_adamw_8bit")
    if recipe.checkpointing != "offloaded":
        yield "checkpointing = 'offloaded'", "time: copies to host memory", tried(checkpointing="offloaded")
    if recipe.max_length > SHORTEST:
        yield (
            lambda plan: f"max_length = {plan.recipe.max_length}",
            "longer rows are skipped or cut",
            lambda: _longest(recipe, card, model),
        )
    if recipe.rank > 8:
        ranks = (recipe.rank >> n for n in range(1, recipe.rank.bit_length() - 3))
        smaller = [recipe.replace(rank=rank) for rank in ranks]
        yield (lambda plan: f"rank = {plan.recipe.rank}"), "room to learn", lambda: _first(smaller, card, model)
    if recipe.targets != "attention" and recipe.adapters:
        yield "targets = 'attention'", "some of what can be learned", tried(targets="attention")
    if recipe.method != "qlora-nf4":
        yield "method = 'qlora-nf4'", "4-bit weights: slower steps, slightly less exact", tried(method="qlora-nf4")
    if model.parameters > architecture(SMALLER[-1]).parameters:
        change = (lambda plan: f"model = {plan.recipe.model!r}"), "a smaller model"
        yield *change, lambda: _smaller_model(recipe, card, model)
    yield (lambda plan: f"a larger card: {plan.card.name}"), "money", lambda: _smallest_card(recipe, card, model)


def fitting(recipe: Recipe, card: Card, model: Architecture) -> Plan | None:
    """A plan that fits, or None; None too for a checkpoint that is stored in another precision than the method's."""
    if model.quantization not in (None, recipe.quantization):
        return None
    model = replace(model, max_positions=max(model.max_positions, recipe.max_length))
    made = search(recipe, card, model, force=True)
    return None if made.reasons["layers"] == "nothing fits" else made


def _longest(recipe: Recipe, card: Card, model: Architecture) -> Plan | None:
    """The plan for the longest rows that fit, in multiples of STEP."""
    best, low, high = None, 1, recipe.max_length // STEP
    while low <= high:
        middle = (low + high) // 2
        made = fitting(recipe.replace(max_length=middle * STEP), card, model)
        if made:
            best, low = made, middle + 1
        else:
            high = middle - 1
    return best


def _first(recipes: Iterable[Recipe], card: Card, model: Architecture) -> Plan | None:
    return next((made for recipe in recipes if (made := fitting(recipe, card, model))), None)


def _smaller_model(recipe: Recipe, card: Card, model: Architecture) -> Plan | None:
    """The plan for the largest smaller model that fits."""
    shapes = {name: architecture(name) for name in SMALLER}
    smaller = (name for name, shape in shapes.items() if shape.parameters < model.parameters)
    return next((made for name in smaller if (made := fitting(recipe.replace(model=name), card, shapes[name]))), None)


def _smallest_card(recipe: Recipe, card: Card, model: Architecture) -> Plan | None:
    larger = (Card.known(name) for name in sorted(ROWS, key=lambda name: ROWS[name].vram_gib))
    larger = (one for one in larger if one.vram_gib > card.vram_gib and one.runs_default_torch)
    return next((made for one in larger if (made := fitting(recipe, one, model))), None)


def trainable(card: Card | str | None = None) -> Table:
    """What a card can train: for each model and method the longest row, in tokens, with every layer recomputed."""
    card = Card.known(card) if isinstance(card, str) else card or Card.here()
    headers = ["model", "parameters", *TABLE_METHODS]
    if not card.is_gpu:
        return Table(headers, [], 'a CPU: its memory is not planned for; trainable("T4") asks for a card')
    rows = []
    for name in TABLE_MODELS:
        model = architecture(name)
        cells = [f"{longest:,}" if (longest := _reach(model, method, card)) else "no" for method in TABLE_METHODS]
        rows.append([name.split("/")[1], f"{model.parameters / 1e9:.2f} B", *cells])
    caption = (
        f"longest row in tokens on {card.name} ({card.free_gib:.2f} GiB, less a margin): one row at a time, every "
    )
    caption += "layer recomputed, rank 16 on all linear layers"
    return Table(headers, rows, caption)


def _reach(model: Architecture, method: str, card: Card) -> int:
    """Longest row that fits with every layer recomputed and one row at a time; gaps are guessed, not replayed."""
    recipe = Recipe(model=model.name, method=method, effective_batch_size=1)
    low, high = 0, model.max_positions // STEP
    while low < high:
        middle = (low + high + 1) // 2
        if smallest_fits(recipe.replace(max_length=middle * STEP), card, model):
            low = middle
        else:
            high = middle - 1
    return low * STEP
