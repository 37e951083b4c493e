"""`plan`: chooses how a recipe runs on a card, and says why."""

from __future__ import annotations

from llamanb.card import Card
from llamanb.layout import EXPANDED_ATTENTION, Plan
from llamanb.recipe import Recipe

TOKENS_AT_ONCE = 2048
"""Tokens per micro-batch on a GPU: with every layer checkpointed, 8B in nf4 peaked at 6.6 GiB with 4 × 512 of them
(benchmarks/results/gpu_tests.md)."""


def plan(recipe: Recipe, card: Card | None = None) -> Plan:
    """How `recipe` runs on `card` (None: the GPU or CPU of this machine).

    Raises GpuError where the card cannot compute what the recipe asks for.
    """
    card = card or Card.present()
    dtype, why_dtype = card.choose_precision(recipe.precision)
    micro, why_micro = _micro_batch(recipe)
    attention, why_attention = _attention(card, dtype)
    optimizer, why_optimizer = _optimizer(recipe, card)
    checkpoint = card.is_gpu if recipe.checkpointing == "auto" else recipe.checkpointing == "all"
    why_checkpoint = "as asked"
    if recipe.checkpointing == "auto":
        why_checkpoint = "saves most of a GPU's memory" if card.is_gpu else "a CPU has the memory, and saves the time"
    return Plan(
        recipe=recipe,
        card=card,
        dtype=dtype,
        micro_batch_size=micro,
        accumulation=recipe.effective_batch_size // micro,
        checkpoint_layers=checkpoint,
        attention=attention,
        optimizer=optimizer,
        reasons={
            "dtype": why_dtype,
            "micro_batch_size": why_micro,
            "checkpoint_layers": why_checkpoint,
            "attention": why_attention,
            "optimizer": why_optimizer,
        },
    )


def _micro_batch(recipe: Recipe) -> tuple[int, str]:
    if recipe.micro_batch_size:
        return recipe.micro_batch_size, "as asked"
    fits = max(1, TOKENS_AT_ONCE // recipe.max_length)
    effective = recipe.effective_batch_size
    micro = max(n for n in range(1, min(fits, effective) + 1) if effective % n == 0)
    return micro, f"at most {TOKENS_AT_ONCE} tokens at once, and the effective batch of {effective} in whole parts"


def _attention(card: Card, dtype: str) -> tuple[str, str]:
    """Llama 3 shares key and value heads between query heads, and without FlashAttention the memory-efficient kernel
    refuses that: SDPA then takes its math path, whose memory grows with the square of the length."""
    if not card.is_gpu:
        return "sdpa", "runs on every CPU"
    fast = [kernel for kernel in card.attention_gqa if kernel != "math"]  # tried in the card's own 16-bit dtype
    if fast and dtype != "fp32":
        return "sdpa", f"{fast[0]} takes grouped heads as they are"
    return EXPANDED_ATTENTION, "only the math kernel takes grouped heads here; expanded, the memory-efficient one runs"


def _optimizer(recipe: Recipe, card: Card) -> tuple[str, str]:
    if recipe.optimizer != "auto":
        return recipe.optimizer, "as asked"
    if card.is_gpu and recipe.adapters:
        return "paged_adamw_8bit", "2 bytes of state a parameter instead of 8, paged out where the GPU is full"
    return "adamw_torch_fused", "exact, and fast where its states have room"
