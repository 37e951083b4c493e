"""Predicted memory and time against a real GPU, on grids written down before they are measured.

    python -m benchmarks.memory grid 1 64 > benchmarks/grids/memory_1.jsonl     a seeded grid with its predictions;
                                                                                --fused: of fused layers alone
    python -m benchmarks.memory run GRID CHECKPOINTS OUT [--rehearse] [--at-once GIB]   measure what OUT lacks
    python -m benchmarks.memory report GRID MEASURED                            errors, by what dominates

Each row runs in a process of its own, through the project's own loading and trainer, three optimizer steps at least;
its allocator is capped a little over the prediction so that rows can run beside each other (`--at-once`: GiB of the GPU
to fill; 0 runs one row at a time, which times need). Checkpoints: `python -m tests.checkpoints 8b CHECKPOINTS/8b wide`,
and so for 3b and 1b: random, and so wide that with int8 every column of the down projection meets an outlier, the case
that is planned for.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from llamanb import Card, Recipe
from llamanb.architecture import architecture
from llamanb.layout import EXPANDED_ATTENTION, GIB, Plan
from llamanb.memory import Memory, predict
from llamanb.planner import search, workload
from llamanb.search import ways
from llamanb.tape import CHECKPOINTED, OFFLOADED, STORED, Workload

MODELS = {
    "1b": "meta-llama/Llama-3.2-1B-Instruct",
    "3b": "meta-llama/Llama-3.2-3B-Instruct",
    "8b": "meta-llama/Llama-3.1-8B-Instruct",
}
CHOICES = {
    "model": list(MODELS),
    "method": ["qlora-nf4", "qlora-nf4", "qlora-nf4", "qlora-int8", "lora"],
    "double_quant": [True, True, False],
    "length": [256, 512, 777, 1024, 2048, 4096, 8192],
    "rows": [1, 2, 4, 8],
    "rank": [8, 16, 32, 64, 128],
    "targets": ["all-linear", "all-linear", "attention"],
    "layout": ["none", "some", "all", "all", "offloaded"],
    "kernel": ["flash", "cudnn", "memory-efficient", "memory-efficient", "math"],
    "optimizer": ["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_8bit"],
    "dropout": [0.0, 0.0, 0.0, 0.05],
    "accumulation": [1, 2, 4],
    "expandable": [True, True, True, False],
}
MOST_GIB = 40
"""Rows that need more are drawn again."""
H200 = Card.known("H200")
TWO_THREADS = ("1", "2", "3")
"""Grids measured while the backward had a thread, and a cuBLAS workspace, of its own, and adapters were updated one by
one."""
STEPS = 3


def grid(seed: int, count: int, *, fused: bool = False) -> list[dict]:
    """`count` rows drawn by `seed`, each with its prediction for an H200."""
    source, rows = random.Random(seed), []
    while len(rows) < count:
        row = {name: source.choice(values) for name, values in CHOICES.items()} | ({"fused": True} if fused else {})
        row["id"] = f"{seed}-{len(rows) + 1}"
        if fused and (row["dropout"] or row["method"] == "qlora-int8" or row["kernel"] in ("math", "cudnn")):
            continue
        scores = row["rows"] * row["length"] ** 2
        if row["kernel"] == "math" and scores > 2 * 1024**2:
            continue  # the math kernel keeps every score
        row["layout"] = _layers(row, source)
        memory = predict(work_of(row, H200), expandable=row["expandable"])
        if memory.reserved > MOST_GIB * GIB:
            continue
        rows.append({**row, "predicted": told(memory)})
    return rows


def _layers(row: dict, source: random.Random) -> dict[str, int]:
    depth = architecture(MODELS[row["model"]]).layers
    if row.get("fused") and row["layout"] == "some":
        return dict(Counter(source.choice(ways(depth, fused=True)[1:-1])))
    some = source.randrange(1, depth)
    return {
        "none": {STORED: depth},
        "some": {CHECKPOINTED: some, STORED: depth - some},
        "all": {CHECKPOINTED: depth},
        "offloaded": {OFFLOADED: depth},
    }[row["layout"]]


def told(memory: Memory) -> dict[str, float]:
    """A prediction as GiB by what can be measured."""
    return {
        **{part: round(size / GIB, 4) for part, size in memory.parts.items()},
        "allocated": round(memory.allocated / GIB, 4),
        "reserved": round(memory.reserved / GIB, 4),
        "instant": memory.instant,
    }


def recipe_of(row: dict, checkpoint: str | None = None) -> Recipe:
    return Recipe(
        model=checkpoint or MODELS[row["model"]],
        dataset="random",
        method=row["method"],
        double_quant=row["double_quant"],
        rank=row["rank"],
        targets=row["targets"],
        dropout=row["dropout"],
        optimizer=row["optimizer"],
        max_length=row["length"],
        micro_batch_size=row["rows"],
        effective_batch_size=row["rows"] * row["accumulation"],
        steps=STEPS,
        eval_rows=0,
        weights="resident",
        precision="fp16" if row["kernel"] == "memory-efficient" else "bf16",
    )


def plan_of(row: dict, card: Card, checkpoint: str | None = None) -> Plan:
    """The row's plan: what it says, whatever the planner would choose."""
    recipe = recipe_of(row, checkpoint)
    made = search(recipe, card, architecture(MODELS[row["model"]]), force=True)
    expanded = row["kernel"] == "memory-efficient"
    return made.replace(
        layers=tuple(kind for kind, count in row["layout"].items() for _ in range(count)),
        kernel=row["kernel"],
        attention=EXPANDED_ATTENTION if expanded else "sdpa",
        dtype=recipe.precision,
        fused=row.get("fused", False),
    )


