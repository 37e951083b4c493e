"""How long a training step takes, estimated from its arithmetic, its bytes and its launches.

A rough figure on a card of the table, good enough to rank layouts of one recipe against each other; a rehearsal
measures it. A micro-batch takes little more than the longer of two: what the GPU needs (matrix products at the card's
sustained rate, then everything else at its bandwidth), and what Python needs to launch it all. READS_PER_WRITE and
LAUNCHES_PER_OPERATION are fitted to ten steps of transformers' layers timed alone on one H200, of 1B, 3B and 8B
(benchmarks/results/memory.md); the constants of fused layers, HIDING and LAUNCHES_PER_UPDATE to 274 layouts of fused
ones there, in nine rows, seven of them without FlashAttention (benchmarks/results/speed.md; torch 2.11, transformers
5.23, peft 0.21.2). Where launches are measured while the host is quiet, the steps that plans take there are met to 3 %
on average, 9 at worst; attention of rows of 512 tokens takes a third longer than is said here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llamanb import turns
from llamanb.card import Card
from llamanb.copies import copies_s, link, reads_s
from llamanb.memory import Outline, outline
from llamanb.tape import BYTES, CHECKPOINTED, HALVED, OFFLOADED, STORED, Workload

READS_PER_WRITE, READS_PER_FUSED, READS_PER_WEIGHT = 2.5, 4.0, 0.26
"""Bytes read for each byte an operation writes: a product of two reads twice, a cast once. Fused layers write less for
as much that is read, and a weight of 4 bits is read once, with its constants, where 16 are written. Fitted to nf4."""
LAUNCHES_PER_OPERATION, LAUNCHES_PER_FUSED = 5.0, 7.0
"""Launches, and Python around them, for each allocation: views, in-place operations, peft's, autograd's and Triton's
code. Fused layers allocate less, for as much of it."""
HIDING = 8
"""Launching and computing hide behind each other, but not wholly: the GPU waits where small kernels follow one another,
Python where large ones do. Where both take as long, a step takes 1.09 times that."""
LAUNCHES_PER_UPDATE = 155
"""Of each fused layer's adapters, once a step, with nothing to hide behind: unscaling, clipping, the optimizer. What
transformers' layers were fitted to has it in it."""
MASKED_HALF = 0.5
"""Causal attention computes half of all scores."""
ATTENTION_RATE = 0.5
"""Of the card's matrix rate, in attention, where the rate of its kernel was not measured."""
ATTENTION_BACKWARD = 2.5
"""Attention's arithmetic in the backward pass, by that of the forward pass."""
FP32_RATE = 1 / 8
"""Of the 16-bit matrix rate, without matrix units (T4: 8.1 of 65 TFLOP/s)."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by what is waited for."""

    matrix_s: float = 0.0
    attention_s: float = 0.0
    memory_s: float = 0.0
    link_s: float = 0.0
    """Copies of offloaded activations."""
    launch_s: float = 0.0
    stall_s: float = 0.0
    """Waiting for the weights of streamed layers, where their copies, or the disk, take longer than what they hide
    behind."""
    update_s: float = 0.0
    """What comes once a step, where layers are fused."""
    measured_s: float | None = None
    """The whole step as a rehearsal found it; comes first."""

    @property
    def gpu_s(self) -> float:
        return self.matrix_s + self.attention_s + self.memory_s + self.link_s + self.stall_s

    @property
    def step_s(self) -> float:
        if self.measured_s is not None:
            return self.measured_s
        return (self.gpu_s**HIDING + self.launch_s**HIDING) ** (1 / HIDING) + self.update_s


def _forward_flops(work: Workload) -> float:
    """Of one layer's products, forward."""
    return 2 * work.tokens * (work.model.layer_linear_parameters + _adapters(work))


def _moved(work: Workload, outlined: Outline) -> float:
    """Bytes that a micro-batch reads and writes beside its matrix products."""
    if not work.fused:
        return outlined.written * (1 + READS_PER_WRITE)
    others = outlined.written - outlined.dequantized
    return others * (1 + READS_PER_FUSED) + outlined.dequantized * (1 + READS_PER_WEIGHT)


