"""A training step as what it allocates and frees, in order: the tape that memory is predicted from.

The tape follows the code that runs: transformers' Llama layer (modeling_llama.py), peft's LoRA layers (tuners/lora),
bitsandbytes' products (autograd/_functions.py, backends/cuda/ops.py), torch's autograd and checkpointing, trl's tiled
loss (kernels/chunked_logprob.py). Each method here mirrors one of them, forward and backward, and is held to torch's
own recorded history (tests/data, tests/unit/test_tape.py). Sizes are bytes. Scalars and tensors of a few bytes a token
are left out.

`N` is the tokens of a micro-batch, `e` the bytes of a number in the step's arithmetic, `r` the rank.
"""

from __future__ import annotations

from llamanb.tape.step import Step
from llamanb.tape.workload import (
    ADAPT,
    BACKWARD,
    BUCKETS,
    BYTES,
    CHECKPOINTED,
    EMPTIED,
    FORWARD,
    HALVED,
    HEAD,
    HEAD_BACKWARD,
    HEAD_TILE,
    INSTANTS,
    LOAD,
    OFFLOADED,
    RECOMPUTED,
    STEP,
    STORED,
    Tape,
    Workload,
    joined,
    mlp_tile,
    spread,
)


def record(work: Workload) -> Tape:
    """The tape of loading and of all that is new in training: a first step, and the largest micro-batch of a second.

    A step has two micro-batches here where it has any number of them: the third does what the second did.
    """
    writer = Step(work)
    writer.load()
    writer.micro_batch()
    writer.optimizer_states()
    writer.update()
    if work.accumulation == 1:
        writer.drop_gradients()
    writer.micro_batch()
    writer.update()
    writer.drop_gradients()
    return writer.tape


def record_steady(work: Workload) -> Tape:
    """The tape of one micro-batch with all that lasts in place: the same peaks in fewer events, gaps left aside."""
    writer = Step(work)
    writer.load()
    writer.optimizer_states()
    if work.accumulation > 1:
        writer.make_gradients()
    writer.micro_batch()
    writer.update()
    return writer.tape


def streamed_bytes(work: Workload) -> int:
    """Of one layer's weights in host memory, and of each buffer on the card."""
    return Step(work).streamed_bytes


def record_load(work: Workload) -> Tape:
    """The tape of loading and of what lasts, up to the first step."""
    writer = Step(work)
    writer.load()
    writer.tape.mark(STEP)
    return writer.tape


__all__ = [
    "ADAPT",
    "BACKWARD",
    "BUCKETS",
    "BYTES",
    "CHECKPOINTED",
    "EMPTIED",
    "FORWARD",
    "HALVED",
    "HEAD",
    "HEAD_BACKWARD",
    "HEAD_TILE",
    "INSTANTS",
    "LOAD",
    "OFFLOADED",
    "RECOMPUTED",
    "STEP",
    "STORED",
    "Tape",
    "Workload",
    "joined",
    "mlp_tile",
    "record",
    "record_load",
    "record_steady",
    "spread",
    "streamed_bytes",
]
