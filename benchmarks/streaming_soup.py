"""Soup's side of `benchmarks.streaming_peer`: its YAML, its rows, its trainer timed; and what both sides share.

Nothing of llamanb is imported here: Soup's process is to be as Soup makes it.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path

VRAM_GIB, LENGTH, RANK, STEPS = 3.65, 512, 16, 5
GIB = 2**30
_CHUNKS = {"rewind_log": False, "stream_loss_chunk": 64}
OPTIONS: dict[str, dict] = {
    "Soup": {},
    "Soup, chunks": _CHUNKS,
    "Soup, chunks, scales": {**_CHUNKS, "stream_nf4_scale_cache": True},
    "Soup, chunks, layers": {**_CHUNKS, "stream_recompute": "auto", "stream_vram_override": int(VRAM_GIB * GIB)},
}
"""What each way of running Soup sets under `training:` beside its defaults, all of it documented. The loss in chunks of
so many tokens of each row, and no log of each row's loss, which takes the logits again, make room for more rows; nf4's
scales once expanded stay on the card; and as many layers as fit are not recomputed."""


def soup_config(checkpoint: Path, name: str, rows: int) -> dict:
    """soup.yaml, of which JSON is a part."""
    data = {"train": "rows.jsonl", "format": "alpaca", "chat_template": "llama3", "train_on_responses_only": False}
    training = {
        "epochs": 1,
        "batch_size": rows,
        "gradient_accumulation_steps": 1,
        "quantization": "4bit",
        "lora": {"r": RANK, "alpha": RANK, "dropout": 0.0, "target_modules": "all-linear"},
        "stream_layers": True,
        "stream_source": "ram",
    }
    data |= {"max_length": LENGTH, "val_split": 0}
    training |= OPTIONS[name]
    return {"base": str(checkpoint), "task": "sft", "output": "output", "data": data, "training": training}


def write_soup(folder: Path, checkpoint: Path, name: str, rows: int) -> None:
    """soup.yaml and the rows it names, each longer than LENGTH tokens of any vocabulary; Soup cuts them."""
    letters = random.Random(0)
    words = " ".join("".join(letters.choices("bcdfghjklmnpqrstvwxz", k=5)) for _ in range(LENGTH))
    lines = [{"instruction": "Write.", "input": "", "output": f"{i} {words}"} for i in range(rows * STEPS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "soup.yaml").write_text(json.dumps(soup_config(checkpoint, name, rows), indent=1))


def wait_for_turn(folder: Path) -> None:
    (folder / "ready").touch()
    if not sys.stdin.readline():
        sys.exit("whoever started this is gone")


def hold() -> None:
    """Holds this process to VRAM_GIB of the GPU."""
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(VRAM_GIB * GIB / total)


def step_seconds(ends_s: list[float]) -> float:
    """Median seconds of a step, the first two left out."""
    apart = [after - before for before, after in itertools.pairwise(ends_s)]
    return round(statistics.median(apart[1:]), 4)


def versions(*names: str) -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in names}


def run_soup(folder: Path) -> None:
    """`soup train` in this process, which ends with the last step: saving is not measured."""
    from soup_cli import cli

    for name in ("soup_cli.trainer.sft", "bitsandbytes", "datasets", "peft", "trl"):
        importlib.import_module(name)
    import torch
    import transformers.trainer

    gpu = torch.cuda.is_available()

    class Steps(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
            self.ends_s = []
            self.tokens = sum(len(row["input_ids"]) for row in train_dataloader.dataset) / state.max_steps
            if gpu:
                torch.cuda.reset_peak_memory_stats()

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if gpu:
                torch.cuda.synchronize()
            self.ends_s.append(time.perf_counter())
            if state.global_step < state.max_steps:
                return
            found = {
                "status": "ok",
                "dtype": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
                "step_s": step_seconds(self.ends_s),
                "tokens": self.tokens,
                "allocated": round(torch.cuda.max_memory_allocated() / GIB, 3) if gpu else None,
                "reserved": round(torch.cuda.max_memory_reserved() / GIB, 3) if gpu else None,
                "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "versions": versions("soup-cli", "trl", "transformers", "peft", "bitsandbytes", "torch"),
            }
            (folder / "result.json").write_text(json.dumps(found))
            sys.stdout.flush()
            os._exit(0)

    wait_for_turn(folder)
    hold()
    transformers.trainer.DEFAULT_CALLBACKS.append(Steps)
    sys.argv = ["soup", "--verbose", "train", "--config", "soup.yaml", "--yes"]
    cli.run()
