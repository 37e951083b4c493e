"""Weights that wait in host memory: what a model takes, and how long, beside the same with all weights on the card.

    python -m benchmarks.streaming run OUT [--rows 70b-24,8b-4]
    python -m benchmarks.streaming report OUT

Random weights of the real shape, made in place and quantized one by one. Each row is planned for a small card, trained
on a big GPU that is held to it (memory, dtype, attention kernels), and then once more without that limit, all weights
resident and every layer recomputed, with as many rows at once. Rows `slow` copy no faster than they say, so that the
prediction for other links can be checked, rows `disk` have so little host memory that some layers wait on disk, and
rows `rehearsed` are planned after a rehearsal; they have no resident turn. 70B takes 35 GiB of host memory and about
two minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from llamanb import Card, Recipe, disk, rehearse
from llamanb.architecture import architecture
from llamanb.layout import GIB, Plan
from llamanb.planner import search

EIGHT, SEVENTY = "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.3-70B-Instruct"
ROWS: dict[str, dict] = {
    "70b-24": {"model": SEVENTY, "card": "RTX 4090", "rank": 16, "length": 2048, "batch": 4},
    "70b-16": {"model": SEVENTY, "card": "T4", "rank": 8, "length": 2048, "batch": 4},
    "70b-16-rehearsed": {"model": SEVENTY, "card": "T4", "rank": 8, "length": 2048, "batch": 4, "rehearse": True},
    "70b-slow": {"model": SEVENTY, "card": "RTX 4090", "rank": 16, "length": 2048, "batch": 4, "link": 8.0},
    "8b-8": {"model": EIGHT, "card": "T4", "free_gib": 7.4, "rank": 16, "length": 2048, "batch": 16},
    "8b-4": {"model": EIGHT, "card": "T4", "free_gib": 3.65, "rank": 16, "length": 512, "batch": 16},
    "8b-slow": {"model": EIGHT, "card": "T4", "free_gib": 5.0, "rank": 16, "length": 2048, "batch": 4, "link": 4.0},
    "8b-disk": {"model": EIGHT, "card": "T4", "free_gib": 5.0, "rank": 16, "length": 2048, "batch": 4, "host_gib": 3.8},
}
"""`free_gib`: what there is of the card, where that is less than all; `link`: GB/s that copies are held to; `host_gib`:
of host memory, what has no room there waits on disk."""
STEPS = 4


def plans(row: dict, card: Card, whole: Card) -> tuple[Plan, Plan]:
    """Streamed on the small card, and resident on the whole GPU with the same micro-batch."""
    shape = architecture(row["model"])
    recipe = Recipe(
        model=row["model"],
        max_length=row["length"],
        rank=row["rank"],
        effective_batch_size=row["batch"],
        precision=card.choose_precision("auto").dtype,
        weights="streamed",
        eval_rows=0,
    )
    link = row.get("link")
    card = replace(card, **{name: row[name] for name in ("free_gib", "host_gib") if name in row})
    card = replace(card, disk_gbs=disk.measured())
    made = search(recipe, replace(card, host_link_gbs=link) if link else card, shape, force=True)
    same = recipe.replace(weights="resident", checkpointing="all", micro_batch_size=made.micro_batch_size)
    kept = search(same, whole, shape, force=True)
    return made, kept.replace(kernel=made.kernel, attention=made.attention)


def measure(name: str, resident: bool) -> dict:
    """One training in this process."""
    import torch

    from llamanb.pretend import release

    row, begin = ROWS[name], time.monotonic()
    whole = Card.present()
    card = Card.pretend(row["card"])
    torch.backends.cuda.enable_cudnn_sdp(False)
    made, kept = plans(row, card, whole)
    if resident:
        release()
    elif "free_gib" in row:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(row["free_gib"] * GIB / total)
    if row.get("rehearse"):
        made = rehearse(made)
    plan = kept if resident else made
    found = trained(plan, None if resident else row.get("link"))
    tokens = plan.micro_batch_size * plan.accumulation * plan.length
    return {
        "row": name,
        "resident": resident,
        "gpu": torch.cuda.get_device_name(),
        "micro_batch": plan.micro_batch_size,
        "layers": {kind: plan.layers.count(kind) for kind in dict.fromkeys(plan.layers)},
        "streamed": len(plan.streamed),
        "host_gib": round(plan.streamed_gib, 2),
        "on_disk": len(plan.on_disk),
        "disk_gbs": plan.on_disk and [plan.card.disk_gbs or disk.GBS, disk.measured()],
        "planned": {"reserved": round(plan.needs_gib, 3), "step_s": plan.step_s and round(plan.step_s, 3)},
        "stall_planned_s": plan.time and round(plan.time.stall_s, 3),
        **found,
        "tokens_s": found["step_s"] and round(tokens / found["step_s"], 1),
        "wall_s": round(time.monotonic() - begin, 1),
    }


def trained(plan: Plan, link: float | None, steps: int = STEPS) -> dict:
    """Peaks and times of so many steps of random rows with random weights."""
    import tempfile

    import torch

    from llamanb.data import TrainingData
    from llamanb.model import attach_adapters
    from llamanb.model.load import piecewise_model, prepared, random_config
    from llamanb.model.streamed import StreamedLayers
    from llamanb.quiet import quiet_libraries
    from llamanb.rehearsal import _tokenizer, random_rows
    from llamanb.training.trainer import build_trainer
    from llamanb.watch.instants import Instants

    shape, tokenizer = architecture(plan.recipe.model), _tokenizer()
    plan = plan.replace(recipe=plan.recipe.replace(steps=steps))
    if link:
        StreamedLayers._copy = staticmethod(_held_to(link))
    rows = random_rows(shape.vocabulary, plan.length, plan.micro_batch_size, steps * plan.recipe.effective_batch_size)
    data = TrainingData("random", "token ids", tokenizer, rows, [], [], [])
    instants, begin = Instants(), time.monotonic()
    with quiet_libraries(), tempfile.TemporaryDirectory() as folder:
        try:
            model = piecewise_model(plan, random_config(shape), None)
            model = attach_adapters(prepared(model, plan, tokenizer), plan.recipe)
            loaded_s = time.monotonic() - begin
            torch.cuda.empty_cache()
            trainer = build_trainer(plan, model, data, Path(folder), [])
            trainer.args.train_sampling_strategy = "sequential"
            instants.attach(trainer)
            streamed = getattr(model.get_base_model(), "streamed", None)
            trainer.train()
        except torch.OutOfMemoryError as error:
            return {"status": f"out of memory: {str(error)[:600]}", "step_s": None}
    micro, optimizer = instants.times(plan.accumulation)
    stalls = [line["stall_s"] for line in trainer.state.log_history if "stall_s" in line]
    return {
        "status": "ok",
        "loaded_s": round(loaded_s, 1),
        "allocated": round(max(instants.peaks.values()) / GIB, 3),
        "reserved": round(instants.reserved / GIB, 3),
        "step_s": round(plan.accumulation * micro + optimizer, 3),
        "stall_s": round(sum(stalls[1:]) / max(1, len(stalls) - 1), 3) if streamed else None,
        "copied_gb_a_step": round(streamed.copied / steps / 1e9, 1) if streamed else None,
        "read_gb_a_step": round(streamed.staging.read / steps / 1e9, 1) if streamed and streamed.staging else None,
        "pinned": not streamed.refused if streamed else None,
        "losses": [round(line["loss"], 5) for line in trainer.state.log_history if "loss" in line],
    }


def _held_to(link: float):
    """A copy that takes as long as it would over a link of so many GB/s; the GPU waits, not the host."""
    import torch

    cycles = 100_000_000

    def seconds(work) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    memory, card = torch.empty(2**28, dtype=torch.uint8).pin_memory(), torch.empty(2**28, dtype=torch.uint8).cuda()
    for _ in range(2):  # the first time warms up
        per_s = cycles / seconds(lambda: torch.cuda._sleep(cycles))
        present = memory.numel() / seconds(lambda: card.copy_(memory, non_blocking=True))

    def copy(buffer, memory) -> None:
        buffer.copy_(memory, non_blocking=True)
        left = memory.numel() * (1 / link / 1e9 - 1 / present)
        torch.cuda._sleep(int(max(0, left) * per_s))

    return copy


def run(out: Path, names: list[str]) -> None:
    for name in names:
        for resident in (False, True)[: 1 if {"link", "host_gib", "rehearse"} & ROWS[name].keys() else 2]:
            command = [sys.executable, "-m", "benchmarks.streaming", "one", name, str(int(resident))]
            done = subprocess.run(command, capture_output=True, text=True)
            found = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            line = json.loads(found[0]) if found else {"row": name, "resident": resident, "status": done.stderr[-800:]}
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


def report(out: Path) -> str:
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    header = (
        "row, weights, micro-batch, layers, planned GiB, reserved, planned s, step s, stalls s, tokens/s, of resident"
    )
    text = [f"| {' | '.join(header.split(', '))} |", "|" + "---|" * 11]
    speeds = {line["row"]: line.get("tokens_s") for line in lines if line["resident"]}
    for line in lines:
        where = f", {line['on_disk']} from disk" if line.get("on_disk") else ""
        cells = [line["row"], "resident" if line["resident"] else f"{line.get('streamed')} streamed{where}"]
        if line["status"] != "ok":
            text.append(f"| {' | '.join([*cells, line['status'][:120]])} |" + " |" * 8)
            continue
        kinds = ", ".join(f"{count} {kind}" for kind, count in line["layers"].items())
        share = f"{line['tokens_s'] / speeds[line['row']]:.0%}" if speeds.get(line["row"]) else ""
        planned = line["planned"]
        figures = [planned["reserved"], line["reserved"], planned["step_s"], line["step_s"], line["stall_s"]]
        shown = ["" if figure is None else str(figure) for figure in [*figures, line["tokens_s"]]]
        text.append(f"| {' | '.join([*cells, str(line['micro_batch']), kinds, *shown, share])} |")
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("out", type=Path)
    one.add_argument("--rows", default=",".join(ROWS))
    one = commands.add_parser("one")
    one.add_argument("name", choices=ROWS)
    one.add_argument("resident", type=int)
    one = commands.add_parser("report")
    one.add_argument("out", type=Path)
    args = parser.parse_args()
    if args.command == "run":
        run(args.out, args.rows.split(","))
    elif args.command == "one":
        print("RESULT " + json.dumps(measure(args.name, bool(args.resident))))
    else:
        print(report(args.out))


if __name__ == "__main__":
    main()