def flops(work: Workload) -> tuple[float, float]:
    """(of matrix products, of attention) for one micro-batch, forward and backward."""
    model, tokens = work.model, work.tokens
    adapters, forward = _adapters(work), _forward_flops(work)
    backward = forward + 2 * tokens * (model.layer_linear_parameters if work.full else adapters)
    mlp, down = (2 * tokens * model.intermediate * model.hidden * n for n in (2, 1))
    whole = forward - (down if work.fused else 0)  # fused layers leave the last product out
    again = {STORED: 0, HALVED: mlp, CHECKPOINTED: whole, OFFLOADED: whole}
    matrix = model.layers * (forward + backward) + sum(again[kind] for kind in work.layers)
    head = 2 * tokens * model.hidden * model.vocabulary
    matrix += head * (4 if work.full else 2 if work.fused else 3)  # trl computes the logits again in the backward pass
    return matrix, sum(_attention_flops(work))


def _attention_flops(work: Workload) -> tuple[float, float]:
    """Of attention, (forward, also where a layer is recomputed; backward)."""
    scores = 4 * work.tokens * work.length * work.model.q * MASKED_HALF
    again = sum(kind in (CHECKPOINTED, OFFLOADED) for kind in work.layers)
    return scores * (work.model.layers + again), scores * ATTENTION_BACKWARD * work.model.layers


def _attention_s(work: Workload, card: Card, rate: float) -> float:
    """Seconds of attention in a micro-batch; `rate`: FLOP/s of the card's matrix products."""
    measured = {"flash": card.flash_tflops, "memory-efficient": card.efficient_tflops}.get(work.kernel)
    rate = measured * 1e12 if measured and work.dtype != "fp32" else ATTENTION_RATE * rate
    forward, backward = _attention_flops(work)
    return (forward + backward * _idling(work, card)) / rate


def _idling(work: Workload, card: Card) -> float:
    """How many times as long attention's backward pass takes as with all multiprocessors at work."""
    if not (work.fused and work.kernel == "memory-efficient" and card.multiprocessors):
        return 1.0
    model, (major, _) = work.model, card.computes_as or card.capability
    blocks, at_once = work.rows * model.heads, turns.blocks_at_once(card.multiprocessors, model.head_size)
    parts = turns.best_parts(blocks, at_once, work.length) if turns.may_split(major, model.head_size) else 1
    return turns.taken(blocks, at_once, work.length, parts) * at_once / blocks


def _stalls(work: Workload, card: Card, gpu_s: float) -> float:
    """Seconds of a micro-batch that wait for weights. Forward and backward each hide theirs behind their own work; what
    is read from disk meanwhile is copied beside that."""
    if not work.streamed:
        return 0.0
    slowest = max(copies_s(work, card), reads_s(work, card))
    return sum(max(0.0, slowest - share * gpu_s) for share in shares(work))


def shares(work: Workload) -> tuple[float, float]:
    """Shares of a micro-batch's time that forward and backward take."""
    forward = work.model.layers * _forward_flops(work) / flops(work)[0]
    return forward, 1 - forward


def _adapters(work: Workload) -> int:
    """Parameters of one layer's adapters."""
    return 0 if work.full else sum(sum(work.model.linear(name)) for name in work.targets) * work.rank


def step_time(work: Workload, card: Card, accumulation: int) -> StepTime | None:
    """Estimated time of an optimizer step of `accumulation` micro-batches; None where the card's speed is not known."""
    if not (card.tflops and card.bandwidth_gbs):
        return None
    rate = card.tflops * 1e12 * (FP32_RATE if work.dtype == "fp32" else 1)
    launches, launch_s = LAUNCHES_PER_FUSED if work.fused else LAUNCHES_PER_OPERATION, (card.launch_us or 10) * 1e-6
    outlined = outline(work)
    moved = _moved(work, outlined)
    trained = work.model.parameters if work.full else _adapters(work) * work.model.layers
    moved += trained * 4 * 7 / accumulation  # Adam reads four, writes three
    offloaded = sum(kind == OFFLOADED for kind in work.layers)
    copied = 2 * offloaded * work.tokens * work.model.hidden * BYTES[work.dtype]
    made = StepTime(
        matrix_s=accumulation * flops(work)[0] / rate,
        attention_s=accumulation * _attention_s(work, card, rate),
        memory_s=accumulation * moved / (card.bandwidth_gbs * 1e9),
        link_s=accumulation * copied / link(card),
        launch_s=accumulation * outlined.operations * launches * launch_s,
    )
    update_s = work.model.layers * LAUNCHES_PER_UPDATE * launch_s if work.fused else 0.0
    return replace(made, stall_s=accumulation * _stalls(work, card, made.step_s / accumulation), update_s=update_s)
