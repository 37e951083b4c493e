"""`train`: from a plan to a Run, or further with one that was cut off. The data is read and checked before torch is
imported and a model loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
from pathlib import Path

from llamanb import __version__, hub
from llamanb.data import TrainingData, load_data
from llamanb.errors import HostMemoryError, RecipeError
from llamanb.layout import Plan
from llamanb.machine import host_memory, surroundings
from llamanb.planner import steps_of
from llamanb.ranks import ALONE, Ranks
from llamanb.run import FINISHED, INTERRUPTED, Run, new_folder
from llamanb.streaming import HOST_GIB
from llamanb.timeline import Timeline, replace_text
from llamanb.training.checkpoints import lock, step_of
from llamanb.training.interrupts import uninterrupted
from llamanb.training.resume import CHECKPOINTS, Progress, as_it_ran, pick_up, require_states, rows_hash
from llamanb.training.second_home import bring_back, copied_to

__all__ = ["CHECKPOINTS", "Run", "train"]

BASE = "base.json"
"""File of a run that says which weights it was trained on."""
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
    resume: bool | None = None,
    second_home: str | Path | None = None,
    ranks: Ranks = ALONE,
) -> Run:
    """Fine-tunes as the plan says; scores before and after; saves all of it. An interrupt (Ctrl-C, the kernel's stop
    button) ends training after the step at hand, and what was learned is saved and scored.

    A run of that name that did not come to its end, for whatever reason, goes on from its newest checkpoint, and comes
    to what it would have come to.

    Args:
        plan: from `plan(recipe)`.
        data: from `load_data(recipe)`; left out, it is loaded here.
        name: of the run; its folder is `runs`/`name`, with a number where that is taken.
        runs: the folder of all runs.
        report_to: one of REPORTERS, which gets loss and learning rate too, as transformers passes them on.
        resume: None goes on with an unfinished run of the same recipe. True also with other `steps`, `epochs` and what
            else is in `resume.FREE`, and with a finished run for more steps. False begins a new run.
        second_home: a folder that outlives this machine, such as one on Google Drive. It gets copies of the run while
            that trains, and where nothing of the run is in `runs`, it goes on from there.
        ranks: the processes that train together, of which this is the first (scale/).

    Raises:
        RecipeError: the newest run of that name is unfinished and of another recipe; says what differs.
        HostMemoryError: the weights of streamed layers have no room there.
        OutOfMemoryError: the GPU's memory was not enough; says what took it, and what would fit.
        NotFiniteError: the numbers stayed other than finite; says since when, and what may help.
        LlamanbError: for whatever else a person can mend: rows, model, network, disk, GPU.
    """
    _require_reporter(report_to)
    _require_host_memory(plan)
    with contextlib.ExitStack() as held:
        if second_home:
            second_home = Path(second_home).expanduser().absolute()
            bring_back(second_home, plan, Path(runs), name, resume)
        checkpoint = pick_up(plan, Path(runs), name, resume, held)
        data = data or load_data(plan.recipe)
        progress = Progress(rows_hash(data))
        if checkpoint:
            progress = _continued(checkpoint, plan, data, progress.rows)
            plan = as_it_ran(plan, checkpoint.parents[1])
            require_states(checkpoint)
        # All that can be refused is, before any change
        base = hub.checkpoint_folder(plan.recipe.model, plan.recipe.revision)
        folder = checkpoint.parents[1].resolve() if checkpoint else new_folder(Path(runs), name)
        if not checkpoint:
            held.enter_context(lock(folder))
            write_base(base, folder)
        if second_home:
            held.enter_context(copied_to(second_home, name, folder))
        return _watched(plan, data, folder, checkpoint, progress, report_to, held, ranks)


def write_base(base: Path, folder: Path) -> None:
    """Notes in the run's folder which weights it is trained on, so that a merge can tell them from others."""
    commit = base.name if base.parent.name == "snapshots" else None  # in the Hub's cache
    replace_text(folder / BASE, json.dumps({"commit": commit, "fingerprint": hub.fingerprint(base)}))


