"""`plan`: the fastest layout of a recipe that fits a card, found by predicting memory and time. Needs no torch."""

from __future__ import annotations

import functools
import importlib.metadata
import math
from dataclasses import replace

from llamanb import streaming
from llamanb.architecture import Architecture, architecture, require_method
from llamanb.card import Card
from llamanb.errors import LlamanbError, RecipeError
from llamanb.html import Table
from llamanb.layout import EXPANDED_ATTENTION, GIB, Alternative, Plan
from llamanb.memory import outline
from llamanb.recipe import Recipe
from llamanb.search import AS_ASKED, GAPS_GUESS, Candidate, fastest, smallest, with_fewest_streamed
from llamanb.tape import CHECKPOINTED, OFFLOADED, Workload, spread

MEASURED_WITH = {
    "torch": "2.11.0",
    "transformers": "5.23.0",
    "trl": "1.16.0",
    "peft": "0.21.2",
    "bitsandbytes": "0.50.2",
}
"""What the tape and the allocator were held against (benchmarks/results/memory.md)."""
MARGIN, MARGIN_ELSEWHERE, MARGIN_REHEARSED = 0.04, 0.10, 0.02
"""Share of the card left free: with these versions, with others, and after a rehearsal."""
MARGIN_DORA = 0.10
"""More for DoRA, whose magnitudes widen what flows between layers to fp32: it is planned for as fp32, which was 8 %
less than three layers of 1B took."""
CPU_TOKENS = 2048
"""Tokens of a micro-batch on a CPU."""


class DoesNotFitError(LlamanbError):
    """No layout of the recipe fits the card. `changes` says what would, `plan` is what was closest."""

    def __init__(self, what: str, why: str, fix: str, plan: Plan, changes: Table):
        super().__init__(what, why, fix)
        self.plan, self.changes = plan, changes

    @property
    def details(self) -> tuple:
        return tuple(piece for piece in (self.changes if self.changes.rows else None, self.plan.bar()) if piece)


def plan(
    recipe: Recipe,
    card: Card | str | None = None,
    data=None,
    *,
    force: bool = False,
    host_gib: float | None = None,
    cards: int = 1,
) -> Plan:
    """How `recipe` runs on `card`, with what it takes.

    Args:
        recipe: what to train.
        card: a Card, the name of a known one ("T4"), or None: the GPU or CPU of this machine.
        data: what `load_data(recipe)` gave; the plan is then made for its longest row and counts its steps.
        force: return the plan that comes closest where none is predicted to fit, however long the rows.
        host_gib: host memory that is free, for weights that are streamed, shared by all cards; None: this machine's
            where the card is this machine's, and else as much as it takes. Where that is too little for anything to
            fit, some wait on disk: `Card.disk_gib`, `Card.disk_gbs`.
        cards: that share each step's rows, each with a copy of the model, or with a part of its weights where a copy
            does not fit; the plan is for one of them.

    Raises:
        DoesNotFitError: with the smallest changes that would fit.
        GpuError: the card is not known, or cannot compute what the recipe asks for.
        RecipeError: rows longer than the model's positions; more cards than rows in a step.
        ModelError: no such model, or one that is no Llama, or that the recipe's method cannot take here.
    """
    card = streaming.in_its_machine(card, host_gib, cards)
    model = architecture(recipe.model, recipe.revision)
    require_method(model, recipe, card.is_gpu)
    if _length(recipe, data) > model.max_positions and not force:
        raise RecipeError(
            f"max_length = {recipe.max_length}", f"{model.name} has {model.max_positions} positions", "set it lower"
        )
    if cards > 1 or cards < 1:
        return _on_cards(recipe, card, model, cards, data, force)
    return (
        search(recipe, card, model, data=data, force=force) if card.is_gpu else _plan_on_cpu(recipe, card, model, data)
    )


