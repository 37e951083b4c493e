"""Plans at the edge: the largest that the planner accepts is run on a pretend card, and must not run out of memory.

    python -m benchmarks.boundaries run CHECKPOINTS OUT [--at-once GIB]
    python -m benchmarks.boundaries report OUT

On a big GPU that behaves like a T4 (14.40 GiB for torch's allocator) or an RTX 4090 (23.07): for 1B, 3B and 8B, row
lengths at which some layers are kept and some recomputed (the next one up is one more layer kept), and the longest row
of all (the next one up is 128 tokens more); in closed form and, for some, after a rehearsal. The rows trained on differ
in length, as real ones do, so gaps are as ragged as they get. Checkpoints as for benchmarks.memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.memory import MODELS
from llamanb import Card, Recipe
from llamanb.advice import STEP
from llamanb.architecture import architecture
from llamanb.layout import GIB, Plan
from llamanb.planner import search

CARDS = {"T4": 14.40, "RTX 4090": 23.07}
LENGTHS = (512, 1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768)
ROWS = (1, 2, 4, 8)
PER_PAIR = 4
"""Edges between layers, for each card and model."""
STEPS = 3


def recipe_of(case: dict, model: str) -> Recipe:
    return Recipe(
        model=model,
        dataset="random",
        max_length=case["length"],
        micro_batch_size=case["rows"],
        effective_batch_size=2 * case["rows"],
        rank=case["rank"],
        checkpointing=case["checkpointing"],
        steps=STEPS,
        eval_rows=0,
        weights="resident",
    )


def cases() -> list[dict]:
    """The edges that closed-form plans for the known cards have."""
    source, found = random.Random(0), []
    for card_name in CARDS:
        card = Card.known(card_name)
        for size, name in MODELS.items():
            shape = architecture(name)
            mixed = []
            for length in LENGTHS:
                for rows in ROWS:
                    case = {
                        "card": card_name,
                        "model": size,
                        "length": length,
                        "rows": rows,
                        "rank": source.choice((8, 16, 64)),
                    }
                    case["checkpointing"] = "auto"
                    plan = search(recipe_of(case, name), card, shape, force=True)
                    if plan.fits and 0 < plan.recomputed < shape.layers:
                        mixed.append(case)
            edges = source.sample(mixed, min(PER_PAIR, len(mixed)))
            found += [{**case, "edge": "layers", "rehearse": i < 2} for i, case in enumerate(edges)]
            case = {"card": card_name, "model": size, "rows": 1, "rank": 16, "checkpointing": "all", "edge": "tokens"}
            found.append({**case, "length": 0, "rehearse": False})
    return [{"id": f"{i}", **case} for i, case in enumerate(found, 1)]


def longest(case: dict, card: Card, model: str) -> Plan:
    """The plan for the longest row, in steps of 128 tokens, that is said to fit."""
    shape, best, low, high = architecture(model), None, 1, 131072 // STEP
    while low <= high:
        middle = (low + high) // 2
        plan = search(recipe_of({**case, "length": middle * STEP}, model), card, shape, force=True)
        if plan.fits:
            best, low = plan, middle + 1
        else:
            high = middle - 1
    return best


def measure(case: dict, checkpoints: Path, rehearsed: bool) -> dict:
    """Plans and runs one case in this process."""
    import torch

    from benchmarks.memory import train_and_watch
    from llamanb.rehearsal import rehearse

    begin = time.monotonic()
    card = Card.pretend(case["card"])
    torch.backends.cuda.enable_cudnn_sdp(False)  # a Hopper GPU would take it where those cards take flash
    model = str(checkpoints / case["model"])
    if case["edge"] == "tokens":
        plan = longest(case, card, model)
    else:
        plan = search(recipe_of(case, model), card, architecture(model), force=True)
    if rehearsed:
        plan = rehearse(plan)
    result = train_and_watch(plan, STEPS, lengths=random.Random(1))
    return {
        "id": case["id"],
        "rehearsed": rehearsed,
        "length": plan.length,
        "recomputed": plan.recomputed,
        "layers": len(plan.layers),
        "usable": round(card.free_gib, 3),
        "predicted": {"allocated": round(plan.memory.allocated / GIB, 4), "reserved": round(plan.needs_gib, 4)},
        **result,
        "wall_s": round(time.monotonic() - begin, 1),
    }


def run(checkpoints: Path, out: Path, at_once: float) -> None:
    jobs = [(case, rehearsed) for case in cases() for rehearsed in ((False, True) if case["rehearse"] else (False,))]
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(line["id"], line["rehearsed"]) for line in lines}
    waiting = [job for job in jobs if (job[0]["id"], job[1]) not in done]
    running: list = []
    while waiting or running:
        used = sum(CARDS[case["card"]] + 2 for _, case, _ in running)
        job = next((job for job in waiting if used + CARDS[job[0]["card"]] + 2 <= at_once or not running), None)
        if job and len(running) < 8:
            waiting.remove(job)
            command = [sys.executable, "-m", "benchmarks.boundaries", "case", json.dumps(job[0]), str(checkpoints)]
            env = {**os.environ, "OMP_NUM_THREADS": "2"}
            command.append(str(int(job[1])))
            pipe = subprocess.PIPE
            running.append((subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env), *job))
            continue
        time.sleep(0.3)
        for entry in list(running):
            process, case, rehearsed = entry
            if process.poll() is not None:
                running.remove(entry)
                output, errors = process.communicate()
                found = [line[7:] for line in output.splitlines() if line.startswith("RESULT ")]
                failed = {"id": case["id"], "rehearsed": rehearsed, "status": f"failed: {errors[-500:]}"}
                result = json.loads(found[0]) if found else failed
                with out.open("a") as file:
                    file.write(json.dumps(case | result) + "\n")
                print(_row(case | result), flush=True)


def _row(line: dict) -> str:
    words = [
        line["id"],
        line["card"],
        line["model"],
        f"{line['rows']} × {line['length']}",
        f"r{line['rank']}",
        line["edge"],
    ]
    if "usable" not in line:
        return "| " + " | ".join([*words, line["status"]]) + " |"
    words += ["rehearsed" if line["rehearsed"] else "closed form", f"{line['recomputed']} of {line['layers']}"]
    words += [f"{line['predicted']['reserved']:.3f}"]
    if "measured" in line:
        seen = line["measured"]
        words += [f"{seen['allocated']:.3f}", f"{seen['reserved']:.3f}", f"{seen['reserved'] / line['usable']:.1%}"]
    return "| " + " | ".join([*words, line["status"]]) + " |"


def report(out: Path) -> str:
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    names = "case, card, model, rows, rank, edge, plan, recomputed, predicted GiB, allocated, reserved, of usable, "
    text = [
        "| " + " | ".join(names.split(", ")) + " |",
        "|" + "---|" * 13,
        *map(_row, sorted(lines, key=lambda line: (int(line["id"]), line["rehearsed"]))),
    ]
    for rehearsed in (False, True):
        good = [line for line in lines if line["rehearsed"] == rehearsed and "measured" in line]
        shares = [line["measured"]["reserved"] / line["usable"] for line in good]
        if shares:
            ran_out = sum("out of memory" in line["status"] for line in lines if line["rehearsed"] == rehearsed)
            words = "after a rehearsal" if rehearsed else "closed form"
            least, mean = min(shares), sum(shares) / len(shares)
            ran = f"{words}: {len(good)} ran, {ran_out} out of memory"
            text.append(f"\n{ran}; reserved at least {least:.1%} of what is usable, {mean:.1%} on average")
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("checkpoints", type=Path)
    one.add_argument("out", type=Path)
    one.add_argument("--at-once", type=float, default=0.0)
    one = commands.add_parser("case")
    for name in ("case", "checkpoints", "rehearsed"):
        one.add_argument(name)
    one = commands.add_parser("report")
    one.add_argument("out", type=Path)
    args = parser.parse_args()
    if args.command == "run":
        run(args.checkpoints, args.out, args.at_once)
    elif args.command == "case":
        print("RESULT " + json.dumps(measure(json.loads(args.case), Path(args.checkpoints), bool(int(args.rehearsed)))))
    else:
        print(report(args.out))


if __name__ == "__main__":
    main()