def _continued(checkpoint: Path, plan: Plan, data: TrainingData, rows: str) -> Progress:
    """How far the checkpoint is. Raises RecipeError where it is of other rows, or further than is asked for."""
    progress, step, steps = Progress.load(checkpoint), step_of(checkpoint), steps_of(plan.recipe, data)
    folder = checkpoint.parents[1]
    fix = "give another name=, or resume=False for a new run beside it"
    if progress.rows != rows:
        raise RecipeError(f"{folder} was trained on other rows", "the data has changed since", fix)
    if step > steps:
        why = f"its checkpoint is of step {step}, and {steps} are asked for"
        raise RecipeError(f"{folder} cannot become shorter", why, fix)
    print(f"picking up {folder} at step {step} of {steps}", flush=True)
    return progress


def _watched(plan: Plan, data, folder: Path, checkpoint, progress: Progress, report_to, held, ranks) -> Run:
    """Trains while a thread samples memory; whatever happens can be shown from the folder. From its end on, interrupts
    are not heard until `held` ends."""
    replace_text(folder / "recipe.json", plan.recipe.to_json())
    replace_text(folder / "plan.json", plan.to_json())
    if checkpoint:
        Run(folder, plan, Timeline("nothing yet")).save_facts()
    else:
        Run(folder, plan, Timeline("nothing yet")).save()

    from llamanb.out_of_memory import Scene
    from llamanb.quiet import quiet_libraries
    from llamanb.watch.sampler import MemorySampler

    with contextlib.ExitStack() as watching:
        watching.enter_context(quiet_libraries())
        sampler = MemorySampler.here()
        if checkpoint:
            sampler.timeline.follow(folder, progress.steps, progress.returns)
        watching.enter_context(sampler)
        versions = {"llamanb": __version__} | {name: importlib.metadata.version(name) for name in LIBRARIES}
        scene = Scene(plan, folder)
        rows = {"trained on": len(data.train), "held out": len(data.held_out)}
        scene.run = Run(folder, plan, sampler.timeline, versions=versions, rows=rows)
        sampler.timeline.planned_gib, sampler.folder = plan.needs_gib, folder
        explained = None
        try:
            _train(scene, data, report_to, checkpoint, progress, ranks)
        except BaseException as error:
            held.enter_context(uninterrupted())  # or the traceback of one would hold the tensors
            explained = scene.explain(error, sampler.timeline)  # while the tensors are there to be counted
            status = "out of memory" if explained else f"ended by {type(error).__name__}"
            with contextlib.suppress(OSError):  # a full disk must not hide the error
                scene.run = scene.run.replace(status=status, buckets_gib=scene.buckets_gib)
                scene.run.save()
            _write_report(scene.run)
            with contextlib.suppress(RuntimeError):  # nor a GPU that answers nothing any more
                scene.clear(error)
            if isinstance(error, KeyboardInterrupt):  # where it came says nothing, and closures there hold tensors
                error.__traceback__ = error.__context__ = None
            if not explained:
                raise
        else:
            held.enter_context(uninterrupted())
    scene.clear()  # after an error once more, now that nothing holds its traceback
    if explained:
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


