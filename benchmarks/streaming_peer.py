"""8B with streamed weights, by llamanb and by Soup (soup-cli), in turn on one GPU and held to the same memory.

    python -m benchmarks.streaming_peer run OUT --soup-site FOLDER --checkpoint FOLDER [--seconds 180]
    python -m benchmarks.streaming_peer report OUT

Rows of LENGTH tokens, adapters of rank 16 on all linear layers over nf4, one micro-batch an optimizer step. Soup runs
from its own YAML through its own entry point, with its defaults but for what `streaming_soup.OPTIONS` adds; its process
is held to the same memory, and a callback of transformers' Trainer reads its times and peaks. It reads --checkpoint, a
Llama of 8B's shape; llamanb makes random weights of that shape in place. All processes import before the first turn and
then wait. The first turn of Soup also writes its cache of layers, about 6 GB, which its later turns read.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.speed_processes import Clock, environment
from benchmarks.streaming_soup import (
    LENGTH,
    OPTIONS,
    RANK,
    STEPS,
    VRAM_GIB,
    hold,
    run_soup,
    versions,
    wait_for_turn,
    write_soup,
)

IMPORTS_S, LONGEST_S, LEAST_S = 60, 120, 12
"""Most seconds that imports are waited for; after which a turn is given up; and without which none begins."""
LLAMANB, SOUP, CHUNKS, SCALES, LAYERS = "llamanb", *OPTIONS
TURNS = [(LLAMANB, 4), (SOUP, 1), (CHUNKS, 4), (LLAMANB, 1), (SCALES, 1), (SCALES, 2), (LAYERS, 1), (SOUP, 2)]
TURNS += [(CHUNKS, 8), (LLAMANB, 8), (SCALES, 4), (LLAMANB, 2), (CHUNKS, 2), (SOUP, 4), (SOUP, 8)]
"""Contestants and their rows a pass: what matters most comes first, should the time not suffice for all."""


class Turn:
    """One contestant's process, which imports, says that it is `ready` and waits for its turn."""

    def __init__(self, name: str, rows: int, work: Path, checkpoint: Path, soup_site: str):
        self.name, self.rows = name, rows
        self.folder = Path(tempfile.mkdtemp(dir=work))
        env = environment()
        if name != LLAMANB:
            write_soup(self.folder, checkpoint, name, rows)
            env = environment(os.pathsep.join(filter(None, [soup_site, os.environ.get("PYTHONPATH")])))
            # what Soup sets itself, too late in a process that has already imported torch; its home holds its cache
            env |= {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "HOME": str(work), "COLUMNS": "200"}
        with (self.folder / "log").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.streaming_peer", "one", name, str(rows)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=env,
            )

    @property
    def waits(self) -> bool:
        return (self.folder / "ready").exists() or self._process.poll() is not None

    def take(self, limit_s: float) -> dict:
        """Lets it run, and says what came of it."""
        begin, ended = time.monotonic(), True
        try:
            self._process.communicate(b"go\n", timeout=limit_s)
        except subprocess.TimeoutExpired:
            ended = False
        self.end()
        found = self.folder / "result.json"
        result = json.loads(found.read_text()) if found.exists() else {"status": self._why(ended, limit_s)}
        return {**result, "wall_s": round(time.monotonic() - begin, 1)}

    def _why(self, ended: bool, limit_s: float) -> str:
        if not ended:
            return f"no result within {limit_s:.0f} s"
        errors = [line for line in self.log.splitlines() if "Error" in line]
        error = " ".join((errors or [self.log[-300:]])[-1].strip(" │").split()) or "ended without a word"
        return f"out of memory: {error}" if re.search("OutOfMemoryError|out of memory", self.log) else error

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def run_llamanb(folder: Path, rows: int) -> None:
    """llamanb's own training, planned for a card with VRAM_GIB free."""
    from benchmarks.streaming import trained
    from llamanb import Card

    for name in ("llamanb.training.trainer", "bitsandbytes", "datasets", "peft"):
        importlib.import_module(name)
    wait_for_turn(folder)
    plan = our_plan(Card.present(), rows)
    hold()
    found = trained(plan, None, STEPS)
    planned = {"reserved": round(plan.needs_gib, 3), "step_s": plan.step_s and round(plan.step_s, 3)}
    layers = {kind: plan.layers.count(kind) for kind in dict.fromkeys(plan.layers)}
    found |= {"dtype": plan.dtype, "tokens": rows * LENGTH, "planned": planned, "layers": layers}
    (folder / "result.json").write_text(json.dumps(found | {"versions": versions("transformers", "peft", "torch")}))


