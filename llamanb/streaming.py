"""What a plan has to know of weights that wait in host memory or on disk: how many may, what bringing them to the card
hides behind, and what is said of it."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace

from llamanb import disk
from llamanb.card import Card
from llamanb.copies import (
    GIB,
    HOST_GIB,
    copies_s,
    input_bytes,
    on_disk,
    reads_s,
    room_in_memory,
    room_with_disk,
    waiting_bytes,
)
from llamanb.machine import host_memory
from llamanb.recipe import Recipe
from llamanb.speed import StepTime, shares, step_time
from llamanb.tape import CHECKPOINTED, OFFLOADED, Workload

TRIED = 3
"""Numbers of streamed layers that are looked at, from as few as fit to all."""
TOKENS = 64
"""Steps in which tokens are counted that hide copies."""
STALLS = 0.005
"""Share of a step from which waiting for copies is told."""
WORTH = 1.1
"""Times as fast from which streaming is hinted at."""
NCCL_GIB = 0.3
"""What NCCL takes of each card beside torch; two H200 lost 0.27 each (`benchmarks.scale`)."""


def in_its_machine(card: Card | str | None, host_gib: float | None = None, cards: int = 1) -> Card:
    """The card with what weights may wait in: this machine's memory and disk where it is this machine's, and else so
    much host memory. Several cards share it, and what the disk reads; and of each NCCL takes something."""
    if card is None:
        host_gib = min(host_memory()[1:]) if host_gib is None else host_gib
        card = replace(Card.here(), disk_gib=disk.free_gib(), disk_gbs=disk.measured())
    card = Card.known(card) if isinstance(card, str) else card
    if cards > 1 and card.is_gpu:
        card = replace(card, free_gib=card.free_gib - NCCL_GIB)
    if host_gib is None:
        return card
    rate = card.disk_gbs if cards < 2 else (card.disk_gbs or disk.GBS) / cards
    return replace(card, host_gib=host_gib / max(cards, 1), disk_gbs=rate)


def where_they_wait(work: Workload, card: Card) -> dict:
    """A plan's fields for what the workload streams, and offloads."""
    held, below = waiting_bytes(work, card)
    found = {"on_disk": on_disk(work, card), "streamed_gib": held / GIB, "disk_gib": below / GIB}
    return found | {"offloaded_gib": work.layers.count(OFFLOADED) * input_bytes(work) / GIB}


def can_stream(recipe: Recipe) -> bool:
    """Whether its weights are such that they can wait in host memory."""
    return recipe.quantization in ("nf4", "fp4") and not (recipe.dropout or recipe.dora)


def may_stream(recipe: Recipe) -> bool:
    """Whether they also may."""
    return recipe.weights != "resident" and can_stream(recipe)


def changes(recipe: Recipe) -> list[tuple[str, str, dict]]:
    """(change, what it costs, fields) after which weights may wait that may not yet, or would not."""
    plain = {"dropout": 0.0, "dora": False}
    if recipe.weights != "streamed" and can_stream(recipe):
        return [("weights = 'streamed'", "time, where copies do not hide", {"weights": "streamed"})]
    if may_stream(recipe.replace(**plain)) and not can_stream(recipe):
        return [("dropout = 0, dora = False", "what these do", plain)]
    return []


def machines(recipe: Recipe, card: Card) -> list[tuple[Callable[..., str], str, Card]]:
    """(change in words, what it costs, the card in such a machine) with which more weights could wait."""
    found = []
    if may_stream(recipe) and card.disk_gib is not None:
        need = (lambda plan: f"{math.ceil(plan.disk_gib + disk.SPARE_GIB)} GiB of free disk"), "time: what it reads"
        found.append((*need, replace(card, disk_gib=None)))
    if may_stream(recipe) and card.host_gib is not None:
        need = (lambda plan: f"{math.ceil(plan.streamed_gib + HOST_GIB)} GiB of free host memory"), "money"
        found.append((*need, replace(card, host_gib=None)))
    return found


def waits(gib: float, on_disk_gib: float) -> str:
    """What so much weight that is streamed takes, in words."""
    said = f"; {gib:.1f} GiB of weights wait in host memory"
    return f"{said}, {on_disk_gib:.1f} on disk" if on_disk_gib else said


def too_little(recipe: Recipe, card: Card, streamed: int, below: int, depth: int) -> str:
    """What host memory and disk have room for, in words, where that is less than all layers: so many `streamed`, and of
    them so many on disk (`below`)."""
    if card.host_gib is None or streamed == depth or not may_stream(recipe):
        return ""
    room = f"; {card.host_gib:.1f} GiB of host memory have room for the weights of {streamed - below}"
    room += f", and {card.disk_gib:.1f} GiB of disk for those of {below}," if below else ""
    return f"{room} of {depth} layers"


