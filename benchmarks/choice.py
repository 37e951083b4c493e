"""Is the planner's choice the fastest of all layouts? Each layout is timed on a GPU that acts as the card.

    python -m benchmarks.choice rehearse OUT [--rows 8b,T4-1b] [--seconds 560]   rehearses the plans that OUT lacks
    python -m benchmarks.choice run OUT [--rows ...] [--seconds ...]             times the rows that OUT lacks
    python -m benchmarks.choice report OUT [OUT ...]                             Markdown
    python -m benchmarks.choice list                                             the rows

A row is a card, a model and a length: eight rows of exactly that length an optimizer step. Its layouts are every
micro-batch that divides eight times, in fours, how many of the layers are recomputed or offloaded (FAMILIES). The
choice is `plan()`'s for that card's memory and for the speed of the machine that is there, measured before anything
else (`Card.measure`), and once more after `rehearse`, where OUT holds it; both are timed as all others are, in the same
process, on the same model and trainer (choice_bench.py).

A layout is looked at shortly; then the FINALISTS fastest, the fastest in as much memory as a plan may use, and the
choices are timed again in passes, in one order and in the other: PASSES at least, and for PASSES_S, so that short steps
get more. The fastest pass of each counts, since a host that is busy elsewhere for a while only ever makes one longer;
what separates a layout's two fastest is the noise.

Not everything has to run. What keeps more than a layout that ran out of memory is not tried, nor what recomputes more
than one of its family that is SLOWER than the best already; the lines of OUT say so of each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.choice_bench import RAN_OUT, SETTLING, TIMED, Bench
from benchmarks.choice_report import MEMORY, label, report, verdict
from benchmarks.speed_processes import REPOSITORY, Clock, environment
from benchmarks.speed_report import lines
from benchmarks.speed_rows import EFFECTIVE, MODELS, OPTIMIZER, RANK
from benchmarks.speed_worker import Gpu
from llamanb import Card, Recipe
from llamanb import plan as make_plan
from llamanb.architecture import architecture
from llamanb.card import SPEEDS
from llamanb.layout import GIB, Plan
from llamanb.memory import outline, predict
from llamanb.planner import workload_of
from llamanb.speed import step_time
from llamanb.tape import CHECKPOINTED, HALVED, OFFLOADED, STORED

Layout = tuple[int, tuple[str, ...]]
"""Rows at once, and what becomes of each layer."""
FAMILIES = ((HALVED, STORED), (CHECKPOINTED, STORED), (CHECKPOINTED, HALVED), (OFFLOADED, STORED))
"""What becomes of the first layers, and of the others; each family from none of the former to all."""
FOURS = 4
FINALISTS, SLOWER = 5, 1.05
PASSES, PASSES_S = 3, 15.0
LEAST_S = 90.0
"""With less time left no row begins."""
MORE_KEPT = "not tried: one that keeps less ran out of memory"
TOO_SLOW = f"not timed: one that recomputes less is over {SLOWER - 1:.0%} slower than the best"


@dataclass(frozen=True)
class Row:
    model: str
    length: int
    card: str = ""
    """Known card that the GPU pretends to be; empty: all of the GPU."""

    @property
    def id(self) -> str:
        return f"{self.card.replace(' ', '') or 'whole'}-{self.model}-{self.length}"


ROWS = {
    row.id: row
    for row in [
        *(Row("8b", length, "T4") for length in (512, 2048, 4096)),
        *(Row("3b", length, "T4") for length in (1024, 4096)),
        *(Row("1b", length, "T4") for length in (512, 8192)),
        *(Row("8b", length, "RTX 4090") for length in (1024, 2048)),
        Row("1b", 2048),
    ]
}
DRY = Row("tiny", 32)
"""For a look at all the moving parts on a CPU."""


def rows(text: str) -> list[Row]:
    """Rows whose ids contain one of the words between commas; "dry" is the one for a CPU. Raises ValueError."""
    found = [row for row in ROWS.values() if any(word in row.id for word in text.split(","))]
    if not found and text != "dry":
        raise ValueError(f"no row has {text!r} in its name; there are: {', '.join(ROWS)}")
    return found or [DRY]


def family(depth: int, more: str, less: str) -> list[tuple[str, ...]]:
    """From none of the layers `more` to all, in fours; the first ones, as plans have it."""
    counts = [*range(0, depth, FOURS), depth]
    return [(more,) * count + (less,) * (depth - count) for count in counts]


def look_through(
    depth: int,
    run: Callable[[Layout], dict],
    likely: Callable[[Layout], bool] = lambda layout: True,
    known_s: float = math.inf,
) -> dict[Layout, dict]:
    """Every layout of a model of so many layers, with what became of it.

    Args:
        run: times a layout: {"status": TIMED, "step_s": ...}, or {"status": RAN_OUT}.
        likely: whether a layout is predicted to fit. It says where to begin; what fits is found by running.
        known_s: seconds of the best that is known already.
    """
    found: dict[Layout, dict] = {}

    def fits(layout: Layout) -> bool:
        micro, kinds = layout
        if layout not in found:
            less = [m for m, others in found if m < micro and others == kinds and found[m, kinds]["status"] == RAN_OUT]
            found[layout] = {"status": f"not tried: {less[0]} at once ran out of memory"} if less else run(layout)
        return found[layout]["status"] == TIMED

    for micro in (n for n in range(1, EFFECTIVE + 1) if EFFECTIVE % n == 0):
        for more, less in FAMILIES:
            layouts = [(micro, kinds) for kinds in family(depth, more, less)]
            at = next((i for i, one in enumerate(layouts) if likely(one)), len(layouts) - 1)
            while at and fits(layouts[at]):
                at -= 1
            while at < len(layouts) and not fits(layouts[at]):
                at += 1
            for one in layouts[at:]:
                best = min(known_s, *(line["step_s"] for line in found.values() if line["status"] == TIMED))
                if fits(one) and found[one]["step_s"] > SLOWER * best:
                    break
            for i, one in enumerate(layouts):
                found.setdefault(one, {"status": MORE_KEPT if i < at else TOO_SLOW})
    return found


def counted(kinds: tuple[str, ...]) -> list[list]:
    """[kind, layers] of each run of layers; `kinds_of` is the way back."""
    return [[kind, len(list(some))] for kind, some in itertools.groupby(kinds)]


def kinds_of(counts: list[list]) -> tuple[str, ...]:
    return tuple(kind for kind, count in counts for _ in range(count))


def card_of(row: Row, device: str) -> Card:
    """The card to plan for; this process's GPU is made to behave like it."""
    if device == "cpu":
        return Card("CPU", None)
    if not row.card:
        return Card.here()
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)  # a Hopper GPU would take it where those cards take flash
    return Card.pretend(row.card)


