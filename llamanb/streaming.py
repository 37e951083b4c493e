"""What a plan has to know of weights that wait in host memory: how many may, what their copies hide behind, and what is
said of it."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable

from llamanb.card import Card
from llamanb.recipe import Recipe
from llamanb.speed import StepTime, copies_s, shares, step_time
from llamanb.tape import BYTES, Workload, streamed_bytes

HOST_GIB = 2.0
"""Host memory that a training takes beside streamed weights."""
GIB = 2**30
TRIED = 3
"""Numbers of streamed layers that are looked at, from as few as fit to all."""
TOKENS = 64
"""Steps in which tokens are counted that hide copies."""
STALLS = 0.005
"""Share of a step from which waiting for copies is told."""


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


def too_little(recipe: Recipe, card: Card, streamed: int, depth: int) -> str:
    """What host memory has room for, in words, where that is less than all layers."""
    if card.host_gib is None or streamed == depth or not may_stream(recipe):
        return ""
    room = f"; {card.host_gib:.1f} GiB of host memory have room for the weights of"
    return f"{room} {streamed} of {depth} layers"


def room_for(recipe: Recipe, base: Workload, card: Card) -> int:
    """How many layers' weights may wait in the host's memory."""
    if not (may_stream(recipe) and base.fused):
        return 0
    host = math.inf if card.host_gib is None else (card.host_gib - HOST_GIB) * GIB
    return int(min(len(base.layers), max(0.0, host - _embedding(base)) / streamed_bytes(base)))


def counts_to_try(room: int, fits: Callable[[int], bool]) -> list[int]:
    """Numbers of layers to stream: as few as fit, or all that there is room for; and some more, since what a streamed
    layer leaves free can keep activations, and its copies may cost nothing."""
    first = bisect_left(range(room), True, key=fits)
    return sorted({first + (room - first) * i // (TRIED - 1) for i in range(TRIED)})


def waiting_bytes(work: Workload) -> int:
    """Of weights in host memory: of streamed layers, and of the token embedding with them."""
    return work.streamed * streamed_bytes(work) + _embedding(work) if work.streamed else 0


def _embedding(work: Workload) -> int:
    """Bytes of a token embedding that is not the head too."""
    return 0 if work.model.tied else BYTES[work.dtype] * work.model.embedding_parameters


def tokens_that_hide(work: Workload, card: Card) -> int:
    """About the fewest tokens at once, in TOKENS, behind which the workload's copies hide; 0 where launching alone
    takes as long. For a card whose speed is known."""
    resident, copies = work.replace(streamed=0), copies_s(work, card) / min(shares(work))
    half = {"rows": work.rows // 2} if work.rows % 2 == 0 else {"length": work.length // 2}
    whole, less = (step_time(one, card, 1) for one in (resident, resident.replace(**half)))
    if copies <= whole.launch_s:
        return 0
    per_token = (whole.gpu_s - less.gpu_s) / (work.tokens - resident.replace(**half).tokens)
    return TOKENS * max(1, math.ceil((work.tokens + (copies - whole.gpu_s) / per_token) / TOKENS))


def why(work: Workload, time: StepTime | None, recipe: Recipe, card: Card) -> str:
    """Why weights wait in host memory, what hides their copies, and what decides how fast a step is; empty where none
    wait."""
    if not work.streamed:
        return ""
    said = "nothing fits with all of them on the card; " if recipe.weights == "auto" else ""
    if card.host_gib is None:
        said += "how much host memory there is was not said (host_gib=); "
    if not time:
        return said + "they are brought to the card layer by layer"
    free = tokens_that_hide(work, card)
    hidden = f"copies hide behind about {free:,} tokens at once and more" if free else "copies hide behind any layer"
    binds = "arithmetic" if time.gpu_s >= time.launch_s else "launches"
    if time.stall_s > STALLS * time.step_s:
        binds = f"copies, {time.stall_s / time.step_s:.0%} of a step"
    elif work.streamed == room_for(recipe, work, card) < len(work.layers):
        binds += " and host memory"
    return f"{said}{hidden}, here {work.tokens:,}; bound by {binds}"
