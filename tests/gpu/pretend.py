"""A recipe run on a big GPU that behaves like a T4, in a process of its own; prints one line of JSON.

    python -m tests.gpu.pretend '{"model": "/tmp/8b", "dataset": "rows.jsonl"}' RUNS_FOLDER

A pretend T4 (`Card.pretend("T4")`) computes in fp16, has neither FlashAttention nor cuDNN attention, and gives its
allocator 14.40 GiB: a T4's 14.56 less the CUDA context.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

ALLOCATOR_GIB = 14.40


def main(recipe_json: str, runs: str) -> None:
    import torch

    from llamanb import Card, Recipe, plan, train

    begin = time.monotonic()
    card = Card.pretend("T4")
    p = plan(Recipe.from_json(recipe_json), card)
    run = train(p, name="gpu", runs=runs, resume=False)
    result = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "plan": {k: getattr(p, k) for k in ("dtype", "attention", "optimizer", "micro_batch_size", "accumulation")},
        "layers": {kind: p.layers.count(kind) for kind in set(p.layers)},
        "predicted_gib": round(p.memory.allocated / 2**30, 3),
        "predicted_reserved_gib": round(p.needs_gib, 3),
        "parts_gib": {part: round(size / 2**30, 3) for part, size in p.memory.parts.items()},
        "seen_gib": {part: round(size, 3) for part, size in run.timeline.peaks_gib.items()},
        "losses": [round(loss, 4) for loss in run.losses],
        "step_s": round(run.train_s / len(run.timeline.steps), 3),
        "allocated_gib": round(max(run.timeline.peaks_gib.values()), 3),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 3),
        "device_gib": round(run.peak_gib, 3),
        "expandable_segments": torch.cuda.memory._snapshot()["allocator_settings"].get("expandable_segments"),
        "scores": str(run.scores.tables()[0]) if run.scores else "",
        "folder": str(run.folder),
        "wall_s": round(time.monotonic() - begin, 1),
    }
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], str(Path(sys.argv[2])))
