"""Data parallel on several GPUs of one machine: tokens a second beside one card's, and what adding up takes.

    python -m benchmarks.scale run OUT [--cards 1,2,4] [--rows 8b-2048,8b-512]     tiny: on CPUs, to try the script
    NCCL_P2P_DISABLE=1 python -m benchmarks.scale run OUT --cards 2 --rows collectives     without a link between cards
    python -m benchmarks.scale report OUT [OUT ...]
    python -m benchmarks.scale pays OUT [OUT ...]     how many tokens a card needs, for docs/several_cards.md

Random weights of the real shape, the same rows, effective batch and micro-batch on one card and on several, each
count launched by torchrun with the project's own trainer. Each result names loss and reserved memory of every rank; the
time of adding gradients up is that of the collectives alone, all ranks waiting before they begin.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path

from benchmarks.scale_report import lines, pays, report
from benchmarks.speed_worker import Gpu
from llamanb import Card, Recipe
from llamanb.architecture import architecture
from llamanb.layout import GIB
from llamanb.planner import plan
from llamanb.ranks import ALONE
from llamanb.scale.launched import launched
from llamanb.tape import CHECKPOINTED

ROWS: dict[str, dict] = {
    "8b-2048": {"model": "meta-llama/Llama-3.1-8B-Instruct", "length": 2048, "batch": 16, "micro": 2},
    "8b-512": {"model": "meta-llama/Llama-3.1-8B-Instruct", "length": 512, "batch": 16, "micro": 8},
    "70b-24": {"model": "meta-llama/Llama-3.3-70B-Instruct", "card": "RTX 4090", "length": 2048, "batch": 8},
    "70b-40": {"model": "meta-llama/Llama-3.3-70B-Instruct", "card": "A100 40GB", "length": 2048, "batch": 8},
    "70b-4x24": {"model": "meta-llama/Llama-3.3-70B-Instruct", "card": "RTX 4090", "length": 2048, "batch": 8, "of": 4},
    "8b-6": {"model": "meta-llama/Llama-3.1-8B-Instruct", "card": "T4", "free_gib": 6.0, "length": 1024, "batch": 16},
    "1b-2048": {"model": "meta-llama/Llama-3.2-1B-Instruct", "length": 2048, "batch": 16, "micro": 4},
    "collectives": {},
    "tiny": {"model": "tiny", "length": 32, "batch": 4, "micro": 1},
    "tiny-4": {"model": "tiny", "length": 32, "batch": 4, "of": 4},
}
"""`card`: each GPU is held to it, and of several each to `free_gib` of it where that is said; a model that has no room
there is shared. `of`: for so many; one process does a rank's part among them, and takes the others' parts of the layers
to be zeros: what each of so many cards takes, without the others."""
STEPS, WARM, MOST_S = 8, 2, 600.0
SIZES_MIB = (1, 16, 64, 256)
"""Of single sums of gradients and gatherings of weights, for the page on where several cards stop paying."""


def measure(name: str) -> dict | None:
    """One training in this rank; the result on rank 0."""
    number, count = launched()
    import torch

    from llamanb.scale.peers import Peers

    several = ROWS[name].get("of", 1)
    ranks = Peers(number, count) if count > 1 else _one_of(several) if several > 1 else ALONE
    if count > 1:
        ranks.join()
    gpu = Gpu("cuda" if torch.cuda.is_available() else "cpu", None)
    found = {"row": name, "cards": ranks.count, "alone": ranks.count > count}
    found["p2p"] = "NCCL_P2P_DISABLE" not in os.environ
    found |= _training(ROWS[name], ranks, gpu) if ROWS[name] else _collectives(ranks, gpu)
    if count > 1:
        ranks.leave()
    return None if ranks.number else found


def _training(row: dict, ranks, gpu: Gpu) -> dict:
    import torch

    from llamanb.data import TrainingData
    from llamanb.model import attach_adapters, load_model
    from llamanb.quiet import quiet_libraries
    from llamanb.rehearsal import _tokenizer, random_rows
    from llamanb.training.trainer import build_trainer

    card = Card.pretend(row["card"]) if "card" in row else Card.here()
    if "free_gib" in row and ranks.count > 1:
        card = replace(card, free_gib=row["free_gib"])
    held = card.free_gib * GIB / torch.cuda.get_device_properties(0).total_memory if "card" in row else 1.0
    if gpu.here:  # a whole model's random weights are made there, 16 bits at once
        torch.cuda.set_per_process_memory_fraction(held if ranks.count > 1 else 1.0)
    recipe = Recipe(
        model=row["model"],
        max_length=row["length"],
        effective_batch_size=row["batch"],
        micro_batch_size=row.get("micro"),
        steps=STEPS,
        eval_rows=0,
    )
    made, shape, tokenizer = plan(recipe, card, cards=ranks.count), architecture(row["model"]), _tokenizer()
    if "of" in row and not gpu.here:  # plans for a CPU share nothing
        layers = tuple(range(shape.layers))
        made = made.replace(fused=True, layers=(CHECKPOINTED,) * len(layers), streamed=layers, shards=row["of"])
    rows = random_rows(shape.vocabulary, row["length"], made.micro_batch_size, STEPS * row["batch"])
    data = TrainingData("random", "token ids", tokenizer, rows, [], [], [])
    ends: list[float] = []
    with quiet_libraries(), tempfile.TemporaryDirectory() as folder:
        model = attach_adapters(load_model(made, tokenizer, shape, ranks.streams), recipe)
        if gpu.here:
            torch.cuda.set_per_process_memory_fraction(held)
        gpu.rest()
        gpu.reset()
        trainer = build_trainer(made, model, data, Path(folder), ranks.watchers(None), ranks=ranks)
        trainer.args.train_sampling_strategy = "sequential"
        trainer.add_callback(_clock(ends, gpu))
        trainer.train()
    step_s = statistics.median(later - earlier for earlier, later in zip(ends[WARM:-1], ends[WARM + 1 :], strict=True))
    reserved = gpu.memory()["reserved_gib"] or 0.0
    adding_s = _adding_s(ranks, model, gpu)
    free, total = torch.cuda.mem_get_info() if gpu.here else (0, 0)
    reserved_now = torch.cuda.memory_reserved() if gpu.here else 0
    beside = (total - free - reserved_now) / GIB  # the context, kernels, and what NCCL takes
    losses = [round(x, 5) for x in _losses(trainer)]
    said = ranks.all_of({"reserved": reserved, "beside_torch": beside, "loss": losses})
    return {
        "gpu": made.card.name,
        "micro_batch": made.micro_batch_size,
        "accumulation": made.accumulation,
        "shards": made.shards,
        "streamed": len(made.streamed),
        "planned": {"reserved": made.needs_gib, "step_s": made.step_s},
        "step_s": step_s,
        "tokens_s": row["batch"] * row["length"] / step_s,
        "adding_up_s": adding_s,
        "ranks": said,
    }


def _one_of(count: int):
    """A rank without others."""
    from llamanb.scale.peers import Peers
    from llamanb.scale.sharded import ShardedLayers, Sharing

    class Layers(ShardedLayers):
        def _copy(self, buffer, memory) -> None:
            buffer.zero_()[: len(memory)].copy_(memory)

    class Makes(Sharing):
        def __call__(self, *arguments) -> Layers:
            return Layers(self.ranks, *arguments)

    class OneOf(Peers):
        streams = property(Makes)

        def tell(self, what) -> None: ...

        def all_of(self, what) -> list:
            return [what] * self.count

        def summed(self, total, parameters):
            return total

    return OneOf(0, count)


def _losses(trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def _clock(ends: list[float], gpu: Gpu):
    """Notes when each step's work is done."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            gpu.sync()
            ends.append(time.monotonic())

    return Clock()