def our_plan(card, rows: int):
    """The plan for a card of which VRAM_GIB is free."""
    from dataclasses import replace

    from benchmarks.streaming import EIGHT
    from llamanb import Recipe
    from llamanb.architecture import architecture
    from llamanb.planner import search

    recipe = Recipe(
        model=EIGHT,
        max_length=LENGTH,
        rank=RANK,
        effective_batch_size=rows,
        micro_batch_size=rows,
        weights="streamed",
        eval_rows=0,
    )
    return search(recipe, replace(card, free_gib=VRAM_GIB), architecture(EIGHT), force=True)


def run(out: Path, checkpoint: Path, soup_site: str, seconds: float, turns: list[tuple[str, int]]) -> None:
    """Lets contestants take their turns; adds a line for each to `out`, and what they said to a log beside it."""
    clock, too_many = Clock(seconds), {}
    with tempfile.TemporaryDirectory() as work:
        waiting = [Turn(name, rows, Path(work), checkpoint.resolve(), soup_site) for name, rows in turns]
        try:
            while not all(turn.waits for turn in waiting) and clock.left > seconds - IMPORTS_S:
                time.sleep(0.2)
            for turn in waiting:
                if turn.rows > too_many.get(turn.name, turn.rows):
                    result = {"status": f"not run: {too_many[turn.name]} rows were too many"}
                elif clock.left < LEAST_S:
                    result = {"status": "not run: no time left"}
                else:
                    result = turn.take(min(LONGEST_S, clock.left))
                    with out.with_suffix(".log").open("a") as file:
                        file.write(f"== {turn.name}, {turn.rows} rows\n{turn.log}\n")
                if result["status"].startswith("out of memory"):
                    too_many[turn.name] = turn.rows
                line = {"contestant": turn.name, "rows": turn.rows, **result}
                with out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)
        finally:
            for turn in waiting:
                turn.end()


def report(out: Path) -> str:
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    for line in lines:
        line["speed"] = line["tokens"] / line["step_s"] if line.get("step_s") else 0.0
    peer = max((line["speed"] for line in lines if line["contestant"] != LLAMANB), default=0.0)
    header = "contestant, rows a pass, dtype, allocated GiB, reserved GiB, s a step, tokens/s, of Soup's best"
    text = [f"| {' | '.join(header.split(', '))} |", "|" + "---|" * 8]
    for line in sorted(lines, key=lambda line: (line["contestant"] != LLAMANB, line["contestant"], line["rows"])):
        cells = [line["contestant"], line["rows"]]
        if line["speed"]:
            share = f"{line['speed'] / peer:.2f}×" if peer else ""
            cells += [line["dtype"], line["allocated"], line["reserved"], line["step_s"], f"{line['speed']:.0f}", share]
        else:
            cells += [line["status"][:160].replace("|", "/"), *[""] * 5]
        text.append(f"| {' | '.join(map(str, cells))} |")
    ours = max((line["speed"] for line in lines if line["contestant"] == LLAMANB), default=0.0)
    if ours and peer:
        text += ["", f"Best of each within {VRAM_GIB} GiB: {ours:.0f} and {peer:.0f} tokens/s, {ours / peer:.1f}×."]
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("out", type=Path)
    one.add_argument("--checkpoint", type=Path, required=True)
    one.add_argument("--soup-site", default="", help="packages that come before all others in Soup's processes")
    one.add_argument("--seconds", type=float, default=180)
    one.add_argument("--turns", type=int, default=len(TURNS), help="how many, from the first")
    one = commands.add_parser("one")
    one.add_argument("name", choices=[LLAMANB, *OPTIONS])
    one.add_argument("rows", type=int)
    one = commands.add_parser("report")
    one.add_argument("out", type=Path)
    args = parser.parse_args()
    if args.command == "run":
        run(args.out, args.checkpoint, args.soup_site, args.seconds, TURNS[: args.turns])
    elif args.command == "report":
        print(report(args.out))
    elif args.name == LLAMANB:
        run_llamanb(Path.cwd(), args.rows)
    else:
        run_soup(Path.cwd())


if __name__ == "__main__":
    main()
