"""What would fit: the smallest changes to a recipe that does not."""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import replace

from llamanb import streaming
from llamanb.architecture import Architecture, architecture
from llamanb.card import Card
from llamanb.cards import KNOWN
from llamanb.html import Table
from llamanb.layout import GIB, Plan
from llamanb.planner import DoesNotFitError, search, smallest_fits
from llamanb.recipe import Recipe
from llamanb.search import GAPS_GUESS

STEP = 128
"""Tokens between two lengths that are tried."""
SHORTEST = 128
TAKEN = 0.05
"""Share of the card that others hold, from which it is told."""
CONTEXT_GIB = 0.9
"""What a process takes of a card beside tensors, at most, where it was not measured (an H200: 0.6, and 0.14 later)."""
SMALLER = ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.2-1B-Instruct")


def does_not_fit(plan: Plan, model: Architecture, *, rehearsed: bool = False) -> DoesNotFitError:
    """The error for a plan that does not fit: what takes the memory, and what would fit, as predicted: that is told
    where the plan itself was `rehearsed`."""
    memory, card, recipe = plan.memory, plan.card, plan.recipe.replace(max_length=plan.length)
    changes = changes_that_fit(recipe, card, model)
    bucket = max(memory.buckets, key=memory.buckets.get)
    what = f"{recipe.model} ({recipe.method}) needs {plan.needs_gib:.2f} GiB at the least, and {card.name} has "
    what += f"{plan.limit_gib:.2f} to plan with"
    why = f"at the peak ({memory.instant}) {memory.allocated / GIB:.2f} GiB are in use, the largest part of it "
    why += f"{bucket}: {memory.buckets[bucket] / GIB:.2f} GiB"
    why += streaming.too_little(recipe, card, len(plan.streamed), len(plan.on_disk), len(plan.layers))
    taken = card.vram_gib - card.free_gib - (card.context_gib or CONTEXT_GIB)
    if taken > TAKEN * card.vram_gib:
        why += f"; {taken:.2f} of the card's {card.vram_gib:.2f} GiB were taken before"
        if whole := fitting(recipe, replace(card, free_gib=card.free_gib + taken), model):
            free = f"free the {taken:.2f} GiB that other processes hold (nvidia-smi), or this one's tensors (restart)"
            changes.rows.insert(0, [free, f"{whole.needs_gib:.2f} GiB", "nothing that is learned"])
    fix = changes.rows[0][0] if changes.rows else "no single change is enough: take a smaller model and shorter rows"
    if rehearsed and changes.rows:
        fix += " (what would fit is predicted, not rehearsed)"
    return DoesNotFitError(what, why, fix, plan, changes)


def changes_that_fit(recipe: Recipe, card: Card, model: Architecture) -> Table:
    """Single changes after which the recipe fits, those that cost least first, with what it then needs."""
    rows = []
    for change, costs, attempt in _changes(recipe, card, model):
        made = attempt()
        if made is not None:
            if made.streamed:
                costs += streaming.waits(made.streamed_gib, made.disk_gib)
            rows.append([change(made) if callable(change) else change, f"{made.needs_gib:.2f} GiB", costs])
    return Table(["change", "then it needs", "what it costs"], rows, "what would fit")


