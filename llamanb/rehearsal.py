"""`rehearse`: the plan tried on the GPU at hand with a few layers of the real shape, in seconds and without a download.

Models of a few random layers go through the same loading, the same trainer and the same loss for some steps. What they
take beyond the prediction for them is carried to the plan's depth, each part of the step by itself, since the parts
grow differently with depth; what a layer of each kind adds to a micro-batch's time is carried the same way. Where a
micro-batch is short, the corrected plan is tried once more as it is, with all of its layers: steps then wait for
Python, whose time varies by more than a layer takes.
"""

from __future__ import annotations

import gc
import itertools
import tempfile
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

from llamanb.advice import does_not_fit
from llamanb.architecture import Architecture, architecture
from llamanb.card import Card
from llamanb.errors import GpuError, RecipeError
from llamanb.layout import GIB, Plan
from llamanb.memory import SEEN, Memory, outline, predict, segments_grow
from llamanb.planner import MARGIN_REHEARSED, workload_of
from llamanb.search import fewest_recomputed
from llamanb.speed import StepTime, flops
from llamanb.tape import CHECKPOINTED, HALVED, OFFLOADED, STORED, Workload
from llamanb.tape.workload import ACTIVATIONS

FEW, MORE = 2, 6
"""Layers of a kind in the first model, and by how many at most the others have more of one kind."""
STEPS, ENOUGH_S, LEAST_STEPS = 24, 3.0, 3
"""Optimizer steps of each model at most; so many seconds are enough, after so many steps. The first also warms up."""
SHORT_S = 0.4
"""Predicted seconds of a micro-batch up to which all layers are tried too. Most of them are made in a second or two."""


@dataclass(frozen=True)
class _Trial:
    """One small model's run."""

    layers: tuple[str, ...]
    peaks: dict[str, int]
    reserved: int
    micro_batch_s: float
    optimizer_s: float


def rehearse(plan: Plan) -> Plan:
    """The plan with memory and time corrected by trial, and as many more layers kept as then fit.

    Takes some ten seconds and as much memory as a few layers and the embeddings need.

    Raises:
        GpuError: there is no GPU, or one of another capability or size than the plan's.
        RecipeError: only some of the plan's layers are streamed, or some wait on disk: trials stream all of theirs from
            host memory, or none; or cards share them.
        DoesNotFitError: the trials show that the plan does not fit, however its layers are laid out.
    """
    card = plan.card
    if not card.is_gpu:
        raise GpuError("nothing to rehearse", "the plan is for a CPU, and predicts no memory", "plan for a GPU")
    if plan.shards > 1:
        why = f"{plan.shards} cards share its layers, and a trial runs on one"
        raise RecipeError("this plan cannot be rehearsed", why, "launch it: the first steps show what they take")
    held = len(plan.streamed) - len(plan.on_disk)
    if plan.streamed and held < len(plan.layers):
        why = f"of {len(plan.layers)} layers {held} wait in host memory, and trials have a few, streamed so or not"
        raise RecipeError(
            "a plan that streams some layers cannot be rehearsed", why, "train: the first steps show what they take"
        )
    _require_gpu(card)
    shape = architecture(plan.recipe.model, plan.recipe.revision)
    work = workload_of(plan, shape)
    short = segments_grow() and plan.time and plan.step_s <= plan.accumulation * SHORT_S
    enough_s = 0.0 if short else ENOUGH_S  # for their memory alone, or for their time too
    trials = [_try(plan, shape, layers, enough_s) for layers in _small_layouts(plan, work)]
    made = _corrected(plan, work, trials)
    if not short:
        return made
    whole = _try(made, shape, made.layers, ENOUGH_S)
    return _corrected(made, work.replace(layers=made.layers), [whole], f"{made.basis}, and one with all {shape.layers}")


def _require_gpu(card: Card) -> None:
    import torch

    if not torch.cuda.is_available():
        raise GpuError(
            f"a plan for {card.name} cannot be rehearsed here",
            "torch finds no GPU",
            "rehearse on the machine that will train; the prediction needs no GPU",
        )
    there = torch.cuda.get_device_properties(torch.cuda.current_device())
    same = (there.major, there.minor) == card.capability and abs(there.total_memory / GIB / card.vram_gib - 1) < 0.05
    if not same and card.computes_as is None:
        raise GpuError(
            f"a plan for {card.name} cannot be rehearsed here",
            f"the GPU is {there.name}",
            f"plan for it: plan(recipe); or let it pretend: plan(recipe, Card.pretend({card.name!r}))",
        )