def work_of(row: dict, card: Card) -> Workload:
    """What the row trains, and how: as when its grid was measured."""
    plan = plan_of(row, card)
    work = workload(
        plan.recipe,
        card,
        architecture(MODELS[row["model"]]),
        dtype=plan.dtype,
        kernel=plan.kernel,
        optimizer=plan.optimizer,
        length=row["length"],
        rows=row["rows"],
        layers=plan.layers,
        fused=plan.fused,
    )
    if row["id"].split("-")[0] not in TWO_THREADS:
        return work
    return work.replace(blas_workspace=2 * work.blas_workspace, joined=False)


def switch_kernels(kernel: str) -> None:
    import torch

    on = {"flash": ("flash",), "cudnn": ("cudnn",), "memory-efficient": ("mem_efficient",), "math": ()}[kernel]
    for name in ("flash", "cudnn", "mem_efficient"):
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(
            name in on or (name == "mem_efficient" and kernel == "flash")
        )


def measure(row: dict, checkpoints: Path, *, rehearsed: bool, cap: bool, steps: int = STEPS) -> dict:
    """Runs one row in this process."""
    import torch

    from llamanb.rehearsal import rehearse

    begin = time.monotonic()
    card = dataclasses.replace(Card.present(), name="H200")
    switch_kernels(row["kernel"])
    plan = plan_of(row, card, str(checkpoints / row["model"]))
    result = {"id": row["id"], "gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    if cap:
        limit = (row["predicted"]["reserved"] * 1.15 + 1.0) * GIB
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    if rehearsed:
        at = time.monotonic()
        again = rehearse(plan.replace(recipe=plan.recipe.replace(checkpointing="none")))
        result["rehearsal_s"] = round(time.monotonic() - at, 1)
        result["rehearsed"] = told(again.memory)
        if not cap:  # alone on the GPU
            result["rehearsed"]["step_s"] = round(again.step_s, 4)
    result |= train_and_watch(plan, steps)
    return {**result, "wall_s": round(time.monotonic() - begin, 1)}


def train_and_watch(plan: Plan, steps: int, *, lengths: random.Random | None = None) -> dict:
    """Trains the plan on random rows and returns its peaks and times. With `lengths` only every third row is of the
    full length, and the others are down to half as long."""
    import tempfile

    import torch

    from llamanb.data import TrainingData
    from llamanb.data.encode import load_tokenizer
    from llamanb.model import attach_adapters, load_model
    from llamanb.quiet import quiet_libraries
    from llamanb.rehearsal import random_rows
    from llamanb.training.trainer import build_trainer
    from llamanb.watch.instants import Instants

    plan = plan.replace(recipe=plan.recipe.replace(steps=steps))
    tokenizer = load_tokenizer(Path(plan.recipe.model))
    count = steps * plan.recipe.effective_batch_size
    rows = random_rows(len(tokenizer), plan.length, plan.micro_batch_size, count)
    for i, one in enumerate(rows if lengths else ()):
        cut = plan.length if i % 3 == 0 else lengths.randrange(plan.length // 2, plan.length)
        rows[i] = type(one)(one.input_ids[:cut], one.labels[:cut])
    data = TrainingData("random", "token ids", tokenizer, rows, [], [], [])
    instants, status = Instants(), "ok"
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with quiet_libraries(), tempfile.TemporaryDirectory() as folder:
        try:
            model = load_model(plan, tokenizer)
            if plan.recipe.adapters:
                model = attach_adapters(model, plan.recipe)
            loaded = torch.cuda.memory_allocated()
            trainer = build_trainer(plan, model, data, Path(folder), [])
            if not lengths:
                trainer.args.train_sampling_strategy = "sequential"  # each micro-batch of full length, with a mask
            instants.attach(trainer)
            trainer.train()
        except torch.OutOfMemoryError as error:
            return {"status": f"out of memory: {str(error)[:200]}"}
    micro, optimizer = instants.times(plan.accumulation)
    peaks = {part: round(peak / GIB, 4) for part, peak in instants.peaks.items()}
    return {
        "status": status,
        "measured": {
            **peaks,
            "allocated": round(max(instants.peaks.values()) / GIB, 4),
            "reserved": round(instants.reserved / GIB, 4),
            "nvml": _nvml_gib(),
            "loaded": round(loaded / GIB, 4),
            "step_s": round(plan.accumulation * micro + optimizer, 4),
        },
    }


def _nvml_gib() -> float | None:
    import torch

    from llamanb.nvml import gpu_processes, nvml_handle, start_nvml

    nvml, _ = start_nvml()
    handle = nvml_handle(nvml, torch.cuda.get_device_properties(0)) if nvml else None
    mine = [p.bytes for p in gpu_processes(nvml, handle) or () if p.pid == os.getpid() and p.bytes] if handle else []
    return round(mine[0] / GIB, 4) if mine else None


def run(path: Path, checkpoints: Path, out: Path, *, rehearsed: bool, at_once: float, only: str, steps: int) -> None:
    """Measures the rows of a grid that `out` does not have yet, side by side as long as they fit `at_once` GiB."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    done = {json.loads(line)["id"] for line in out.read_text().splitlines()} if out.exists() else set()
    waiting = [row for row in rows if row["id"] not in done and (not only or row["id"] in only.split(","))]
    waiting.sort(key=lambda row: -row["predicted"]["reserved"])
    running: list[tuple[subprocess.Popen, dict]] = []
    while waiting or running:
        used = sum(_room(row) for _, row in running)
        fitting = next((row for row in waiting if not running or used + _room(row) <= at_once), None)
        if fitting and len(running) < 8:
            waiting.remove(fitting)
            settings = f"expandable_segments:{fitting['expandable']}"
            command = [sys.executable, "-m", "benchmarks.memory", "row", json.dumps(fitting), str(checkpoints)]
            command += [str(int(rehearsed)), str(int(at_once > 0)), str(steps)]
            env = {**os.environ, "PYTORCH_ALLOC_CONF": settings, "OMP_NUM_THREADS": "2"}
            running.append(
                (subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env), fitting)
            )
            continue
        time.sleep(0.3)
        for process, row in list(running):
            if process.poll() is not None:
                running.remove((process, row))
                output, errors = process.communicate()
                lines = [line[7:] for line in output.splitlines() if line.startswith("RESULT ")]
                result = lines[0] if lines else json.dumps({"id": row["id"], "status": f"failed: {errors[-400:]}"})
                with out.open("a") as file:
                    file.write(result + "\n")
                print(result if not lines else _short(row, json.loads(result)), flush=True)


def _room(row: dict) -> float:
    """GiB of the GPU that a row may take: its cap, and the context."""
    return row["predicted"]["reserved"] * 1.15 + 2.0


def _short(row: dict, result: dict) -> str:
    if "measured" not in result:
        return f"{result['id']} {result['status']}"
    shape = f"{row['model']} {row['method']} {row['rows']}x{row['length']} {row['kernel']} {row['layout']}"
    text = f"{result['id']:>6} {shape}"
    for name in ("allocated", "reserved"):
        text += (
            f"  {name} {result['measured'][name]:.3f} {error(row['predicted'][name], result['measured'][name]):+.2%}"
        )
        if "rehearsed" in result:
            text += f" {error(result['rehearsed'][name], result['measured'][name]):+.2%}"
    if "step_s" in result.get("rehearsed", {}):
        step_s = result["measured"]["step_s"]
        text += f"  step {step_s:.3f} {error(result['rehearsed']['step_s'], step_s):+.1%}"
    return text + f"  {result['wall_s']:.0f} s"


def error(predicted: float, measured: float) -> float:
    return predicted / measured - 1


def report(path: Path, out: Path) -> str:
    """Errors of a grid as Markdown: as it was committed, by the present code, and after a rehearsal; then every row."""
    rows = {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}
    results = [json.loads(line) for line in out.read_text().splitlines()]
    good = [result for result in results if "measured" in result]
    now = {r["id"]: told(predict(work_of(rows[r["id"]], H200), expandable=rows[r["id"]]["expandable"])) for r in good}
    lines = [f"{len(good)} of {len(rows)} rows measured, {len(results) - len(good)} failed.", ""]
    lines += ["| | rows | mean error | worst | mean signed |", "|---|---|---|---|---|"]
    for words, source in (
        ("as committed before measuring", {r["id"]: rows[r["id"]]["predicted"] for r in good}),
        ("closed form, present code", now),
        ("after a rehearsal", {r["id"]: r["rehearsed"] for r in good if "rehearsed" in r}),
    ):
        for name in ("allocated", "reserved", "step_s"):
            errors = [
                error(source[r["id"]][name], r["measured"][name]) for r in good if name in source.get(r["id"], {})
            ]
            if errors:
                cells = f"{len(errors)} | {statistics.mean(map(abs, errors)):.2%} | {max(errors, key=abs):+.2%}"
                lines.append(f"| {name}, {words} | {cells} | {statistics.mean(errors):+.2%} |")
    lines += ["", "| peak at | rows | allocated: mean signed error, present code | worst |", "|---|---|---|---|"]
    for instant in sorted({told_["instant"] for told_ in now.values()}):
        those = [r for r in good if now[r["id"]]["instant"] == instant]
        errors = [error(now[r["id"]]["allocated"], r["measured"]["allocated"]) for r in those]
        lines.append(f"| {instant} | {len(errors)} | {statistics.mean(errors):+.2%} | {max(errors, key=abs):+.2%} |")
    names = "row, model, method, step, rank, adapters, layers, kernel, optimizer, segments, allocated GiB, error, "
    names += "reserved GiB, error, NVML, rehearsed allocated"
    lines += ["", "| " + " | ".join(names.split(", ")) + " |", "|" + "---|" * len(names.split(", "))]
    for result in good:
        row, seen, told_ = rows[result["id"]], result["measured"], now[result["id"]]
        method = row["method"] + ("" if row["double_quant"] or row["method"] != "qlora-nf4" else ", no double quant")
        method += ", dropout" if row["dropout"] else ""
        cells = [
            row["id"],
            row["model"],
            method,
            f"{row['accumulation']} × {row['rows']} × {row['length']}",
            row["rank"],
        ]
        cells += [row["targets"], ", ".join(f"{n} {kind}" for kind, n in row["layout"].items()), row["kernel"]]
        cells += [row["optimizer"], "expandable" if row["expandable"] else "fixed"]
        for name in ("allocated", "reserved"):
            cells += [f"{seen[name]:.3f}", f"{error(told_[name], seen[name]):+.2%}"]
        again = result.get("rehearsed")
        cells += [seen["nvml"], f"{error(again['allocated'], seen['allocated']):+.2%}" if again else ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("grid")
    one.add_argument("seed", type=int)
    one.add_argument("count", type=int)
    one.add_argument("--fused", action="store_true")
    one = commands.add_parser("run")
    for name in ("grid", "checkpoints", "out"):
        one.add_argument(name, type=Path)
    one.add_argument("--rehearse", action="store_true")
    one.add_argument("--at-once", type=float, default=0.0)
    one.add_argument("--only", default="")
    one.add_argument("--steps", type=int, default=STEPS)
    one = commands.add_parser("row")
    for name in ("row", "checkpoints", "rehearse", "cap", "steps"):
        one.add_argument(name)
    one = commands.add_parser("report")
    one.add_argument("grid", type=Path)
    one.add_argument("out", type=Path)
    args = parser.parse_args()
    if args.command == "grid":
        print("\n".join(json.dumps(row) for row in grid(args.seed, args.count, fused=args.fused)))
    elif args.command == "run":
        run(
            args.grid,
            args.checkpoints,
            args.out,
            rehearsed=args.rehearse,
            at_once=args.at_once,
            only=args.only,
            steps=args.steps,
        )
    elif args.command == "row":
        rehearsed, cap = bool(int(args.rehearse)), bool(int(args.cap))
        result = measure(
            json.loads(args.row), Path(args.checkpoints), rehearsed=rehearsed, cap=cap, steps=int(args.steps)
        )
        print("RESULT " + json.dumps(result), flush=True)
    else:
        print(report(args.grid, args.out))


if __name__ == "__main__":
    main()
