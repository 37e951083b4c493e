"""Memory that runs out, put everywhere: forward, backward, the optimizer, scoring and saving, in the first, a middle
and the last micro-batch, told in every way that libraries have. Every run recovers and learns what it would have
learned.

`make faults` runs all, CI a sample.
"""

import gc
import itertools
import json
import os
import random
import sys
import weakref

import pytest
import torch
from transformers import LlamaModel

from llamanb import Card, Recipe, load_data, plan, train
from llamanb.run import FINISHED
from llamanb.tape import STORED
from llamanb.training import saves, step
from llamanb.training.checkpoints import holds
from llamanb.training.resume import CHECKPOINTS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ALL = int(os.environ.get("LLAMANB_KILLS", "10")) >= 500
IN_CI = 12
STEPS, MICRO, ACCUMULATION = 3, 2, 3
ERRORS = {
    "torch": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
    "cuBLAS": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "driver": lambda: RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
    "Triton": lambda: RuntimeError("Triton Error [CUDA]: out of memory"),
    "host": MemoryError,
}
SETTINGS = ("padded", "fused", "dropout")
PLACES = ("forward", "backward", "optimizer", "evaluation", "save")
WHICH = ("first", "middle", "last")
CASES = list(itertools.product(SETTINGS, PLACES, WHICH, ERRORS))


class Injected:
    """Raises once, at the n-th call of a place, and looks whether what that try made is gone at the next."""

    def __init__(self, monkeypatch, place: str, number: int = sys.maxsize, error: str = ""):
        self.calls, self.number, self.error, self.raised = 0, number, error, False
        self.held: list[weakref.ref] = []
        around = {
            "forward": (step.StepTrainer, "compute_loss"),
            "optimizer": (torch.optim.AdamW, "step"),
            "evaluation": (LlamaModel, "forward"),
            "save": (saves, "save_file"),
        }
        if place == "backward":
            summed = step.StepTrainer._summed

            def with_backward(trainer, *args):
                backward = trainer.accelerator.backward
                monkeypatch.setattr(trainer.accelerator, "backward", self.within(backward, after=True))
                try:
                    return summed(trainer, *args)
                finally:
                    monkeypatch.setattr(trainer.accelerator, "backward", backward)

            monkeypatch.setattr(step.StepTrainer, "_summed", with_backward)
            return
        where, name = around[place]
        inner = getattr(where, name)
        if place == "evaluation":

            def scored(model, *args, **kwargs):
                return (self.within(inner) if not model.training else inner)(model, *args, **kwargs)

            monkeypatch.setattr(where, name, scored)
        else:
            monkeypatch.setattr(where, name, self.within(inner, after=place == "forward"))

    def within(self, inner, after: bool = False):
        def outer(*args, **kwargs):
            if self.raised:
                gc.collect()
                assert [one for one in self.held if one() is not None] == [], "tensors of the failed try"
                self.held = []
            made = inner(*args, **kwargs) if after else None
            self.calls += 1
            if self.calls == self.number:
                self.raised = True
                junk = torch.ones(3, requires_grad=True)
                self.held += [weakref.ref(t) for t in (junk, made) if isinstance(t, torch.Tensor)]
                raise ERRORS[self.error]()
            return made if after else inner(*args, **kwargs)

        return outer


@pytest.fixture(scope="module")
def data(mini, tmp_path_factory):
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    text = [json.dumps({"instruction": f"Say {n}.", "output": "It is " + "so " * (n % 7) + f"{n}."}) for n in range(24)]
    rows.write_text("\n".join(text))
    recipe = Recipe(model=str(mini), dataset=str(rows), max_length=128, eval_rows=2, learning_rate=1e-4)
    recipe = recipe.replace(effective_batch_size=MICRO * ACCUMULATION, micro_batch_size=MICRO, steps=STEPS, warmup=0.0)
    recipe = recipe.replace(checkpoint_every_steps=1)
    return recipe, load_data(recipe)


def trained(setting, data, runs):
    recipe, rows = data
    made = plan(recipe.replace(dropout=0.2 if setting == "dropout" else 0.0), Card("CPU", None))
    if setting == "fused":
        made = made.replace(fused=True, layers=(STORED,) * 2)
    return train(made, rows, runs=runs)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """A run of each setting, and how often it comes to each place."""
    found = {}
    for setting in SETTINGS:
        with pytest.MonkeyPatch.context() as patch:
            watched = {place: Injected(patch, place) for place in PLACES}
            run = trained(setting, data, tmp_path_factory.mktemp(setting))
        found[setting] = run, {place: one.calls for place, one in watched.items()}
    return found


def test_every_lack_of_memory_is_recovered_from(data, undisturbed, tmp_path, monkeypatch, capsys):
    cases = CASES if ALL else random.Random(0).sample(CASES, IN_CI)
    for i, (setting, place, which, error) in enumerate(cases):
        whole, calls = undisturbed[setting]
        number = {"first": 1, "middle": 1 + calls[place] // 2, "last": calls[place]}[which]
        words = f"{setting}, {place} {number} of {calls[place]}, {error}"
        with monkeypatch.context() as patch:
            injected = Injected(patch, place, number, error)
            run = trained(setting, data, tmp_path / str(i))
        assert injected.raised, words
        said = capsys.readouterr().out
        assert run.status == FINISHED, words
        assert [s.step for s in run.timeline.steps] == list(range(1, STEPS + 1)), words
        again = place in ("forward", "backward")
        assert ("out of memory at step" in said) == again, words
        assert run.plan.micro_batch_size * run.plan.accumulation == MICRO * ACCUMULATION, words
        assert (run.plan.micro_batch_size < MICRO) == again, words
        for step_made in range(STEPS - 1, STEPS + 1):
            assert holds(run.folder / CHECKPOINTS / f"step-{step_made:08d}"), words
        if setting == "dropout" and again:
            continue  # other masks are drawn for other micro-batches
        for one, other in zip(run.timeline.steps, whole.timeline.steps, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=1e-6), words
            assert one.tokens == other.tokens, words
        assert run.scores.after.loss == pytest.approx(whole.scores.after.loss, rel=1e-6), words
    if ALL:
        assert len(cases) >= 200