def _changes(recipe: Recipe, card: Card, model: Architecture) -> Iterable[tuple]:
    """(change, its cost in words, what tries it: a plan that fits or None), cheapest first."""

    def tried(**fields) -> Callable[[], Plan | None]:
        return lambda: fitting(recipe.replace(**fields), card, model)

    if recipe.checkpointing == "none":
        yield "checkpointing = 'auto'", "time: some layers are computed twice", tried(checkpointing="auto")
    if recipe.micro_batch_size and recipe.micro_batch_size > 1:
        costs = "nothing that is learned: more, smaller micro-batches"
        yield "micro_batch_size = None", costs, tried(micro_batch_size=None)
    if recipe.precision == "fp32":
        yield "precision = 'auto'", "digits that training does not need", tried(precision="auto")
    if recipe.quantization in ("nf4", "fp4") and not recipe.double_quant and model.quantization is None:
        yield "double_quant = True", "hardly anything", tried(double_quant=True)
    if recipe.optimizer not in ("auto", "paged_adamw_8bit"):
        yield "optimizer = 'paged_adamw_8bit'", "hardly anything", tried(optimizer="paged_adamw_8bit")
    for change, costs, fields in streaming.changes(recipe):
        yield change, costs, tried(**fields)
    if recipe.checkpointing != "offloaded":
        yield "checkpointing = 'offloaded'", "time: copies to host memory", tried(checkpointing="offloaded")
    if recipe.max_length > SHORTEST:
        change = (lambda plan: f"max_length = {plan.recipe.max_length}"), "longer rows are skipped or cut"
        yield *change, lambda: _longest(recipe, card, model)
    if recipe.rank > 8:
        ranks = [recipe.rank >> n for n in range(1, recipe.rank.bit_length() - 3)]
        change = (lambda plan: f"rank = {plan.recipe.rank}"), "room to learn"
        yield *change, lambda: _first((recipe.replace(rank=rank), card, model) for rank in ranks)
    if recipe.targets != "attention" and recipe.adapters:
        yield "targets = 'attention'", "some of what can be learned", tried(targets="attention")
    if recipe.method != "qlora-nf4":
        yield "method = 'qlora-nf4'", "4-bit weights: slower steps, slightly less exact", tried(method="qlora-nf4")
    if model.parameters > architecture(SMALLER[-1]).parameters:
        change = (lambda plan: f"model = {plan.recipe.model!r}"), "a smaller model"
        yield *change, lambda: _smaller_model(recipe, card, model)
    for change, costs, machine in streaming.machines(recipe, card):
        yield change, costs, functools.partial(fitting, recipe, machine, model)
    yield (lambda plan: f"a larger card: {plan.card.name}"), "money", lambda: _smallest_card(recipe, card, model)


def fitting(recipe: Recipe, card: Card, model: Architecture) -> Plan | None:
    """A plan that fits, or None; None too for a checkpoint that is stored in another precision than the method's."""
    if model.quantization not in (None, recipe.quantization) or not smallest_fits(recipe, card, model, gaps=0):
        return None
    made = search(recipe, card, model, force=True)
    return made if made.fits else None


def _longest(recipe: Recipe, card: Card, model: Architecture) -> Plan | None:
    """The plan for shorter rows than the recipe's, in multiples of STEP: the longest that fit, or nearly so, since it
    takes gaps to be the same share of the memory as where rows were last too long."""
    gaps, steps = 0.0, (recipe.max_length - 1) // STEP
    while steps := most_steps(steps, recipe, card, model, gaps):
        made = search(recipe.replace(max_length=steps * STEP), card, model, force=True)
        if made.fits:
            return made
        gaps, steps = made.memory.gaps / made.memory.allocated, steps - 1
    return None


def most_steps(steps: int, recipe: Recipe, card: Card, model: Architecture, gaps: float = GAPS_GUESS) -> int:
    """How many times STEP the longest rows are that seem to fit with such gaps, `steps` at most."""

    def too_long(steps: int) -> bool:
        return not smallest_fits(recipe.replace(max_length=steps * STEP), card, model, gaps)

    return bisect_left(range(steps + 1), True, 1, key=too_long) - 1


def _first(attempts: Iterable[tuple[Recipe, Card, Architecture]]) -> Plan | None:
    return next((made for attempt in attempts if (made := fitting(*attempt))), None)


def _smaller_model(recipe: Recipe, card: Card, model: Architecture) -> Plan | None:
    """The plan for the largest smaller model that fits."""
    smaller = (shape for shape in map(architecture, SMALLER) if shape.parameters < model.parameters)
    return _first((recipe.replace(model=shape.name), card, shape) for shape in smaller)


def _smallest_card(recipe: Recipe, card: Card, model: Architecture) -> Plan | None:
    larger = sorted((one for one in KNOWN.values() if one.vram_gib > card.vram_gib), key=lambda one: one.vram_gib)
    able = (one for one in larger if one.runs_default_torch and (recipe.precision != "bf16" or one.dtype == "bf16"))
    return _first((recipe, replace(one, host_gib=card.host_gib), model) for one in able)