def _adding_s(ranks, model, gpu: Gpu) -> float:
    """Seconds of one step's sum of all gradients."""
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    return _median_s(ranks, gpu, lambda: ranks.summed(torch.zeros(()), model.parameters()))


def _collectives(ranks, gpu: Gpu) -> dict[str, dict[int, float]]:
    """Seconds of one all-reduce of so many MiB of fp32, and of one all-gather of so many MiB in all."""
    import torch
    import torch.distributed as dist

    sums, gathers = {}, {}
    for size in SIZES_MIB:
        whole = torch.zeros(size * 2**18, device="cuda" if gpu.here else "cpu")
        part = whole.new_zeros(len(whole) // ranks.count)
        sums[size] = _median_s(ranks, gpu, functools.partial(dist.all_reduce, whole))
        gathers[size] = _median_s(
            ranks, gpu, functools.partial(dist.all_gather_into_tensor, whole[: len(part) * ranks.count], part)
        )
    return {"sums_s": sums, "gathers_s": gathers}


def _median_s(ranks, gpu: Gpu, work) -> float:
    taken = []
    for _ in range(12):
        gpu.sync()
        ranks.all_of(None)
        begin = time.monotonic()
        work()
        gpu.sync()
        taken.append(time.monotonic() - begin)
    return statistics.median(taken[2:])


def counts_of(name: str, counts: list[int]) -> list[int]:
    """Of so many processes, those that a row is for."""
    row = ROWS[name]
    return [count for count in counts if count in (1, row.get("of", count)) and (row or count > 1)]


def run(out: Path, names: list[str], counts: list[int]) -> None:
    for name in names:
        for cards in counts_of(name, counts):
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cards)]
            command = [*torchrun, "-m", "benchmarks.scale", "one", name]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            with subprocess.Popen(command, **pipes) as process:
                too_long = threading.Timer(MOST_S, process.terminate)  # on which torchrun ends its processes
                too_long.start()
                said, errors = process.communicate()
                too_long.cancel()
            found = [line[7:] for line in said.splitlines() if line.startswith("RESULT ")]
            why = [json.loads(line[6:]) for line in said.splitlines() if line.startswith("ERROR ")]
            error = {"row": name, "cards": cards, "error": "".join(why[:1]) or (said + errors)[-2000:]}
            line = json.loads(found[0]) if found else error
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("out", type=Path)
    one.add_argument("--rows", default=",".join(name for name in ROWS if not name.startswith("tiny")))
    one.add_argument("--cards", default="1,2")
    one = commands.add_parser("one")
    one.add_argument("name", choices=ROWS)
    for name in ("report", "pays"):
        commands.add_parser(name).add_argument("out", type=Path, nargs="+")
    args = parser.parse_args()
    if args.command == "run":
        run(args.out, args.rows.split(","), [int(count) for count in args.cards.split(",")])
    elif args.command == "report":
        print(report(lines(args.out)))
    elif args.command == "pays":
        print(pays(lines(args.out)))
    else:
        try:
            found = measure(args.name)
        except BaseException:
            print("ERROR " + json.dumps(traceback.format_exc()), flush=True)
            raise
        if found is not None:
            print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
