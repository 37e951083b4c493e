"""The fastest layout that fits, searched for: micro-batch by micro-batch, each with as little recomputed as fits.

A step costs least where few layers are recomputed, and many small micro-batches cost little more than one large one:
so for each micro-batch the fewest recomputed layers that fit are looked for, and the fastest of these is taken.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from llamanb.card import Card
from llamanb.copies import least_kept
from llamanb.memory import Memory, outline, predict
from llamanb.recipe import Recipe
from llamanb.speed import StepTime, step_time
from llamanb.streaming import counts_to_try, rooms
from llamanb.tape import CHECKPOINTED, HALVED, OFFLOADED, STORED, Workload

GAPS_GUESS, GAPS_LEAST = 0.02, 96 * 2**20
"""Share of the allocated memory, and bytes, taken for gaps while searching; the layout chosen is replayed."""
MOST_TOKENS = 65536
"""Tokens of the largest micro-batch that is looked at."""
MOST_TRIED = 6
"""Micro-batches that are looked at, spread over the divisors of the effective batch."""
AS_ASKED = {"none": STORED, "all": CHECKPOINTED, "offloaded": OFFLOADED}
"""What becomes of each layer, by a recipe's `checkpointing`; `auto` chooses layer by layer."""


@dataclass(frozen=True)
class Candidate:
    work: Workload
    memory: Memory
    time: StepTime | None

    @property
    def recomputed(self) -> int:
        return sum(kind != STORED for kind in self.work.layers)

    @property
    def steps(self) -> int:
        return recomputed_steps(self.work)


def fastest(recipe: Recipe, card: Card, base: Workload, limit: float) -> tuple[Candidate, list[Candidate]]:
    """The layout to take, and the best of each other micro-batch, in `limit` bytes of the card. The first may exceed
    them: then none fits. Weights wait in host memory, or on disk, where nothing fits without that (rooms)."""
    *least, most = rooms(recipe, base, card)
    for room in least:
        if outline(smallest(recipe, base, card, room)).allocated <= limit:
            best, others = _fastest(recipe, card, base, limit, room)
            if best.memory.reserved <= limit:
                return best, others
    return _fastest(recipe, card, base, limit, most)


def _fastest(recipe: Recipe, card: Card, base: Workload, limit: float, room: int) -> tuple[Candidate, list[Candidate]]:
    """`fastest` with at most `room` layers streamed."""
    tried = (_with_rows(recipe, base, rows) for rows in _micro_batches(recipe, base))
    found = [with_fewest_streamed(recipe, card, work, limit, room) for work in tried]
    fitting = [one for one in found if one.memory.reserved <= limit]
    while fitting:  # gaps were guessed: replay the best, and take it if it still fits
        best = min(fitting, key=_cost)
        at = found.index(best)
        found[at] = fitting[fitting.index(best)] = replayed = _replayed(best, card, limit, recipe, room)
        if replayed.memory.reserved <= limit and _cost(replayed) <= min(map(_cost, fitting)):
            return replayed, [one for one in found if one is not replayed]
        fitting = [one for one in fitting if one.memory.reserved <= limit]
    last = found[-1]
    if last.memory.allocated <= limit:  # the guess of gaps may have been too careful
        last = _replayed(last, card, limit, recipe, room)
        if last.memory.reserved <= limit:
            return last, found[:-1]
    least = smallest(recipe, base, card, room)
    return _candidate(least, card, predict(least)), found


