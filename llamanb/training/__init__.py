"""`train`: from a plan to a Run. The data is read and checked before torch is imported and a model loaded."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
from pathlib import Path

from llamanb import __version__, hub
from llamanb.data import TrainingData, load_data
from llamanb.errors import RecipeError
from llamanb.layout import Plan
from llamanb.run import FINISHED, INTERRUPTED, Run, new_folder
from llamanb.timeline import Timeline

__all__ = ["Run", "train"]

LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets")


REPORTERS = ("none", "tensorboard", "trackio", "wandb")
"""What transformers can send a run's figures to; each is a package of that name."""


def train(
    plan: Plan,
    data: TrainingData | None = None,
    *,
    name: str = "run",
    runs: str | Path = "runs",
    report_to: str = "none",
) -> Run:
    """Fine-tunes as the plan says; scores before and after; saves all of it. An interrupt (Ctrl-C, the kernel's stop
    button) ends training after the step at hand, and what was learned is saved and scored.

    Args:
        plan: from `plan(recipe)`.
        data: from `load_data(recipe)`; left out, it is loaded here.
        name: of the run; its folder is `runs`/`name`, with a number where that is taken.
        runs: the folder of all runs.
        report_to: one of REPORTERS, which gets loss and learning rate too, as transformers passes them on.

    Raises:
        OutOfMemoryError: the GPU's memory was not enough; says what took it, and what would fit.
        LlamanbError: for whatever else a person can mend: rows, model, network, disk, GPU.
    """
    _require_reporter(report_to)
    data = data or load_data(plan.recipe)
    hub.checkpoint_folder(
        plan.recipe.model, plan.recipe.revision
    )  # all that can be refused is, before a folder is made
    folder = new_folder(Path(runs), name)
    plan.recipe.save(folder / "recipe.json")
    (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")

    Run(folder, plan, Timeline("nothing yet")).save()  # so that whatever happens can be shown

    from llamanb.out_of_memory import Scene
    from llamanb.quiet import quiet_libraries
    from llamanb.watch.sampler import MemorySampler

    with quiet_libraries(), MemorySampler.here() as sampler:
        versions = {"llamanb": __version__} | {name: importlib.metadata.version(name) for name in LIBRARIES}
        scene = Scene(plan, folder)
        scene.run = Run(folder, plan, sampler.timeline, versions=versions)
        sampler.timeline.planned_gib, sampler.folder = plan.needs_gib, folder
        explained = None
        try:
            _train(scene, data, report_to)
        except BaseException as error:
            explained = scene.explain(error, sampler.timeline)  # while the tensors are there to be counted
            status = "out of memory" if explained else f"ended by {type(error).__name__}"
            with contextlib.suppress(OSError):  # a full disk must not hide the error
                scene.run = scene.run.replace(status=status, buckets_gib=scene.buckets_gib)
                scene.run.save()
            _write_report(scene.run)
            with contextlib.suppress(RuntimeError):  # nor a GPU that answers nothing any more
                scene.clear(error)
            if not explained:
                raise
    if explained:
        scene.clear()  # again, now that nothing holds the old traceback
        raise explained
    scene.run.timeline.write(folder)  # with the last samples
    _write_report(scene.run)
    return scene.run


def _write_report(run: Run) -> None:
    from llamanb.report import write_report

    try:
        write_report(run)
    except Exception as error:  # the run is saved, and more than its report
        print(f"no report.html: {type(error).__name__}: {error}", flush=True)


def _train(scene, data: TrainingData, report_to: str) -> None:
    plan, timeline, folder = scene.plan, scene.run.timeline, scene.folder
    import transformers

    from llamanb.evaluate import compare, evaluate
    from llamanb.model import attach_adapters, load_model, save_model, write_model_card
    from llamanb.training.trainer import (
        StopAfter,
        StopOnInterrupt,
        build_trainer,
        let_go,
        use_threads_that_pay,
        warn_of_gaps,
    )
    from llamanb.watch.instants import Instants
    from llamanb.watch.live import LiveView

    recipe = plan.recipe
    if plan.card.is_gpu:
        warn_of_gaps()
    transformers.set_seed(recipe.seed)
    callbacks = [StopAfter(recipe.stop_after_min)] if recipe.stop_after_min else []  # its clock starts before loading
    instants = scene.instants = Instants(timeline, gpu=plan.card.is_gpu)
    instants.begins("load")
    print(f"loading {recipe.model}", flush=True)
    model = scene.model = load_model(plan, data.tokenizer)
    use_threads_that_pay(model)
    if recipe.adapters:
        model = scene.model = attach_adapters(model, recipe)

    before = None
    if data.held_out:
        instants.begins("score")
        print(f"scoring {len(data.held_out)} held-out rows before training", flush=True)
        before = evaluate(model, data)

    interrupt = StopOnInterrupt()
    watchers = [LiveView(timeline), interrupt, *callbacks]
    trainer = scene.trainer = build_trainer(plan, model, data, folder, watchers, report_to)
    instants.attach(trainer)
    try:
        with interrupt:
            result = trainer.train()
    finally:
        let_go()
    status, train_s = INTERRUPTED if interrupt.asked else FINISHED, result.metrics["train_runtime"]
    scene.run = scene.run.replace(status=status, train_s=train_s, buckets_gib=scene.buckets_gib)
    instants.begins("save")  # before anything else can fail
    saved = save_model(model, data.tokenizer, plan, folder)
    scene.run.save()

    if before is not None:
        instants.begins("score")
        print("scoring them again", flush=True)
        scene.run = scene.run.replace(scores=compare(before, evaluate(model, data), data))
        write_model_card(saved, plan, str(scene.run.scores.tables()[0]))
    scene.run.save()


def _require_reporter(report_to: str) -> None:
    """Raises RecipeError before anything is loaded: transformers would at the first step."""
    if report_to not in REPORTERS:
        raise RecipeError(f"report_to = {report_to!r}", "no such reporter", f"one of {', '.join(REPORTERS)}")
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise RecipeError(
            f"report_to = {report_to!r}", "that package is not installed", f"pip install {report_to}, and restart"
        )
