"""Speed and memory of llamanb, trl and Unsloth on the same rows, on one GPU, in one run.

    python -m benchmarks.speed run ROWS OUT [--unsloth-site DIR] [--seconds 560]     appends JSON lines to OUT
    python -m benchmarks.speed report RAW [RAW ...]                                  Markdown, from such files
    python -m benchmarks.speed list [ROWS]                                           who would take part

ROWS are ids or beginnings of ids, in the order wanted: `16gb`, `8b-2x2048,1b`, `all`; `speed_rows.py` lists them.
Every stack runs in a process of its own, with packages of its own, on random weights of the real shape. The processes
take turns: a row first looks through Unsloth's grid (a few micro-batches of each setting), then its contestants are
timed in rounds, in one order and then in the other, one of them at a time. On the 16 GB rows each has the memory and
the attention kernels of a T4 and ballast fills the rest of the GPU (`speed_worker.py`).

Rows `rows-...` are of the uneven lengths of real instruction rows (`--lengths` takes others): llamanb as it plans, trl
with padded batches of every micro-batch, all over the same rows in the same order, real tokens counted.

What a run has not come to when its time is over is written to OUT as missing, and what a stack cannot do as failed.
Grids that an earlier OUT holds (`--screens`) are not looked through again.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
import traceback
from dataclasses import replace
from pathlib import Path

from benchmarks import speed_report
from benchmarks.speed_processes import Clock, StackError, Worker, Workers, environment
from benchmarks.speed_rows import EFFECTIVE, Contestant, Row, contestant, grid, real_rows, rows, same_shape, standing
from llamanb.card import Card

SCREEN_MICROS, SCREEN_S = 4, 4.0
"""Micro-batches of a setting of the grid, and seconds after which no further step begins."""
LEAST_S = 25.0
"""With less time left no turn begins."""
OVER = "the time was over"
WARM_STEPS = 2
"""Optimizer steps before anything is timed; one more where a step is one micro-batch, or rows are uneven."""
UNEVEN_STEPS, UNEVEN_PROFILED = 20, 4
"""Optimizer steps timed, at least, and profiled in each round, where steps differ by what rows they have."""


class Run:
    """One run: its rows, its processes, and where its results go."""

    def __init__(self, args: argparse.Namespace, clock: Clock):
        self.args, self.clock = args, clock
        self.out = args.out
        self.log = args.out.with_suffix(".log").open("a")
        self.workers = Workers(self._start, clock)
        self.machine: dict = {}
        self.screens = [line for path in args.screens for line in speed_report.lines(path) if line["kind"] == "screen"]
        self.too_many: dict[tuple, int] = {}
        """Tokens of the smallest micro-batch that ran out of memory, by process."""
        self._told: set[tuple] = set()

    def write(self, kind: str, **fields) -> None:
        line = {"kind": kind, **fields, "at_s": round(self.args.seconds - self.clock.left, 1)}
        with self.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        try:
            print(speed_report.one_line(line), flush=True)
        except Exception as error:  # it is written; a line that cannot be shown stops no run
            print(f"{kind} {fields.get('row', '')} {fields.get('contestant', '')}: {error!r}", flush=True)

    # processes

    def key(self, row: Row, one: Contestant, place: int = 0) -> tuple:
        """What a process holds. llamanb loads a model for each plan, so each of its contestants has a process as long
        as rounds alternate; Unsloth's checkpointing is one process's, and its `auto` adapts to one setting."""
        if one.stack == "unsloth":
            own = (row.length, one.micro) if one.mode == "auto" else ()
            return ("unsloth", row.model, row.card, one.mode, *own)
        return (one.stack, row.model, row.card, place if self.args.rounds > 1 else 0)

    def _start(self, key: tuple) -> Worker:
        stack, model, card, *more = key
        limit_gib = Card.known(card).free_gib if card and self.args.device == "cuda" else None
        lengths = [row.length for row in self.args.rows if (row.model, row.card) == (model, card)]
        settings = {
            "stack": stack,
            "model": model,
            "card": card,
            "limit_gib": limit_gib,
            "device": self.args.device,
            "checkpoint": str(self.args.checkpoints.resolve() / model),
            "mode": more[0] if stack == "unsloth" else "",
            "longest": more[1] if len(more) > 1 else max(lengths),
        }
        return Worker(settings, self.args.unsloth_site if stack == "unsloth" else "", self.log)

    def prepare(self) -> bool:
        """Rates of this GPU and checkpoints; the first row's processes import meanwhile."""
        models = sorted({row.model for row in self.args.rows}) if self.stacks - {"llamanb"} else []
        folder = str(self.args.checkpoints.resolve())
        command = [sys.executable, "-m", "benchmarks.speed_prepare", folder, ",".join(models)]
        done = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment())
        self.warm(self.args.rows[0])
        timer = threading.Timer(max(1.0, self.clock.left), done.kill)
        timer.start()
        output, _ = done.communicate()
        timer.cancel()
        found = [line[7:] for line in output.splitlines() if line.startswith("RESULT ")]
        if not found:
            self.write("failed", row="", contestant="", stage="prepare", why=f"code {done.returncode}; see the log")
            return False
        self.machine = json.loads(found[0])
        self.write("machine", **self.machine)
        return True

    @property
    def stacks(self) -> set[str]:
        """All that may take part: what an earlier run looked through is timed again where it was best."""
        found = [one for row in self.args.rows for one in [*self.entrants(row), *grid(row)]]
        return {one.stack for one in found if self.wanted(one)}

    def warm(self, row: Row) -> None:
        """Starts what a row needs, and ends what holds another model or card, or was for one setting of another row."""
        keys = [self.key(row, one, place) for place, one in self.placed(self.entrants(row))]
        keys += [self.key(row, one) for one in [*self.to_screen(row), *self.best(row)]]
        self.workers.keep_only(lambda key: key in keys or (key[1:3] == (row.model, row.card) and key[3] != "auto"))
        self.workers.warm(list(dict.fromkeys(keys)))

    # who takes part

    def wanted(self, one: Contestant) -> bool:
        only = self.args.only
        return not only or one.stack in only or one.label in only

    def entrants(self, row: Row) -> list[Contestant]:
        return [one for one in [*standing(row), *self.args.add] if self.wanted(one)]

    @staticmethod
    def placed(entrants: list[Contestant]) -> list[tuple[int, Contestant]]:
        """Each contestant with its place among those of its stack."""
        return [(sum(o.stack == one.stack for o in entrants[:i]), one) for i, one in enumerate(entrants)]

    def to_screen(self, row: Row) -> list[Contestant]:
        """Settings of the grid that no earlier run has looked at."""
        if self.args.no_screen or (self.args.only and "unsloth" not in self.args.only):
            return []
        seen = {line["contestant"] for line in self.screens if line["row"] == row.id}
        return [one for one in grid(row) if one.label not in seen]

    def best(self, row: Row) -> list[Contestant]:
        """The settings that were fastest in the grid, of all and with the row's micro-batch, by what the row is judged
        by."""
        seen = [line for line in self.screens if line["row"] == row.id and "micro_s" in line]
        same = [line for line in seen if same_shape(row, contestant(line["contestant"]))]
        measures = speed_report.measures(row, self.ratios)
        fastest = [min(some, key=measure)["contestant"] for some in (seen, same) if some for measure in measures]
        return [contestant(label) for label in dict.fromkeys(fastest)]

    @property
    def ratios(self):
        return speed_report.ratios(self.machine)

    # turns

    @staticmethod
    def session(row: Row, one: Contestant, micro: int | None, effective: int, steps: int) -> dict:
        """`steps`: how many it may train, warm-up and all, before its rows come round again."""
        return {
            "length": row.length,
            "micro": micro,
            "effective": effective,
            "rows": 512 if row.lengths else min(effective * steps, 512),
            "lengths": row.lengths,
            "warm_steps": WARM_STEPS + (effective == micro or bool(row.lengths)),
            "options": one.options if one.stack == "llamanb" else {},
        }

    def screen(self, row: Row) -> None:
        for one in self.to_screen(row):
            if self.clock.left < LEAST_S:
                self.write("missing", row=row.id, contestant=one.label, stage="screen", why=OVER)
                continue
            key, tokens = self.key(row, one), one.micro * row.length
            if tokens >= self.too_many.get(key, math.inf):
                why = f"micro-batches of {self.too_many[key]} tokens ran out of memory"
                self._screened(row, one, status="skipped", why=why)
                continue
            accumulation = 2 if tokens < 8192 else 1
            effective = one.micro * accumulation
            session = {**self.session(row, one, one.micro, effective, 12), "warm_steps": 3 - accumulation}
            block = {"micro_steps": SCREEN_MICROS, "at_most_s": SCREEN_S, "profile": int(bool(row.card))}
            try:
                result = self.workers.turn(key, session, block, open_s=120, block_s=90)
                self._screened(row, one, **{**result, "status": "ok", "accumulation": accumulation})
            except StackError as error:
                if self.clock.left < 2:
                    self.write("missing", row=row.id, contestant=one.label, stage="screen", why=OVER)
                    return
                if error.out_of_memory:
                    self.too_many[key] = tokens
                    self.workers.warm([key])  # imports while others are measured
                self._screened(row, one, status="out of memory" if error.out_of_memory else "failed", why=str(error))

    def _screened(self, row: Row, one: Contestant, **found) -> None:
        line = {"row": row.id, "contestant": one.label, **found}
        self.screens.append({"kind": "screen", **line})
        self.write("screen", **line)

    def rounds(self, row: Row) -> None:
        entrants = self.entrants(row)
        if not self.args.only or "unsloth" in self.args.only:
            entrants += [one for one in self.best(row) if one.label not in [e.label for e in entrants]]
        placed = self.placed(entrants)
        micros = {one.label: one.micro or row.micro or 2 for one in entrants if one.stack != "llamanb"}
        out: set[str] = set()
        for number in range(self.args.rounds):
            for place, one in placed if number % 2 == 0 else placed[::-1]:
                if one.label in out:
                    continue
                stage = f"round {number + 1}"
                if self.clock.left < LEAST_S:
                    self.write("missing", row=row.id, contestant=one.label, stage=stage, why=OVER)
                elif not self._block(row, one, place, number, micros):
                    out.add(one.label)

    def _block(self, row: Row, one: Contestant, place: int, number: int, micros: dict) -> bool:
        key = self.key(row, one, place)
        micro = micros.get(one.label, one.micro or row.micro)
        effective = max(EFFECTIVE, micro or 0)
        each = -(-self.args.micro_steps // self.args.rounds)
        session = self.session(row, one, micro, effective, 8 + self.args.rounds * each)
        block = {"micro_steps": each, "at_most_s": self.args.block_s, "profile": 1}
        if row.lengths:  # whole steps, as many for everybody: the same rows
            steps = -(-UNEVEN_STEPS // self.args.rounds)
            block |= {"steps": steps, "at_most_s": 3 * self.args.block_s, "profile": UNEVEN_PROFILED}
        try:
            result = self.workers.turn(key, session, block)
        except StackError as error:
            if self.clock.left < 2:
                self.write("missing", row=row.id, contestant=one.label, stage=f"round {number + 1}", why=OVER)
                return False
            self.write("failed", row=row.id, contestant=one.label, stage=f"round {number + 1}", why=str(error))
            if error.out_of_memory and one.stack == "trl" and row.micro is one.micro is None and micro > 1:
                micros[one.label] = 1
                return self._block(row, one, place, number, micros)
            return False
        if key not in self._told:
            self._told.add(key)
            self.write("stack", stack=one.stack, versions=self.workers.versions(key))
        self.write("block", row=row.id, contestant=one.label, round=number + 1, length=row.length, **result)
        return True

    def measure(self) -> None:
        if not self.prepare():
            return
        for row in self.args.rows:
            if self.clock.left < LEAST_S:
                self.write("missing", row=row.id, contestant="", stage="row", why=OVER)
                continue
            try:
                self.warm(row)
                self.screen(row)
                if not self.args.screen_only:
                    self.rounds(row)
            except Exception as error:
                traceback.print_exc(file=self.log)
                self.write("failed", row=row.id, contestant="", stage="row", why=repr(error))

    def end(self) -> None:
        self.workers.end()
        self.log.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("rows", type=rows)
    one.add_argument("out", type=Path)
    one.add_argument("--unsloth-site", default="", help="folder with Unsloth and the packages it wants")
    one.add_argument("--checkpoints", type=Path, default=Path(tempfile.gettempdir(), "speed-checkpoints"))
    one.add_argument("--seconds", type=float, default=560.0, help="of the whole run")
    one.add_argument("--only", action="append", default=[], help="a stack or a contestant; may be given again")
    one.add_argument("--add", type=contestant, action="append", default=[], help="one more contestant")
    one.add_argument("--rounds", type=int, default=2)
    one.add_argument("--lengths", type=Path, help="rows' lengths, as grids/instruction_rows.json has them")
    one.add_argument("--micro-steps", type=int, default=20, help="micro-batches timed of each contestant, at least")
    one.add_argument("--block-s", type=float, default=15.0, help="after which no further step of a turn begins")
    one.add_argument("--screens", type=Path, action="append", default=[], help="an earlier OUT, for its grids")
    one.add_argument("--no-screen", action="store_true")
    one.add_argument("--screen-only", action="store_true")
    one.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    one = commands.add_parser("report")
    one.add_argument("raw", type=Path, nargs="+")
    one = commands.add_parser("list")
    one.add_argument("rows", type=rows, nargs="?", default=rows("all"))
    args = parser.parse_args()
    if args.command == "report":
        print(speed_report.report([line for path in args.raw for line in speed_report.lines(path)]))
    elif args.command == "list":
        for row in args.rows:
            print(row.id, *(one.label for one in standing(row)), "| grid:", *(one.label for one in grid(row)))
    else:
        if args.lengths:
            path, longest = str(args.lengths.resolve()), max(tokens for tokens, _ in real_rows(args.lengths))
            args.rows = [replace(row, lengths=path, length=longest) if row.lengths else row for row in args.rows]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        run = Run(args, Clock(args.seconds))
        try:
            run.measure()
        finally:
            run.end()


if __name__ == "__main__":
    main()
