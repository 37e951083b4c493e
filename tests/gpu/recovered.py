"""Trainings on a pretended card that run out of memory for real and recover, each beside a fresh run of the plan that
it came to; in a process of its own. Prints a line of JSON for each.

    python -m tests.gpu.recovered CHECKPOINT RUNS_FOLDER

CHECKPOINT: Llama 3.2 1B's shape (`python -m tests.checkpoints 1b CHECKPOINT`). CASES: what takes the memory, and how
many GiB of it torch may have.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from unittest import mock

from llamanb import Card, Recipe, load_data, plan, train
from tests.gpu.out_of_memory import GIB, limited

ROWS_AT_ONCE, LATE, TAKEN, SCORING = "too many rows", "a late longest row", "another cell", "scoring"
LIMITS = {
    ROWS_AT_ONCE: (3, 4, 5, 6, 8),  # 14.3 GiB are asked for
    LATE: (2.6, 2.8, 3.0, 3.3, 3.6),  # short rows take 2.5, the last ones 3.9
    TAKEN: (4, 5, 6, 8, 10),
    SCORING: (4, 5, 6, 8, 10),
}
CASES = [(kind, gib) for kind, limits in LIMITS.items() for gib in limits]
STEPS, ROWS = 4, 8


def rows_file(folder: Path, kind: str) -> Path:
    """Rows of 2,048 tokens; of a tenth of that but for the last, for LATE."""
    lengths = [2046 if kind != LATE or i == STEPS * ROWS - 1 else 198 for i in range(STEPS * ROWS + 16)]
    rows = folder / f"{kind}.jsonl".replace(" ", "-")
    rows.write_text("\n".join(json.dumps({"text": f"{i:06d}".ljust(n, "x")}) for i, n in enumerate(lengths)))
    return rows


def trained(made, data, runs: Path, name: str, kind: str = "", gib: float = 0.0) -> dict:
    """A run, and the memory at the end of its last step; with what makes memory run out, where a kind is given."""
    import torch
    from transformers import TrainerCallback

    from llamanb import evaluate, generate
    from llamanb.training import step, trainer

    build, seen, held, said = trainer.build_trainer, [], [], []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
            if kind == TAKEN and state.global_step == 2:
                torch.cuda.empty_cache()
                free = gib * GIB - torch.cuda.memory_reserved()
                held.append(torch.empty(int(free * 0.6), dtype=torch.uint8, device="cuda"))

    def built(plan, model, data, folder, callbacks, *rest):
        one = build(plan, model, data, folder, [*callbacks, Look()], *rest)
        one.args.train_sampling_strategy = "sequential"
        return one

    def take(trainer, less, why, inner=step.StepTrainer._take):
        said.append([trainer.state.global_step + 1, less.micro_batch_size, less.recomputed])
        return inner(trainer, less, why)

    patches = [mock.patch.object(trainer, "build_trainer", built), mock.patch.object(step.StepTrainer, "_take", take)]
    if kind == LATE:
        patches.append(mock.patch.object(step, "heaviest", return_value=None))
    if kind == SCORING:
        places = {"TOKENS_AT_ONCE": generate, "POSITIONS_AT_ONCE": evaluate}
        patches += [mock.patch.object(module, name, 2**20) for name, module in places.items()]
    for patch in patches:
        patch.start()
    try:
        torch.cuda.empty_cache()
        run = train(made, data, name=name, runs=runs, resume=False)
    finally:
        mock.patch.stopall()
    allocated, reserved = (size - sum(t.numel() for t in held) for size in seen[-1])
    held.clear()
    gc.collect()
    torch.cuda.empty_cache()
    scores = run.scores.after.loss if run.scores else None
    made = {"losses": run.losses, "score": scores, "allocated": allocated / GIB, "reserved": reserved / GIB}
    return {**made, "status": run.status, "taken": said, "left": torch.cuda.memory_allocated() / GIB, "run": run}


def case(kind: str, gib: float, checkpoint: Path, folder: Path) -> dict:
    begin = time.monotonic()
    recipe = Recipe(model=str(checkpoint), dataset=str(rows_file(folder, kind)), max_length=2048, steps=STEPS)
    recipe = recipe.replace(
        weights="resident", effective_batch_size=ROWS, learning_rate=1e-5, warmup=0.0, eval_rows=16 * (kind == SCORING)
    )
    asked = {"micro_batch_size": ROWS, "checkpointing": "none"} if kind in (ROWS_AT_ONCE, LATE) else {}
    card, data = limited(gib), load_data(recipe)
    name = f"{kind}-{gib}".replace(" ", "-")
    recovered = trained(plan(recipe.replace(**asked), card, force=True), data, folder, name, kind, gib)
    fresh = trained(recovered.pop("run").plan, data, folder, f"{name}-fresh")
    del fresh["run"]
    took_s = round(time.monotonic() - begin, 1)
    return {"kind": kind, "gib": gib, "recovered": recovered, "fresh": fresh, "wall_s": took_s}


def main(checkpoint: str, folder: str) -> None:
    Card.present()
    for kind, gib in CASES:
        print("RESULT " + json.dumps(case(kind, gib, Path(checkpoint), Path(folder))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