def _micro_batches(recipe: Recipe, base: Workload) -> list[int]:
    """Rows to try at once, many first."""
    if recipe.micro_batch_size:
        return [recipe.micro_batch_size]
    effective = recipe.effective_batch_size
    most = max(1, MOST_TOKENS // base.length)
    divisors = [rows for rows in range(min(effective, most), 0, -1) if effective % rows == 0]
    last = len(divisors) - 1
    return divisors if last < MOST_TRIED else [divisors[round(i * last / (MOST_TRIED - 1))] for i in range(MOST_TRIED)]


def _with_rows(recipe: Recipe, base: Workload, rows: int) -> Workload:
    return base.replace(rows=rows, accumulation=recipe.effective_batch_size // rows)


def smallest(recipe: Recipe, base: Workload, card: Card, room: int = 0) -> Workload:
    """The layout that takes least of the card, with at most `room` layers streamed."""
    work = _with_rows(recipe, base, recipe.micro_batch_size or 1).replace(streamed=room or base.streamed)
    kinds = least_kept(work, card) if recipe.checkpointing == "auto" else (AS_ASKED[recipe.checkpointing],)
    return work.replace(layers=kinds * (len(base.layers) // len(kinds)))


def _with_fewest_recomputed(recipe: Recipe, card: Card, work: Workload, limit: float) -> Candidate:
    """The workload as asked, or with as few layers recomputed as fit; with all of them, as it comes, where nothing
    fits."""
    if recipe.checkpointing == "auto" and _guess(work).reserved <= limit:
        work = fewest_recomputed(work, lambda one: _guess(one).reserved <= limit)
    return _candidate(work, card, _guess(work))


def with_fewest_streamed(recipe: Recipe, card: Card, work: Workload, limit: float, room: int) -> Candidate:
    """The workload with as few layers streamed as fit when all that may be is recomputed, or the fastest of some with
    more."""
    least = work.replace(layers=(AS_ASKED.get(recipe.checkpointing, CHECKPOINTED),) * len(work.layers))
    counts = counts_to_try(room, lambda n: _guess(least.replace(streamed=n)).reserved <= limit)
    works = [work.replace(streamed=n) for n in counts] if room else [work]
    return min((_with_fewest_recomputed(recipe, card, one, limit) for one in works), key=_cost)


def fewest_recomputed(work: Workload, fits: Callable[[Workload], bool], least: int = 0) -> Workload:
    """The workload with as few layers recomputed as fit, or with all of them; the first layers, since the others come
    first in the backward pass and are gone by then. Fused layers recompute their MLP alone as long as that is enough:
    as much memory for the same arithmetic, in smaller steps.

    Args:
        least: steps to begin with (recomputed_steps).
    """
    found = ways(len(work.layers), fused=work.fused)
    at = bisect_left(range(len(found) - 1), True, least, key=lambda i: fits(work.replace(layers=found[i])))
    return work.replace(layers=found[at])


def recomputed_steps(work: Workload) -> int:
    """Which of the layouts that `fewest_recomputed` goes through the workload has; 0 where everything is kept."""
    return ways(len(work.layers), fused=work.fused).index(work.layers)


def ways(depth: int, *, fused: bool) -> list[tuple[str, ...]]:
    """Layouts from everything kept to everything recomputed, each with a little more recomputed than the one before."""
    kinds = (STORED, HALVED, CHECKPOINTED) if fused else (STORED, CHECKPOINTED)
    found = [(more,) * i + (less,) * (depth - i) for less, more in itertools.pairwise(kinds) for i in range(depth)]
    return [*found, (CHECKPOINTED,) * depth]


def _candidate(work: Workload, card: Card, memory: Memory) -> Candidate:
    return Candidate(work, memory, step_time(work, card, work.accumulation))


def _guess(work: Workload) -> Memory:
    found = outline(work)
    totals = {instant: sum(buckets.values()) for instant, buckets in found.peaks.items()}
    allocated = max(totals.values())
    gap = max(GAPS_LEAST, round(GAPS_GUESS * allocated))
    return Memory(totals, found.peaks[max(totals, key=totals.get)], gap)


def _replayed(candidate: Candidate, card: Card, limit: float, recipe: Recipe, room: int) -> Candidate:
    """The candidate with its gaps replayed, and with as few layers recomputed as fit with them; or one more streamed,
    of `room` at most, where none do."""
    now = _candidate(candidate.work, card, predict(candidate.work))
    if recipe.checkpointing != "auto":
        return now
    less = _within(now.work, limit - _gaps(now), 0)
    if recomputed_steps(less) < now.steps:
        less = _candidate(less, card, predict(less))
        now = less if less.memory.reserved <= limit else now
    while now.memory.reserved > limit and set(now.work.layers) != {CHECKPOINTED}:
        work = _within(now.work, limit - _gaps(now), now.steps + 1)
        now = _candidate(work, card, predict(work))
    if now.memory.reserved > limit and 0 < now.work.streamed < room:
        work = now.work.replace(streamed=now.work.streamed + 1)
        now = _candidate(work, card, predict(work))
    return now


def _gaps(candidate: Candidate) -> int:
    """Bytes that the allocator adds to the outline."""
    return candidate.memory.reserved - outline(candidate.work).allocated


def _within(work: Workload, room: float, least: int) -> Workload:
    return fewest_recomputed(work, lambda one: outline(one).allocated <= room, least)


def _cost(candidate: Candidate) -> tuple[float, int]:
    """Seconds a step; where the card's speed is not known, the share of layers recomputed. Then fewer micro-batches."""
    share = candidate.recomputed / max(1, len(candidate.work.layers))
    return (candidate.time.step_s if candidate.time else share, -candidate.work.rows)