def _train(scene, data: TrainingData, report_to: str, checkpoint: Path | None, progress: Progress, ranks) -> None:
    plan, timeline, folder = scene.plan, scene.run.timeline, scene.folder
    import transformers

    from llamanb.evaluate import compare, evaluate
    from llamanb.model import attach_adapters, load_model, save_model, write_model_card
    from llamanb.training.numbers import train_finite
    from llamanb.training.recovery import Spills
    from llamanb.training.saves import Saves
    from llamanb.training.step import heaviest
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
    ranks.tell((plan, folder, progress.rows))
    callbacks = [StopAfter(recipe.stop_after_min)] if recipe.stop_after_min else []  # its clock starts before loading
    instants = scene.instants = Instants(timeline, gpu=plan.card.is_gpu)
    instants.begins("load")
    print(f"loading {recipe.model}", flush=True)
    model = scene.model = load_model(plan, data.tokenizer, streams=ranks.streams)
    use_threads_that_pay(model)
    if recipe.adapters:
        model = scene.model = attach_adapters(model, recipe)

    if data.held_out and not progress.before:
        instants.begins("score")
        print(f"scoring {len(data.held_out)} held-out rows before training", flush=True)
        with ranks.scoring(model):
            progress = dataclasses.replace(progress, before=evaluate(model, data))

    interrupt = StopOnInterrupt()
    watchers = [LiveView(timeline), interrupt, *callbacks, *ranks.watchers(timeline)]
    watchers += [Spills(timeline)] if "WSL2" in surroundings() else []
    trainer = scene.trainer = build_trainer(plan, model, data, folder, watchers, report_to, ranks)

    def replanned(now: Plan) -> None:
        scene.plan = now
        scene.run = scene.run.replace(plan=now)
        replace_text(folder / "plan.json", now.to_json())

    if trainer.slow:
        replanned(plan.replace(reasons={**plan.reasons, "fused": trainer.slow}))
    trainer.replanned = replanned
    trainer.probe = heaviest(data.train, plan, fused=trainer.fused is not None)
    instants.attach(trainer)
    saves = Saves(recipe, progress, timeline, folder)
    saves.attach(trainer, instants.begins)
    status, train_s = FINISHED, progress.train_s
    if checkpoint and step_of(checkpoint) == steps_of(recipe, data):  # the Trainer would take one step more
        trainer._load_from_checkpoint(checkpoint)
    else:
        try:
            with interrupt:
                result = train_finite(trainer, saves, checkpoint)
        finally:
            let_go()
        train_s = saves.progress.train_s + result.metrics["train_runtime"]
        if trainer.state.global_step < trainer.state.max_steps:
            status = INTERRUPTED if interrupt.asked else f"stopped after {recipe.stop_after_min or 0:g} minutes"
            if saves.step == trainer.state.global_step:
                print(f"{status}, at step {saves.step}: run this again to go on from there", flush=True)
    scene.run = scene.run.replace(train_s=train_s, buckets_gib=scene.buckets_gib)
    instants.begins("save")  # before anything else can fail
    (folder / "scores.json").unlink(missing_ok=True)  # of an adapter that is no longer the last
    saved = save_model(model, data.tokenizer, scene.plan, folder)
    scene.run.save()

    if progress.before:
        instants.begins("score")
        print("scoring the held-out rows again", flush=True)
        with ranks.scoring(model):
            scene.run = scene.run.replace(scores=compare(progress.before, evaluate(model, data), data))
        write_model_card(saved, scene.plan, str(scene.run.scores.tables()[0]))
        print(scene.run.scores.verdict, flush=True)
    scene.run = scene.run.replace(status=status)
    scene.run.save()
    ranks.tell(None)


def _require_host_memory(plan: Plan) -> None:
    """Raises HostMemoryError where weights of streamed layers, or inputs of offloaded ones, have no room, before
    anything is fetched."""
    waits, free = plan.streamed_gib + plan.offloaded_gib, min(host_memory()[1:])
    if waits and waits + HOST_GIB > free:
        raise HostMemoryError(
            f"there is too little host memory for {'the weights' if plan.streamed else 'the inputs'} of layers",
            f"{waits:.1f} GiB wait there, and {HOST_GIB:g} more are needed to work with; {free:.1f} are free",
            "end other programs; a machine with more memory; a smaller model; or a card that holds more of the layers",
        )


def _require_reporter(report_to: str) -> None:
    """Raises RecipeError before anything is loaded: transformers would at the first step."""
    if report_to not in REPORTERS:
        raise RecipeError(f"report_to = {report_to!r}", "no such reporter", f"one of {', '.join(REPORTERS)}")
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise RecipeError(f"report_to = {report_to!r}", "that package is not installed", f"pip install {report_to}")