def _on_cards(recipe: Recipe, card: Card, model: Architecture, cards: int, data, force: bool) -> Plan:
    """With a copy of the model on each card; where it does not fit, with the frozen weights shared among them; and
    where that does not either, each card's own streamed from host memory."""
    one = _share(recipe, cards)
    if not card.is_gpu:
        made = _plan_on_cpu(one, card, model, data)
    else:
        may = recipe.weights != "streamed" and streaming.can_stream(recipe)
        ways = [{}, {"streamed": model.layers, "shards": cards}] if may else []
        tried = (search(one.replace(weights="resident"), card, model, data=data, force=True, **way) for way in ways)
        fitting = (made for made in tried if made.fits and (made.fused or made.shards == 1))
        made = next(fitting, None) or search(one, card, model, data=data, force=force)
    return made.replace(recipe=recipe, cards=cards, steps=steps_of(recipe, data))


def _share(recipe: Recipe, cards: int) -> Recipe:
    """As one of several cards computes it."""
    effective, micro = recipe.effective_batch_size, recipe.micro_batch_size
    if not 0 < cards <= effective:
        why = f"a step has {effective} rows, and each card computes some of them"
        raise RecipeError(f"cards = {cards}", why, f"1 to {effective} cards, or a larger effective_batch_size")
    rows = -(-effective // cards)
    if micro and rows % micro:
        why = f"each of {cards} cards computes {rows} of a step's {effective} rows"
        raise RecipeError(f"micro_batch_size = {micro}", why, "leave it out, or give a divisor of that")
    return recipe.replace(effective_batch_size=rows)


def search(
    recipe: Recipe,
    card: Card,
    model: Architecture,
    *,
    data=None,
    force: bool = False,
    streamed: int = 0,
    shards: int = 1,
) -> Plan:
    """`plan` for a GPU and a model whose shape is known; so many layers `streamed`, where the recipe streams none,
    or shared by so many cards (`shards`)."""
    base, attention, reasons = _base(recipe, card, model, _length(recipe, data))
    base = base.replace(streamed=streamed, shards=shards)
    limit = _limit(recipe, card)
    timed = replace(card, tflops=None) if recipe.dora else card  # fp32 in the plan's memory, not in its arithmetic
    best, others = fastest(recipe, timed, base, limit)
    made = Plan(
        recipe=recipe,
        card=card,
        dtype=card.choose_precision(recipe.precision)[0],
        micro_batch_size=best.work.rows,
        accumulation=best.work.accumulation,
        layers=best.work.layers,
        attention=attention,
        kernel=base.kernel,
        optimizer=base.optimizer,
        fused=base.fused,
        reasons=reasons
        | {
            "micro_batch_size": "as asked" if recipe.micro_batch_size else "the fastest divisor of the effective batch",
            "layers": _why_layers(recipe, best, limit)
            + streaming.hint(recipe, timed, best, limit, with_fewest_streamed),
            "weights": streaming.why(best.work, best.time, recipe, timed),
        },
        memory=best.memory,
        time=best.time,
        alternatives=tuple(_alternative(one, best, limit) for one in others),
        length=base.length,
        streamed=spread(best.work.streamed, model.layers),
        shards=shards,
        **streaming.where_they_wait(best.work, card),
        limit_gib=limit / GIB,
        steps=steps_of(recipe, data),
        basis=_basis(recipe, rehearsed=not best.work.streamed),
    )
    if not made.fits and not force:
        from llamanb.advice import does_not_fit

        raise does_not_fit(made, model)
    return made


def smallest_fits(recipe: Recipe, card: Card, model: Architecture, gaps: float = GAPS_GUESS) -> bool:
    """Whether the smallest layout fits; a quick answer, with gaps as a share of the rest. With none a no is sure."""
    base, *_ = _base(recipe, card, model, recipe.max_length)
    least = smallest(recipe, base, card, streaming.rooms(recipe, base, card)[-1])
    return outline(least).allocated * (1 + gaps) <= _limit(recipe, card)


def _base(recipe: Recipe, card: Card, model: Architecture, length: int) -> tuple[Workload, str, dict[str, str]]:
    """What is computed, its layout left open; transformers' name of the attention; and why, by field of the plan."""
    dtype, why_dtype = card.choose_precision(recipe.precision)
    why_not_fused = _why_not_fused(recipe)
    attention, kernel, why_attention = _attention(card, dtype, fused=not why_not_fused)
    optimizer, why_optimizer = _optimizer(recipe, card)
    chosen = {"dtype": dtype, "kernel": kernel, "optimizer": optimizer, "fused": not why_not_fused}
    reasons = {"dtype": why_dtype, "attention": why_attention, "optimizer": why_optimizer}
    reasons["fused"] = why_not_fused or "the same numbers in fewer kernels, from half of the activations"
    return workload(recipe, card, model, length=length, **chosen), attention, reasons


def _limit(recipe: Recipe, card: Card) -> float:
    """Bytes of the card to plan with."""
    margin = (MARGIN_ELSEWHERE if _other_versions() else MARGIN) + (MARGIN_DORA if recipe.dora else 0)
    return card.free_gib * GIB * (1 - margin)


def workload(
    recipe: Recipe,
    card: Card,
    model: Architecture,
    *,
    dtype: str,
    kernel: str,
    optimizer: str,
    length: int,
    fused: bool = False,
    rows: int = 1,
    layers: tuple[str, ...] | None = None,
) -> Workload:
    """What a recipe's memory depends on; without `layers` all are as the recipe asks, or checkpointed."""
    return Workload(
        model=model,
        rows=rows,
        length=length,
        layers=layers or (AS_ASKED.get(recipe.checkpointing, CHECKPOINTED),) * model.layers,
        fused=fused,
        dtype="fp32" if recipe.dora else dtype,
        quantization=recipe.quantization,
        full=not recipe.adapters,
        double_quant=recipe.double_quant,
        rank=recipe.rank,
        targets=recipe.target_modules,
        dropout=recipe.dropout > 0,
        optimizer=optimizer,
        kernel=kernel,
        accumulation=recipe.effective_batch_size // rows,
        blas_workspace=round(card.workspace_mib * 2**20),
    )


def workload_of(plan: Plan, model: Architecture) -> Workload:
    """The workload that a plan was made for."""
    same = {name: getattr(plan, name) for name in ("dtype", "kernel", "optimizer", "length", "layers", "fused")}
    made = workload(plan.recipe, plan.card, model, rows=plan.micro_batch_size, **same)
    return made.replace(streamed=len(plan.streamed), shards=plan.shards)


def _alternative(one: Candidate, best: Candidate, limit: float) -> Alternative:
    if one.memory.reserved > limit:
        verdict = f"needs {(one.memory.reserved - limit) / GIB:.2f} GiB more than there is to plan with"
    elif one.time and best.time:
        ratio = one.time.step_s / best.time.step_s
        verdict = f"{ratio - 1:.0%} slower" if ratio < 2 else f"takes {ratio:.0f} times as long"
    else:
        verdict = "more layers recomputed" if one.recomputed > best.recomputed else "smaller products"
    step_s = one.time.step_s if one.time else None
    return Alternative(one.work.rows, one.recomputed, one.memory.reserved / GIB, step_s, verdict)


def _why_layers(recipe: Recipe, best: Candidate, limit: float) -> str:
    if best.memory.reserved > limit:
        return "nothing fits"
    if recipe.checkpointing != "auto":
        return "as asked"
    if not best.recomputed:
        return "all of them fit"
    if OFFLOADED in best.work.layers:
        return "without that nothing fits"
    return f"recomputing costs time: as few layers as fit {limit / GIB:.2f} GiB"


def _why_not_fused(recipe: Recipe) -> str:
    """Why layers are computed as transformers and peft do; "" where `model.fused` can do it."""
    if not recipe.adapters:
        return "fused layers train adapters only"
    if recipe.quantization == "int8":
        return "int8 has its own products"
    return "fused layers know neither dropout nor DoRA" if recipe.dropout or recipe.dora else ""


def _attention(card: Card, dtype: str, *, fused: bool) -> tuple[str, str, str]:
    """transformers' attention, the kernel it will take, and why. `fused`: rows lie one behind the other, none padded,
    which FlashAttention takes; rows of one length go through SDPA, where a Hopper GPU may take cuDNN's, which is faster
    (model/row_attention.py). Kernels that take grouped heads do in the card's own 16-bit dtype.

    Llama 3 shares key and value heads between query heads, and without FlashAttention the memory-efficient kernel
    refuses that: SDPA then takes its math path, whose memory grows with the square of the length.
    """
    fast = [kernel for kernel in card.grouped_kernels if kernel != "math" and not (fused and kernel == "cudnn")]
    tried = "" if card.attention_gqa or dtype == "fp32" else " (by its compute capability; not tried)"
    if fast and dtype != "fp32":
        hopper = card.capability[0] in (9, 10)  # where torch prefers cuDNN's (sdp_utils.cpp, check_prefer_cudnn)
        kernel = "cudnn" if "cudnn" in fast and hopper else fast[0]
        return "sdpa", kernel, f"{kernel} takes grouped heads as they are{tried}"
    why = "only the math kernel takes grouped heads here; expanded, the memory-efficient one runs"
    return EXPANDED_ATTENTION, "memory-efficient", why + tried


def _optimizer(recipe: Recipe, card: Card) -> tuple[str, str]:
    auto = recipe.optimizer == "auto"
    if auto and not (card.is_gpu and recipe.adapters):
        return "adamw_torch_fused", "exact, and fast where its states have room"
    wanted = "paged_adamw_8bit" if auto else recipe.optimizer
    if wanted.startswith("paged") and not card.pages:
        unpaged = "adamw_8bit" if "8bit" in wanted else "adamw_torch_fused"
        return unpaged, "not paged: on WSL2 the states would stay on the GPU, uncounted"
    return wanted, "2 bytes of state a parameter instead of 8, paged out where the GPU is full" if auto else "as asked"


def _plan_on_cpu(recipe: Recipe, card: Card, model: Architecture, data) -> Plan:
    dtype, why_dtype = card.choose_precision(recipe.precision)
    effective = recipe.effective_batch_size
    length = _length(recipe, data)
    fits = max(1, CPU_TOKENS // length)
    rows = recipe.micro_batch_size or max(n for n in range(1, min(fits, effective) + 1) if effective % n == 0)
    optimizer, why_optimizer = _optimizer(recipe, card)
    return Plan(
        recipe=recipe,
        card=card,
        dtype=dtype,
        micro_batch_size=rows,
        accumulation=effective // rows,
        layers=(CHECKPOINTED,) * model.layers if recipe.checkpointing in ("all", "offloaded") else (),
        attention="sdpa",
        kernel="",
        optimizer=optimizer,
        reasons={
            "dtype": why_dtype,
            "micro_batch_size": "as asked" if recipe.micro_batch_size else f"at most {CPU_TOKENS} tokens at once",
            "layers": "as asked" if recipe.checkpointing != "auto" else "a CPU has the memory, and saves the time",
            "attention": "runs on every CPU",
            "fused": "what they save is a GPU's time and memory",
            "optimizer": why_optimizer,
        },
        length=length,
        steps=steps_of(recipe, data),
    )


def _length(recipe: Recipe, data) -> int:
    """Tokens of the longest row there is, or may be."""
    return max([8, *(len(row.input_ids) for row in data.train)]) if data else recipe.max_length


def steps_of(recipe: Recipe, data) -> int | None:
    """Optimizer steps of a run; None where the rows are not counted yet."""
    if recipe.steps or not data:
        return recipe.steps
    a_pass = max(1, math.ceil(len(data.train) / recipe.effective_batch_size))  # the Trainer rounds each pass up
    return math.ceil(a_pass * recipe.epochs)


def _basis(recipe: Recipe, *, rehearsed: bool) -> str:
    """What the predictions rest on; with the advice to rehearse where that can be done."""
    text = "the shape of the model and the figures of the card"
    if recipe.dora:
        return text + "; DoRA is planned for roughly, as if all of it were fp32: rehearse(plan)"
    others = ", ".join(f"{name} {is_}" for name, is_ in _other_versions())
    sure = ": rehearse(plan) to be sure" if rehearsed else ""
    return f"{text}, as measured with other versions ({others} here){sure}" if others else text


@functools.cache
def _other_versions() -> tuple[tuple[str, str], ...]:
    """Packages here that are of another version than MEASURED_WITH, or absent."""
    found = []
    for name, measured in MEASURED_WITH.items():
        try:
            here = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            here = "not installed"
        here = here.split("+")[0]
        if here != measured:
            found.append((name, here))
    return tuple(found)
