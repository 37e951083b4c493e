"""The longest row that trains on 16 GB: 8B in nf4, rank 32, one row at a time, by llamanb and by Unsloth.

    python -m benchmarks.longest run OUT --unsloth-site DIR [--seconds 560]    appends JSON lines to OUT
    python -m benchmarks.longest report OUT [OUT ...]                          Markdown

Each try is a process of its own on a GPU that acts as a T4 (as in benchmarks.speed) and takes two optimizer steps, the
second with the optimizer's states there. llamanb trains the longest row that its plan says to fit, which is looked for
from what it says of the table's T4 on; Unsloth, with its checkpoints in host memory, is tried with the same row, then
with shorter ones until one trains, or with longer ones until none does. Lengths are multiples of 1,024.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.speed_processes import Clock, StackError, Worker, environment
from benchmarks.speed_report import lines
from benchmarks.speed_rows import MODELS, OPTIMIZER
from llamanb import Card, Recipe
from llamanb.planner import plan

MODEL, CARD, RANK, STEP, MOST = "8b", "T4", 32, 1024, 131072
BY = 1.15
"""From one length to the next."""
REFUSED = "refused by the plan"
LEAST_S = 60.0
"""With less time left no try begins."""


def planned_longest(recipe: Recipe, card: str) -> int:
    """Tokens of the longest row that a plan says to fit."""
    low, high = 0, MOST // STEP
    while low < high:
        middle = (low + high + 1) // 2
        fits = plan(recipe.replace(max_length=middle * STEP), card, force=True).fits
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * STEP


def look(begin: int, trains: Callable[[int], bool | None]) -> None:
    """Tries lengths from `begin` on, upwards while they train, downwards while they do not; until `trains` has no
    time left and says None, or what trains and what does not lie side by side."""
    good, bad = 0, MOST + STEP
    length = begin
    while good + STEP < bad:
        outcome = trains(length)
        if outcome is None:
            return
        good, bad = (length, bad) if outcome else (good, length)
        by = round(length * BY) if outcome else round(length / BY)
        nearer = by if good < by < bad else (good + bad) // 2
        length = min(max(nearer // STEP * STEP, good + STEP), bad - STEP)


def one_try(
    stack: str, length: int, checkpoints: Path, site: str, log, clock: Clock, model: str = MODEL, device: str = "cuda"
) -> dict:
    """What became of two steps of one row of so many tokens."""
    settings = {"stack": stack, "model": model, "card": CARD, "limit_gib": Card.known(CARD).free_gib, "device": device}
    settings |= {"checkpoint": str(checkpoints / model), "mode": "unsloth", "longest": length, "rank": RANK}
    session = {"length": length, "micro": 1, "effective": 1, "rows": 3, "lengths": "", "warm_steps": 2}
    session["options"] = {"rank": str(RANK), "effective_batch_size": "1"} if stack == "llamanb" else {}
    worker = Worker(settings, site if stack == "unsloth" else "", log)
    try:
        worker.wait_ready(min(120, clock.left))
        worker.send(do="open", **session)
        return {"status": "trains", **worker.answer("opened", clock.left)}
    except StackError as error:
        if clock.left < 2:
            return {"status": "the time was over"}
        refused = REFUSED if "DoesNotFitError" in str(error) else "out of memory"
        return {"status": refused if error.out_of_memory else "failed", "why": str(error)}
    finally:
        worker.end()


def run(out: Path, site: str, checkpoints: Path, seconds: float) -> None:
    clock = Clock(seconds)
    prepare = [sys.executable, "-m", "benchmarks.speed_prepare", str(checkpoints), MODEL]
    recipe = Recipe(model=MODELS[MODEL], dataset="random", rank=RANK, effective_batch_size=1, eval_rows=0)
    begin = planned_longest(recipe.replace(weights="resident", optimizer=OPTIMIZER), CARD)
    with out.with_suffix(".log").open("a") as log:
        done = subprocess.run(prepare, stdout=subprocess.PIPE, stderr=log, text=True, env=environment())
        if done.returncode:
            sys.exit(f"no checkpoints: {log.name} says why")
        found = next(line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT "))
        _write(out, {"kind": "machine", **json.loads(found)})

        def attempt(stack: str, length: int) -> str:
            if clock.left < LEAST_S:
                return "the time was over"
            outcome = one_try(stack, length, checkpoints, site, log, clock)
            _write(out, {"kind": "try", "stack": stack, "length": length, **outcome})
            return outcome["status"]

        longest = next((length for length in range(begin, 0, -STEP) if attempt("llamanb", length) != REFUSED), begin)
        look(longest, lambda length: {"trains": True, "out of memory": False}.get(attempt("unsloth", length)))


def _write(out: Path, line: dict) -> None:
    with out.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line)[:400], flush=True)


def report(found: list[dict]) -> str:
    tries = [line for line in found if line["kind"] == "try"]
    text = ["| | tokens | | allocated GiB | reserved GiB | two steps, s |", "|---|---|---|---|---|---|"]
    for line in tries:
        seen = [f"{line[name]:.2f}" if name in line else "" for name in ("allocated_gib", "reserved_gib", "warm_s")]
        text.append(f"| {line['stack']} | {line['length']:,} | {line['status']} | {' | '.join(seen)} |")
    text.append("")
    for stack in dict.fromkeys(line["stack"] for line in tries):
        own = [line for line in tries if line["stack"] == stack]
        good = max((line["length"] for line in own if line["status"] == "trains"), default=0)
        bad = min((line["length"] for line in own if line["status"] in (REFUSED, "out of memory")), default=0)
        text.append(f"{stack}: {good:,} train" + (f", {bad:,} do not" if bad else "") + ".\n")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("out", type=Path)
    one.add_argument("--unsloth-site", required=True, help="folder with Unsloth and the packages it wants")
    one.add_argument("--checkpoints", type=Path, default=Path(tempfile.gettempdir(), "speed-checkpoints"))
    one.add_argument("--seconds", type=float, default=560.0)
    one = commands.add_parser("report")
    one.add_argument("out", type=Path, nargs="+")
    args = parser.parse_args()
    if args.command == "report":
        print(report([line for path in args.out for line in lines(path)]))
    else:
        run(args.out, args.unsloth_site, args.checkpoints.resolve(), args.seconds)


if __name__ == "__main__":
    main()
