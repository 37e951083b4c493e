"""Memory that runs out for one cause, in a process of its own; prints the error and one line of JSON.

    python -m tests.gpu.out_of_memory CAUSE CHECKPOINTS ROWS RUNS_FOLDER

CHECKPOINTS holds `1b` and `3b` (`python -m tests.checkpoints 1b CHECKPOINTS/1b`), ROWS text files of that many tokens a
row, `64.jsonl` and `2048.jsonl`. Causes: the keys of CAUSES.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from llamanb import Card, Recipe, plan, train
from llamanb.out_of_memory import EARLIER, OTHERS, OutOfMemoryError
from llamanb.tape.workload import ACTIVATIONS, GRADIENTS, LOSS, OPTIMIZER, WEIGHTS

GIB = 2**30
CAUSES = {
    "rows": ("forward", ACTIVATIONS),
    "16 bits": ("load", WEIGHTS),
    "full, 32-bit Adam": ("optimizer step", OPTIMIZER),
    "full": ("backward", GRADIENTS),
    "a loss in one piece": ("loss", LOSS),
    "another process": (None, OTHERS),
    "an earlier cell": (None, EARLIER),
}
"""The phase and the bucket that the card must name; None: wherever it happens."""


def limited(gib: float) -> Card:
    """A pretend T4 with less memory."""
    import torch

    card = Card.pretend("T4")
    torch.cuda.set_per_process_memory_fraction(gib * GIB / torch.cuda.get_device_properties(0).total_memory)
    return replace(card, free_gib=gib, vram_gib=gib + (card.context_gib or 0))


def provoke(cause: str, checkpoints: Path, rows: Path, runs: str) -> OutOfMemoryError:
    import torch

    from llamanb.training import step

    recipe = Recipe(model=str(checkpoints / "1b"), dataset=str(rows / "2048.jsonl"), max_length=2048, steps=3)
    recipe = recipe.replace(eval_rows=0, effective_batch_size=8, warmup=0.0, weights="resident")
    short = {"dataset": str(rows / "64.jsonl"), "max_length": 64, "effective_batch_size": 1, "learning_rate": 1e-5}
    keep = []
    if cause == "rows":
        made = plan(recipe.replace(checkpointing="none", micro_batch_size=8), limited(10.0), force=True)
    elif cause == "16 bits":
        made = plan(recipe.replace(model=str(checkpoints / "3b"), method="lora"), limited(3.0), force=True)
    elif cause == "full, 32-bit Adam":
        made = plan(recipe.replace(method="full", optimizer="adamw_torch_fused", **short), limited(14.4), force=True)
    elif cause == "full":
        made = plan(recipe.replace(method="full", optimizer="adamw_8bit", **short), limited(7.5), force=True)
    elif cause == "a loss in one piece":  # as other trainers compute it
        from llamanb.model import head

        head.HEAD_TILE = 2**20
        made = plan(recipe.replace(micro_batch_size=8, checkpointing="all"), limited(5.0))
    elif cause == "another process":
        made = plan(recipe.replace(micro_batch_size=8, checkpointing="none"), Card.here())
        free, _ = torch.cuda.mem_get_info()
        hold = f"import torch, time; x = torch.empty({free - 6 * GIB}, dtype=torch.uint8, device='cuda'); "
        hold += "print('held', flush=True); time.sleep(120)"
        other = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
        keep.append(other)
        other.stdout.readline()
    else:
        made = plan(recipe.replace(micro_batch_size=4), limited(14.4))
        keep.append(torch.empty(8 * GIB, dtype=torch.uint8, device="cuda"))
    step.smaller = lambda plan: None  # as if nothing smaller were left: what is explained is what then stands
    try:
        train(made, name="oom", runs=runs, resume=False)
    except OutOfMemoryError as error:
        return error
    finally:
        for one in keep:
            if isinstance(one, subprocess.Popen):
                one.kill()
    raise AssertionError("there was memory enough")


def main(cause: str, checkpoints: str, rows: str, runs: str) -> None:
    import torch

    begin = time.monotonic()
    error = provoke(cause, Path(checkpoints), Path(rows), runs)
    for line in error._lines():
        print(line)
    result = {"cause": cause, "phase": error.phase, "bucket": error.bucket, "held": error.held.parts}
    result |= {"changes": error.changes.rows, "left_gib": torch.cuda.memory_allocated() / GIB}
    print("RESULT " + json.dumps({**result, "wall_s": round(time.monotonic() - begin, 1)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