def hint(recipe: Recipe, card: Card, best, limit: float, look: Callable) -> str:
    """Where a layout recomputes and would be WORTH it faster with weights that wait, that it would, in words. Nobody is
    given that unasked: predictions miss by more where launches bind, and answers take longer (docs/decisions/0019).

    Args:
        best: the layout (search.Candidate), in `limit` bytes of the card.
        look: for the fastest with at most so many layers streamed (search.with_fewest_streamed).
    """
    may = recipe.weights == recipe.checkpointing == "auto" and best.work.fused and can_stream(recipe)
    if not (may and best.recomputed and best.time) or best.work.streamed or best.memory.reserved > limit:
        return ""
    asked, work = recipe.replace(weights="streamed"), best.work.replace(layers=(CHECKPOINTED,) * len(best.work.layers))
    other = look(asked, card, work, limit, rooms(asked, work, card)[-1])
    if other.memory.reserved > limit or other.time.step_s > best.time.step_s / WORTH:
        return ""
    said = f"; weights = 'streamed' is predicted to take about {in_minutes(other.time.step_s)} a step instead of "
    return (
        f"{said}{in_minutes(best.time.step_s)}, and {waiting_bytes(other.work, card)[0] / GIB:.1f} GiB of host memory"
    )


def rooms(recipe: Recipe, base: Workload, card: Card) -> list[int]:
    """How many layers' weights may wait, fewest first, each for where nothing fits with the one before: none, where the
    recipe leaves that open; as many as host memory has room for; and as many as it and the disk have."""
    if not (may_stream(recipe) and base.fused):
        return [0]
    found = [0, room_in_memory(base, card), room_with_disk(base, card)]
    return sorted({max(0, room) for room in found[recipe.weights == "streamed" :]})


def counts_to_try(room: int, fits: Callable[[int], bool]) -> list[int]:
    """Numbers of layers to stream: as few as fit, or all that there is room for; and some more, since what a streamed
    layer leaves free can keep activations, and its copies may cost nothing."""
    first = bisect_left(range(room), True, key=fits)
    return sorted({first + (room - first) * i // (TRIED - 1) for i in range(TRIED)})


def tokens_that_hide(work: Workload, card: Card) -> int:
    """About the fewest tokens at once, in TOKENS, behind which the workload's copies hide, and what is read from disk;
    0 where launching alone takes as long. For a card whose speed is known."""
    copies = max(copies_s(work, card), reads_s(work, card)) / min(shares(work))
    resident = work.replace(streamed=0)
    half = {"rows": work.rows // 2} if work.rows % 2 == 0 else {"length": work.length // 2}
    whole, less = (step_time(one, card, 1) for one in (resident, resident.replace(**half)))
    if copies <= whole.launch_s:
        return 0
    per_token = (whole.gpu_s - less.gpu_s) / (work.tokens - resident.replace(**half).tokens)
    return TOKENS * max(1, math.ceil((work.tokens + (copies - whole.gpu_s) / per_token) / TOKENS))


def why(work: Workload, time: StepTime | None, recipe: Recipe, card: Card) -> str:
    """Why weights wait, what hides that they have to be brought, and what decides how fast a step is; or why cards
    share them. Empty where neither is so."""
    if work.shards > 1:
        return "a copy has no room on each; each layer's parts are gathered before it is computed"
    if not work.streamed:
        return ""
    said = "nothing fits with all of them on the card; " if recipe.weights == "auto" else ""
    if card.host_gib is None:
        said += "how much host memory there is was not said (host_gib=); "
    said += _disk_words(work, time, card)
    if not time:
        return said + "they are brought to the card layer by layer"
    reads = reads_s(work, card) > copies_s(work, card)
    what, free = "the disk hides" if reads else "copies hide", tokens_that_hide(work, card)
    hidden = f"{what} behind about {free:,} tokens at once and more" if free else f"{what} behind any layer"
    binds = "arithmetic" if time.gpu_s >= time.launch_s else "launches"
    if time.stall_s > STALLS * time.step_s:
        binds = f"{'the disk' if reads else 'copies'}, {time.stall_s / time.step_s:.0%} of a step"
    elif work.streamed == room_in_memory(work, card) < len(work.layers):
        binds += " and host memory"
    return f"{said}{hidden}, here {work.tokens:,}; bound by {binds}"


def _disk_words(work: Workload, time: StepTime | None, card: Card) -> str:
    """What it means that layers wait on disk; empty where none do."""
    if not (below := len(on_disk(work, card))):
        return ""
    rate = f"{card.disk_gbs:.3g} GB/s" if card.disk_gbs else f"taken to be {disk.GBS:g} GB/s, not measured"
    said = f"host memory has no room for {below} layers, which are read from disk ({rate}) twice a micro-batch"
    said += ": a step takes " + in_minutes(time.step_s) if time else ""
    return f"{said}, each word of an answer {in_minutes(reads_s(work, card))}; "


def in_minutes(seconds: float) -> str:
    """In words, from a minute and a half on in minutes."""
    return f"{seconds:.1f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