def _small_layouts(plan: Plan, work: Workload) -> list[tuple[str, ...]]:
    """A few layers of each kind the plan has or could have, and then more of one kind at a time, as far as they fit."""
    if plan.recipe.checkpointing == "auto" and OFFLOADED not in plan.layers:
        kinds = (CHECKPOINTED, HALVED, STORED) if plan.fused else (CHECKPOINTED, STORED)
    else:
        kinds = tuple(dict.fromkeys(plan.layers))
    found: list[tuple[str, ...]] = []
    for few in range(FEW, 0, -1):
        base = tuple(kind for kind in kinds for _ in range(few))
        found = [base] if _fits(plan, work, base) else []
        for kind in kinds if found else ():
            deeper = (tuple(sorted([*base, *[kind] * more])) for more in range(MORE, 0, -1))
            found += [layers for layers in deeper if _fits(plan, work, layers)][:1]
        if len(found) == 1 + len(kinds):
            break
    return found or [(kinds[0],), (kinds[0],) * 2]


def _fits(plan: Plan, work: Workload, layers: tuple[str, ...]) -> bool:
    small = _with_layers(work, layers)
    room = plan.card.free_gib * (1 - MARGIN_REHEARSED) if plan.limit_gib is None else plan.limit_gib
    return predict(small).reserved <= room * GIB


def _with_layers(work: Workload, layers: tuple[str, ...]) -> Workload:
    """The same with these layers alone, streamed where the others are."""
    streamed = len(layers) if work.streamed else 0
    return work.replace(model=replace(work.model, layers=len(layers)), layers=layers, streamed=streamed)


def _try(plan: Plan, shape: Architecture, layers: tuple[str, ...], enough_s: float) -> _Trial:
    """Trains a model of these layers for STEPS steps of random rows, or until so many seconds are over."""
    import torch

    from llamanb.data import TrainingData
    from llamanb.model import attach_adapters, load_model
    from llamanb.quiet import quiet_libraries
    from llamanb.training.trainer import build_trainer, let_go
    from llamanb.watch.instants import Instants

    accumulation = min(plan.accumulation, 2)
    recipe = plan.recipe.replace(
        steps=STEPS,
        effective_batch_size=accumulation * plan.micro_batch_size,
        micro_batch_size=plan.micro_batch_size,
        stop_after_min=None,
    )
    streamed = tuple(range(len(layers))) if plan.streamed else ()
    small = plan.replace(recipe=recipe, layers=layers, streamed=streamed, accumulation=accumulation)
    tokenizer = _tokenizer()
    rows = random_rows(shape.vocabulary, plan.length, plan.micro_batch_size, STEPS * recipe.effective_batch_size)
    data = TrainingData("random rows", "token ids", tokenizer, rows, [], [], [])
    instants = Instants()
    model = trainer = None
    try:
        with quiet_libraries(), tempfile.TemporaryDirectory() as folder:
            _make_workspaces(torch)
            torch.cuda.empty_cache()
            others = torch.cuda.memory_allocated() - round(plan.card.workspace_mib * 2**20)
            model = load_model(small, tokenizer, replace(shape, layers=len(layers)))
            if recipe.adapters:
                model = attach_adapters(model, recipe, start=False)
            torch.cuda.empty_cache()  # what loading took is not what a real checkpoint takes
            torch.cuda.reset_peak_memory_stats()
            trainer = build_trainer(small, model, data, Path(folder), [])
            # In the order of the rows, so that each micro-batch is one of full length that needs a mask: without one
            # a step of 8B takes 15 % less.
            trainer.args.train_sampling_strategy = "sequential"
            instants.attach(trainer)
            trainer.add_callback(_enough(enough_s))
            trainer.train()
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)  # they hold the model
        raise GpuError(
            f"the rehearsal of {len(layers)} layers ran out of memory",
            str(error).split(". ")[0],
            "something else may hold the GPU (nvidia-smi); or take a shorter max_length",
        ) from None
    finally:
        let_go()
        del trainer, model
        gc.collect()
        torch.cuda.empty_cache()
    micro, optimizer = instants.times(accumulation)
    peaks = {part: peak - others for part, peak in instants.peaks.items()}
    return _Trial(layers, peaks, instants.reserved - others, micro, optimizer)


