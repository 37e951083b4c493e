"""A run as a T4 would leave it, made by hand."""

from pathlib import Path

from llamanb import Card, Recipe
from llamanb.architecture import architecture
from llamanb.planner import search
from llamanb.run import FINISHED, Run
from llamanb.scores import Comparison, RowScore, Scores
from llamanb.timeline import Sample, Step, Timeline

ONE = "meta-llama/Llama-3.2-1B-Instruct"
SOURCE = "VRAM in use (NVML)"
BUCKETS_GIB = {"weights": 0.5, "quantization constants": 0.02, "embeddings and head": 0.49}
BUCKETS_GIB |= {"adapters": 0.04, "gradients": 0.04, "optimizer": 0.01}
PEAKS_GIB = {"load": 1.2, "score": 1.6, "forward": 2.5, "loss": 2.75, "backward": 3.0, "optimizer step": 1.5}


def run_on_a_t4(folder: Path, *, question: str = "Why?", answer: str = "Because.", **fields) -> Run:
    """Saved in `folder` with plan and recipe, as train() does; `fields` are the recipe's, the model is always 1B."""
    recipe = Recipe(**{"model": ONE, "dataset": "rows.jsonl", "max_length": 1024, "micro_batch_size": 2, **fields})
    made = search(recipe.replace(model=ONE), Card.known("T4"), architecture(ONE)).replace(recipe=recipe)
    timeline = Timeline(SOURCE, limit_gib=14.56, planned_gib=made.needs_gib, peaks_gib=dict(PEAKS_GIB))
    for i, phase in enumerate(["import", "load", "score", *["forward", "loss", "backward", "optimizer step"] * 5]):
        timeline.add(Sample(0.1 * i, phase, 1.0 + 0.1 * i, 0.9, 0.95 + 0.05 * i))
    timeline.steps += [Step(i, 0.4 * i, 2.0 / i, 2e-4, 0.5, 500 * i) for i in range(1, 6)]
    before, after = (RowScore(nats, 10, answer, True, right) for nats, right in ((20.0, False), (5.0, True)))
    scores = Comparison(Scores((before,)), Scores((after,)), (question,), (answer,))
    versions = {"llamanb": "0.1.0", "torch": "2.11.0"}
    run = Run(folder, made, timeline, scores, FINISHED, 2.0, dict(BUCKETS_GIB), versions)
    recipe.save(folder / "recipe.json")
    (folder / "plan.json").write_text(made.to_json(), encoding="utf-8")
    run.save()
    return run
