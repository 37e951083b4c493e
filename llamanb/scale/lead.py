"""One process of a training on several cards, from its launch to its end: `python -m llamanb RECIPE.json`."""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

from llamanb.card import Card
from llamanb.data import load_data
from llamanb.errors import UNREADABLE, GpuError, LlamanbError, RecipeError
from llamanb.machine import host_memory
from llamanb.nvml import first_line
from llamanb.planner import plan
from llamanb.quiet import quiet_libraries
from llamanb.ranks import ALONE, Ranks
from llamanb.recipe import Recipe
from llamanb.scale.launched import launched
from llamanb.training import train

UNEVEN = 0.1
"""Share of the free memory by which cards may differ."""


def main(arguments: list[str] | None = None) -> int:
    """Trains a recipe on the cards of all processes that were launched with this one. Returns the exit status."""
    parser = argparse.ArgumentParser("python -m llamanb", description="Fine-tune as a recipe says.")
    parser.add_argument("recipe", type=Path, help="JSON, as Recipe.to_json() writes it and each run's folder holds it")
    parser.add_argument("--name", default="run", help="of the run")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs, seen by all machines")
    parser.add_argument("--resume", action="store_true", help="go on also with other steps or epochs")
    parser.add_argument("--new", action="store_true", help="begin a new run, even where one could go on")
    args = parser.parse_args(arguments)
    ranks, number, count = ALONE, 0, 1
    try:
        number, count = launched()
        recipe = _recipe(args.recipe)
        with quiet_libraries():
            if count == 1:
                _lead(recipe, args, ranks)
                return 0
            from llamanb.scale.peers import Peers

            ranks = Peers(number, count)
            ranks.join()
            _together(ranks, recipe, args)
            ranks.leave()
    except LlamanbError as error:  # the launcher ends the other ranks
        if not number or ranks.joined:
            print(f"rank {number}: {error}" if count > 1 else error, file=sys.stderr, flush=True)
        return 1
    except Exception as error:
        if count > 1:  # after its traceback, in one line that `launch` finds
            traceback.print_exc()
            print(f"rank {number}: {type(error).__name__}: {first_line(error)}", file=sys.stderr, flush=True)
            return 1
        raise
    return 0


def _together(ranks: Ranks, recipe: Recipe, args: argparse.Namespace) -> None:
    cards = ranks.all_of((Card.here(), ranks.host))
    if ranks.number:
        from llamanb.scale.follow import follow

        follow(ranks)
    else:
        require_even(cards)
        _lead(recipe, args, ranks, len({host for _, host in cards}))


def require_even(cards: list[tuple[Card, str]]) -> None:
    """Raises GpuError where one card has less memory than another, or is another: all would wait for it, and what is
    planned for one holds for all."""
    first = cards[0][0]
    for number, (card, host) in enumerate(cards):
        less = abs(card.free_gib - first.free_gib) / first.free_gib if first.is_gpu and card.is_gpu else 0.0
        if card.name != first.name or less > UNEVEN:
            words = [f"{one.name}, {one.free_gib or 0:.1f} GiB free" for one in (first, card)]
            raise GpuError(
                f"the card of rank {number} on {host} is not like rank 0's",
                f"rank 0: {words[0]}; rank {number}: {words[1]}",
                "free the memory of the one that has less, or leave it out: CUDA_VISIBLE_DEVICES says which are used",
            )


def _lead(recipe: Recipe, args: argparse.Namespace, ranks: Ranks, machines: int = 1) -> None:
    """Plans for this machine, its memory and its disk; others have as much."""
    data = load_data(recipe)
    host_gib = None if machines == 1 else machines * min(host_memory()[1:])
    made = plan(recipe, data=data, cards=ranks.count, host_gib=host_gib)
    print(made, flush=True)
    resume = True if args.resume else False if args.new else None
    print(train(made, data, name=args.name, runs=args.runs, resume=resume, ranks=ranks), flush=True)


def _recipe(path: Path) -> Recipe:
    try:
        return Recipe.from_json(path.read_text(encoding="utf-8"))
    except UNREADABLE as error:
        fix = "write one: Path('recipe.json').write_text(recipe.to_json())"
        raise RecipeError(f"{path} cannot be read", f"{type(error).__name__}: {error}", fix) from None