def _enough(seconds: float):
    """Ends a trial after so long, or LEAST_STEPS."""
    from transformers import TrainerCallback

    class Enough(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                self.begin_s = time.monotonic()
            elif state.global_step >= LEAST_STEPS and time.monotonic() - self.begin_s >= seconds:
                control.should_training_stop = True

    return Enough()


def _make_workspaces(torch) -> None:
    """cuBLAS takes its workspace at its first product: now, so that it counts as there."""
    square = torch.ones(16, 16, device="cuda", dtype=torch.float16)
    square @ square


def _corrected(plan: Plan, work: Workload, trials: list[_Trial], basis: str = "") -> Plan:
    """The plan with what the trials showed; its layers filled up to MARGIN_REHEARSED of the card, unless all of them
    were tried."""
    limit = plan.card.free_gib * GIB * (1 - MARGIN_REHEARSED)
    why = plan.reasons.get("layers", "")
    depths = [len(trial.layers) for trial in trials]
    if plan.recipe.checkpointing == "auto" and OFFLOADED not in work.layers and len(work.layers) not in depths:
        work = fewest_recomputed(work, lambda one: _memory(one, trials).reserved <= limit)
        why = f"as few layers recomputed as fit {limit / GIB:.2f} GiB, as rehearsed"
        why = why if set(work.layers) != {STORED} else "all of them fit"
    made = plan.replace(
        layers=work.layers,
        memory=_memory(work, trials),
        time=_time(work, trials, plan.accumulation, plan.time.stall_s if plan.time else 0.0),
        limit_gib=limit / GIB,
        reasons={**plan.reasons, "layers": why},
        alternatives=(),  # they were predicted, and not rehearsed
        basis=basis or f"{len(trials)} rehearsals with {min(depths)} to {max(depths)} layers on this GPU",
    )
    if not made.fits:
        raise does_not_fit(made, work.model, rehearsed=True)
    return made


def _memory(work: Workload, trials: list[_Trial]) -> Memory:
    """The prediction, plus what each part of the step took more than predicted, carried to the depth of `work`."""
    memory = predict(work)
    base, *more = trials
    small = [predict(_small(work, trial)) for trial in trials]
    seen = [_missed(trial, one) for trial, one in zip(trials, small, strict=True)]
    peaks = dict(memory.peaks)
    for part, instants in SEEN.items():
        if part == "load":
            continue  # random weights are made, not read
        missed = seen[0][part]
        for trial, one in zip(more, seen[1:], strict=True):
            kind = trial.layers[_first_difference(base.layers, trial.layers)]
            grown = trial.layers.count(kind) - base.layers.count(kind)
            missed += (one[part] - seen[0][part]) / grown * (work.layers.count(kind) - base.layers.count(kind))
        for instant in instants:
            if instant in peaks:
                peaks[instant] += round(missed)
    beyond = [t.reserved - max(t.peaks.values()) - one.gaps for t, one in zip(trials, small, strict=True)]
    gaps = memory.gaps + max(0, min(beyond))
    highest = max(peaks, key=peaks.get)
    buckets = dict(outline(work).peaks[highest])
    buckets[ACTIVATIONS] += peaks[highest] - sum(buckets.values())  # what lasts is counted exactly without trials
    return Memory(peaks, buckets, gaps)


def _small(work: Workload, trial: _Trial) -> Workload:
    return _with_layers(work, trial.layers).replace(accumulation=min(work.accumulation, 2))


def _missed(trial: _Trial, memory: Memory) -> dict[str, int]:
    """Bytes that each part of the step took beyond the prediction."""
    return {part: trial.peaks[part] - predicted for part, predicted in memory.parts.items()}


def _first_difference(few: tuple[str, ...], more: tuple[str, ...]) -> int:
    return next(i for i, (a, b) in enumerate(itertools.zip_longest(few, more)) if a != b)


def _time(work: Workload, trials: list[_Trial], accumulation: int, stall_s: float) -> StepTime:
    """Time of a step, of which `stall_s` are predicted to go into waiting for weights: each layer of a kind costs what
    the trials with more of them took longer. A kind that no trial had more of, for want of memory, costs as much more
    or less than the others as its arithmetic says."""
    base, *more = trials
    micro, optimizer = base.micro_batch_s, base.optimizer_s
    costs: dict[str, tuple[float, float]] = {}
    for trial in more:
        kind = trial.layers[_first_difference(base.layers, trial.layers)]
        grown = trial.layers.count(kind) - base.layers.count(kind)
        costs[kind] = (
            (trial.micro_batch_s - base.micro_batch_s) / grown,
            (trial.optimizer_s - base.optimizer_s) / grown,
        )
    for kind in set(work.layers):
        if kind not in costs and costs:
            tried, (of_micro, of_optimizer) = next(iter(costs.items()))
            ratio = sum(flops(_alone(work, kind))) / sum(flops(_alone(work, tried)))
            costs[kind] = of_micro * ratio, of_optimizer
    for kind, (of_micro, of_optimizer) in costs.items():
        left = work.layers.count(kind) - base.layers.count(kind)
        micro, optimizer = micro + of_micro * left, optimizer + of_optimizer * left
    return StepTime(measured_s=accumulation * micro + optimizer, stall_s=stall_s)


def _alone(work: Workload, kind: str) -> Workload:
    return work.replace(model=replace(work.model, layers=1, vocabulary=1), layers=(kind,))


def random_rows(vocabulary: int, length: int, rows: int, count: int) -> list:
    """`count` rows of random tokens: of each micro-batch of `rows` all but the first are one or two tokens shorter than
    `length`, so that a batch of several needs a mask, or borders, as real ones do."""
    import numpy as np

    from llamanb.data.encode import IGNORE, Encoded

    source = np.random.default_rng(0)
    made = []
    for i in range(count):
        ids = source.integers(vocabulary, size=length if i % rows == 0 else length - 1 - i // rows % 2).tolist()
        made.append(Encoded(ids, [IGNORE, *ids[1:]]))
    return made


def _tokenizer():
    """As much of a tokenizer as the trainer asks for: padding and end tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<|begin_of_text|>": 1, "<|eot_id|>": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<pad>",
    )
