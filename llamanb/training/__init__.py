"""`train`: from a plan to a Run. The data is read and checked before torch is imported and a model loaded."""

from __future__ import annotations

from pathlib import Path

from llamanb import hub
from llamanb.data import TrainingData, load_data
from llamanb.layout import Plan
from llamanb.training.run import Run, new_folder, write_csv

__all__ = ["Run", "train"]


def train(plan: Plan, data: TrainingData | None = None, *, name: str = "run", runs: str | Path = "runs") -> Run:
    """Fine-tunes as the plan says; scores before and after; saves all of it.

    Args:
        plan: from `plan(recipe)`.
        data: from `load_data(recipe)`; left out, it is loaded here.
        name: of the run; its folder is `runs`/`name`, with a number where that is taken.
        runs: the folder of all runs.

    Raises LlamanbError for what a person can mend: rows, model, network, disk, GPU.
    """
    data = data or load_data(plan.recipe)
    hub.checkpoint_folder(
        plan.recipe.model, plan.recipe.revision
    )  # all that can be refused is, before a folder is made
    folder = new_folder(Path(runs), name)
    plan.recipe.save(folder / "recipe.json")
    (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")

    from llamanb.quiet import quiet_libraries
    from llamanb.watch.sampler import MemorySampler

    with quiet_libraries(), MemorySampler.here() as sampler:
        return _train(plan, data, folder, sampler)


def _train(plan: Plan, data: TrainingData, folder: Path, sampler) -> Run:
    sampler.phase("import")
    import transformers

    from llamanb import plots
    from llamanb.evaluate import compare, evaluate
    from llamanb.model import attach_adapters, load_model, save_model, write_model_card
    from llamanb.training.trainer import StopAfter, build_trainer, let_go, use_threads_that_pay, warn_of_gaps
    from llamanb.watch.live import LiveView

    recipe = plan.recipe
    if plan.card.is_gpu:
        warn_of_gaps()
    transformers.set_seed(recipe.seed)
    callbacks = [StopAfter(recipe.stop_after_min)] if recipe.stop_after_min else []  # its clock starts before loading
    sampler.phase("load")
    print(f"loading {recipe.model}", flush=True)
    model = load_model(plan, data.tokenizer)
    use_threads_that_pay(model)
    if recipe.adapters:
        model = attach_adapters(model, recipe)

    before = None
    if data.held_out:
        sampler.phase("score")
        print(f"scoring {len(data.held_out)} held-out rows before training", flush=True)
        before = evaluate(model, data)

    view = LiveView(sampler)
    trainer = build_trainer(plan, model, data, folder, [view, *callbacks])
    sampler.phase("train")
    try:
        result = trainer.train()
    finally:
        let_go()
    sampler.phase("save")  # before anything else can fail
    saved = save_model(model, data.tokenizer, plan, folder)

    scores = None
    if before is not None:
        sampler.phase("score")
        print("scoring them again", flush=True)
        scores = compare(before, evaluate(model, data), data)
        (folder / "scores.txt").write_text(str(scores), encoding="utf-8")
        write_model_card(saved, plan, str(scores.tables()[0]))
    sampler.stop()

    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    columns = ("step", "loss", "learning_rate", "grad_norm")
    write_csv(folder / "metrics.csv", columns, ([entry.get(column) for column in columns] for entry in log))
    write_csv(folder / "memory.csv", ("time_s", "used_gib", "torch_gib"), sampler.samples)
    loss_plot, memory_plot = plots.loss_picture(view.steps, view.losses), plots.memory_picture(sampler)
    loss_plot.save(folder / "loss.png")
    memory_plot.save(folder / "memory.png")
    return Run(
        folder=folder,
        plan=plan,
        steps=view.steps,
        losses=view.losses,
        loss_plot=loss_plot,
        memory_plot=memory_plot,
        saved=saved,
        scores=scores,
        train_s=result.metrics["train_runtime"],
        peak_gib=sampler.peak_gib,
    )
