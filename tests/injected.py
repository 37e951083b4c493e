"""Faults that tests put into a training: numbers that are not finite, a GradScaler where there is no GPU, interrupts,
memory that runs out."""

from __future__ import annotations

import gc
import signal
import sys
import weakref

import torch
from accelerate import Accelerator
from transformers import LlamaModel, TrainerCallback

from llamanb.training import saves, step
from llamanb.training import trainer as building

ERRORS = {
    "torch": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
    "cuBLAS": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "driver": lambda: RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
    "Triton": lambda: RuntimeError("Triton Error [CUDA]: out of memory"),
    "host": MemoryError,
}
"""Memory that has run out, in the words of those who say so."""


def inject(patch, *faults) -> None:
    """From now on each of `faults` is called with every trainer that is built, before it trains."""
    build = building.build_trainer

    def built(*args):
        made = build(*args)
        for fault in faults:
            fault(made)
        return made

    patch.setattr(building, "build_trainer", built)


class Value:
    """Puts a value that is not finite into a step of a training.

    Args:
        place: "loss": into the loss alone, its gradients stay; "micro-batch": into the second one's loss and gradients;
            "layer": into what the last layer computes; "gradient": into one number of one parameter's.
        when: asked with the trainer, whose `state.global_step` are the steps done.
    """

    def __init__(self, place: str, value: float, when):
        self.place, self.value, self.when = place, value, when

    def __call__(self, trainer) -> None:
        self.trainer, self.micro = trainer, 0
        compute, summed = trainer.compute_loss, trainer._summed

        def from_the_first(*args, **kwargs):  # of the probe too, which the first step begins with
            self.micro = 0
            return summed(*args, **kwargs)

        def compute_loss(*args, **kwargs):
            loss, self.micro = compute(*args, **kwargs), self.micro + 1
            if self.place == "micro-batch" and self.micro == 2 and self.when(trainer):
                return loss * self.value
            return loss + self.value if self.place == "loss" and self.when(trainer) else loss

        trainer._summed, trainer.compute_loss = from_the_first, compute_loss
        if self.place == "layer":
            trainer.model.get_decoder().layers[-1].register_forward_hook(self._in_layer)
        if self.place == "gradient":
            next(p for p in trainer.model.parameters() if p.requires_grad).register_hook(self._in_gradient)

    def _in_layer(self, module, args, output):
        if self.trainer.model.training and self.when(self.trainer):
            return output * self.value

    def _in_gradient(self, gradient):
        if self.when(self.trainer):
            gradient = gradient.clone()
            gradient.view(-1)[3] = self.value
        return gradient


def scaled(trainer) -> None:
    """GradScaler as for fp16, on a CPU and in fp32."""
    accelerator, scaler = trainer.accelerator, torch.amp.GradScaler("cpu")
    accelerator.scaler = scaler
    accelerator.unscale_gradients = lambda optimizer=None: [
        scaler.unscale_(one.optimizer) for one in accelerator._optimizers
    ]


class Untouched(TrainerCallback):
    """Notes in which steps weights and optimizer states stayed as they were, bit for bit, and whether weights ever were
    not finite. A fault that does nothing: it looks."""

    def __init__(self):
        self.steps, self.finite = [], True

    def __call__(self, trainer) -> None:
        self.trainer = trainer
        trainer.add_callback(self)

    def _bits(self) -> list:
        weights = {name: p.detach() for name, p in self.trainer._trained()}
        self.finite &= all(weight.isfinite().all() for weight in weights.values())
        states = self.trainer.optimizer.state_dict()["state"]
        tensors = [weights, *(state for _, state in sorted(states.items()))]
        pairs = [pair for part in tensors for pair in part.items()]
        return [(name, v.numpy().tobytes() if isinstance(v, torch.Tensor) else v) for name, v in pairs]

    def on_step_begin(self, args, state, control, **kwargs):
        self._before = self._bits()

    def on_step_end(self, args, state, control, **kwargs):
        if self._bits() == self._before:
            self.steps.append(state.global_step)


class Ends(TrainerCallback):
    """Ends a session before the step in which `when`, asked with the trainer, says so; as a dying process would,
    without a checkpoint more."""

    def __init__(self, when):
        self.when = when

    def __call__(self, trainer) -> None:
        self.trainer = trainer
        trainer.add_callback(self)

    def on_step_begin(self, args, state, control, **kwargs):
        if self.when(self.trainer):
            raise SystemExit


class Presses(TrainerCallback):
    """The stop button, pressed at the beginning of a step, once or more often."""

    def __init__(self, step: int, times: int = 1):
        self.step, self.times = step, times

    def __call__(self, trainer) -> None:
        trainer.add_callback(self)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)


class NoMemory:
    """Memory runs out once, at the n-th call of a place; at the next, what that try made must be gone.

    Args:
        place: "forward", "backward", "optimizer", "evaluation" or "save".
        error: one of ERRORS.
    """

    def __init__(self, patch, place: str, number: int = sys.maxsize, error: str = ""):
        self.calls, self.number, self.error, self.raised = 0, number, error, False
        self.held: list[weakref.ref] = []
        around = {
            "forward": (step.StepTrainer, "compute_loss"),
            "backward": (Accelerator, "backward"),
            "optimizer": (torch.optim.AdamW, "step"),
            "evaluation": (LlamaModel, "forward"),
            "save": (saves, "save_file"),
        }
        where, name = around[place]
        inner = getattr(where, name)
        outer = self.within(inner, after=place in ("forward", "backward"))

        def scored(model, *args, **kwargs):
            return (inner if model.training else outer)(model, *args, **kwargs)

        patch.setattr(where, name, scored if place == "evaluation" else outer)

    def within(self, inner, after: bool = False):
        def outer(*args, **kwargs):
            if self.held:
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