def planned(row: Row, card: Card) -> Plan:
    recipe = Recipe(
        model=MODELS.get(row.model, "tiny"),
        dataset="random",
        method="qlora-nf4",
        rank=RANK,
        effective_batch_size=EFFECTIVE,
        max_length=row.length,
        steps=SETTLING,
        optimizer=OPTIMIZER if card.is_gpu else "auto",
        eval_rows=0,
    )
    made = make_plan(recipe, card)
    return made if card.is_gpu else made.replace(fused=True, layers=(STORED,) * architecture(recipe.model).layers)


def laid_out(plan: Plan, layout: Layout) -> Plan:
    micro, kinds = layout
    return plan.replace(micro_batch_size=micro, accumulation=EFFECTIVE // micro, layers=kinds)


def timed(row: Row, bench: Bench, choices: dict[str, Plan]) -> list[dict]:
    """The lines of one row: each layout, and at the end the row. `choices`: plans by who chose, "plan" among them."""
    plan, begin = choices["plan"], time.monotonic()
    shape, limit_gib = architecture(plan.recipe.model), plan.limit_gib

    def work(layout: Layout):
        return workload_of(laid_out(plan, layout), shape)

    def likely(layout: Layout) -> bool:
        return not plan.card.is_gpu or outline(work(layout)).allocated <= plan.card.free_gib * GIB

    def screen(layout: Layout) -> dict:
        return bench.attempt(laid_out(plan, layout), bench.screen)

    chosen = {name: (one.micro_batch_size, one.layers) for name, one in choices.items()}
    first = {layout: screen(layout) for layout in dict.fromkeys(chosen.values())}
    known_s = min(line.get("step_s", math.inf) for line in first.values())
    found = look_through(shape.layers, lambda layout: first.get(layout) or screen(layout), likely, known_s)
    enumerated = set(found)
    found |= first
    runs = sorted((one for one in found if found[one]["status"] == TIMED), key=lambda one: found[one]["step_s"])
    allowed = [one for one in runs if not limit_gib or found[one]["reserved_gib"] <= limit_gib]
    final = [one for one in runs if one in (*runs[:FINALISTS], *allowed[:1], *chosen.values())]
    final_from = time.monotonic()
    for number in itertools.count():
        if number >= PASSES and time.monotonic() - final_from >= PASSES_S:
            break
        for layout in final[:: (1, -1)[number % 2]]:
            again = bench.attempt(laid_out(plan, layout), bench.final)
            found[layout].setdefault("final_s", []).append(again.get("step_s"))
    result = []
    for (micro, kinds), line in found.items():
        by = [name for name, layout in chosen.items() if layout == (micro, kinds)]
        said = step_time(work((micro, kinds)), plan.card, EFFECTIVE // micro) if line["status"] == TIMED else None
        more = {"enumerated": (micro, kinds) in enumerated, "chosen_by": by}
        if said:
            takes = predict(work((micro, kinds)))
            more |= {"predicted_s": said.step_s, "predicted_gpu_s": said.gpu_s, "predicted_launch_s": said.launch_s}
            more |= {f"predicted_{name}_gib": round(getattr(takes, name) / GIB, 4) for name in MEMORY}
        result.append({"kind": "layout", "row": row.id, "micro": micro, "layers": counted(kinds), **line, **more})
    facts = {"free_gib": plan.card.free_gib, "limit_gib": limit_gib, "took_s": round(time.monotonic() - begin, 1)}
    facts |= {speed: getattr(plan.card, speed) for speed in SPEEDS}
    return [*result, {"kind": "row", "row": row.id, **bench.facts, **facts}]


def group(some: list[Row], rehearsed: dict[str, Layout], device: str, clock: Clock) -> Iterator[list[dict]]:
    """The lines of each row of one model and one card, for which the model is loaded once."""
    from llamanb.pretend import release

    card = card_of(some[0], device)
    plans = {row: planned(row, card) for row in some}
    release()  # random weights are made whole before they are quantized
    bench = Bench(plans[some[0]], Gpu(device, None))
    card_of(some[0], device)
    for row, plan in plans.items():
        if clock.left < LEAST_S:
            return
        choices = {"plan": plan}
        if row.id in rehearsed:
            choices["rehearsed"] = laid_out(plan, rehearsed[row.id])
        yield timed(row, bench, choices)


def rehearsals(some: list[Row], device: str, clock: Clock) -> Iterator[list[dict]]:
    from llamanb import rehearse
    from llamanb.errors import LlamanbError

    card = card_of(some[0], device)
    for row in some:
        if clock.left < LEAST_S / 2:
            return
        line = {"kind": "rehearsed", "row": row.id}
        try:
            one = rehearse(planned(row, card))
            yield [line | {"micro": one.micro_batch_size, "layers": counted(one.layers), "predicted_s": one.step_s}]
        except LlamanbError as error:
            yield [line | {"failed": str(error)}]


def run(command: str, wanted: list[Row], out: Path, seconds: float, device: str) -> None:
    """A process for each model and card, whose lines go to `out` as a row is done."""
    clock, kind = Clock(seconds), {"run": "row", "rehearse": "rehearsed"}[command]
    known = lines(out) if out.exists() else []
    done = {line["row"] for line in known if line["kind"] == kind}
    rehearsed = {line["row"]: line for line in known if line["kind"] == "rehearsed" and "failed" not in line}
    waiting = [row for row in wanted if row.id not in done]
    kept = out.parent / "measured"  # and not where the user's own plans look for it
    if waiting and device == "cuda" and not kept.exists():
        measure = "from llamanb import Card; print(Card.measure())"
        subprocess.run([sys.executable, "-c", measure], env=machine(kept), cwd=REPOSITORY, check=True)
    for _, some in itertools.groupby(waiting, key=lambda row: (row.model, row.card)):
        if clock.left < LEAST_S:
            break
        given = {"command": command, "rows": [row.id for row in some], "seconds": clock.left, "device": device}
        given["rehearsed"] = {name: [line["micro"], line["layers"]] for name, line in rehearsed.items()}
        start = [sys.executable, "-m", "benchmarks.choice", "group", json.dumps(given)]
        with subprocess.Popen(start, stdout=subprocess.PIPE, text=True, env=machine(kept), cwd=REPOSITORY) as process:
            for line in process.stdout:
                if line.startswith("RESULT "):
                    found = json.loads(line.removeprefix("RESULT "))
                    with out.open("a", encoding="utf-8") as file:
                        file.writelines(json.dumps(one) + "\n" for one in found)
                    done.add(found[-1]["row"])
                    print(f"{seconds - clock.left:5.0f} s  {said(found)}", flush=True)
        if process.returncode:
            print(f"{', '.join(given['rows'])}: its process ended with code {process.returncode}", flush=True)
    left = [row.id for row in wanted if row.id not in done]
    print(f"missing: {', '.join(left)}; the same command again goes on" if left else "all rows are there", flush=True)


def machine(kept: Path) -> dict[str, str]:
    """The environment of a process that knows this machine's speed as it is kept there."""
    return environment() | {"XDG_CACHE_HOME": str(kept.absolute())}


def said(found: list[dict]) -> str:
    """A row as it is printed while the run goes on."""
    last = found[-1]
    if last["kind"] == "rehearsed":
        return f"{last['row']} rehearsed: {last.get('failed') or label(last)}"
    what = verdict(found)
    words = [f"{name} {label(one['line'])} {one['ratio']:.3f}" for name, one in what["choices"].items()]
    words.append(f"fastest {label(what['best'])} {what['best_s']:.4f} s")
    return f"{last['row']}, {last['took_s']} s: {'; '.join(words)}"


def of_group(given: dict) -> Iterator[list[dict]]:
    """What `run` asks a process of its own for."""
    known = ROWS | {DRY.id: DRY}
    some, clock = [known[name] for name in given["rows"]], Clock(given["seconds"])
    if given["command"] == "rehearse":
        return rehearsals(some, given["device"], clock)
    rehearsed = {name: (micro, kinds_of(counts)) for name, (micro, counts) in given["rehearsed"].items()}
    return group(some, rehearsed, given["device"], clock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("rehearse", "run"):
        one = commands.add_parser(name)
        one.add_argument("out", type=Path)
        one.add_argument("--rows", type=rows, default=list(ROWS.values()), help="words of their ids; dry: for a CPU")
        one.add_argument("--seconds", type=float, default=560.0, help="no row begins in the last ones of them")
        one.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    commands.add_parser("group").add_argument("given", type=json.loads)
    commands.add_parser("report").add_argument("out", type=Path, nargs="+")
    commands.add_parser("list")
    args = parser.parse_args()
    if args.command == "report":
        print(report([line for path in args.out for line in lines(path)]))
    elif args.command == "list":
        print("\n".join(ROWS))
    elif args.command == "group":
        for found in of_group(args.given):
            print("RESULT " + json.dumps(found), flush=True)
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        run(args.command, args.rows, args.out, args.seconds, args.device)


if __name__ == "__main__":
    main()
