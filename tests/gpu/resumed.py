"""One run on a pretend T4 twice undisturbed and once cut off and picked up, in a process of its own; prints JSON.

python -m tests.gpu.resumed '{"model": "mini", "dataset": "rows.jsonl"}' RUNS_FOLDER CUT_AT_STEP
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(recipe_json: str, runs: str, cut: int) -> None:
    import torch
    from transformers import TrainerCallback

    from llamanb import Card, Recipe, plan, train
    from llamanb.training import trainer

    class Cut(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == cut:
                raise SystemExit

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            states = getattr(optimizer, "optimizer", optimizer).state.values()
            paged.append(sum(getattr(s["state1"], "is_paged", False) for s in states if "state1" in s))

    def with_callback(*callbacks):
        def built(plan, model, data, folder, given, *rest):
            return build(plan, model, data, folder, [*given, *callbacks], *rest)

        trainer.build_trainer = built

    build = trainer.build_trainer
    p = plan(Recipe.from_json(recipe_json), Card.pretend("T4"))
    result, paged = {"optimizer": p.optimizer, "dtype": p.dtype}, []
    for name in ("whole", "again"):
        with_callback(Look())
        result[name] = train(p, name=name, runs=runs).losses
    result["paged"] = [paged[-1]]
    with_callback(Cut())
    try:
        train(p, name="cut", runs=runs)
    except SystemExit:
        paged.clear()
    with_callback(Look())
    run = train(p, name="cut", runs=runs)
    result["picked_up"], result["paged"] = run.losses, result["paged"] + paged
    result["folder"] = str(run.folder)
    last = sorted((run.folder / "checkpoints").iterdir())[-1]
    result["scale"] = torch.load(last / "scaler.pt", weights_only=True)["scale"]
    whole = Path(runs) / "whole" / "checkpoints" / last.name
    result["whole_scale"] = torch.load(whole / "scaler.pt", weights_only=True)["scale"]
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
