"""The words of a tape: what a step depends on, and the tape itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llamanb.architecture import Architecture
from llamanb.recipe import LINEAR_LAYERS

STORED, HALVED, CHECKPOINTED, OFFLOADED = "stored", "mlp checkpointed", "checkpointed", "offloaded"
"""What becomes of a layer's activations: kept; kept but for the MLP's, which are recomputed from the stream before it;
all recomputed from the layer's input; the same with the input in host memory."""
KERNELS = ("flash", "cudnn", "memory-efficient", "math")
"""Attention kernels; `memory-efficient` is taken with keys and values expanded to all heads (model/attention.py, and
model/row_attention.py for fused layers)."""
BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}

HEAD_TILE = 512
"""Tokens whose logits exist at once in the loss of fused layers (model/head.py)."""
BUFFERS, ALIGNED = 2, 256
"""Buffers on the card that streamed layers take turns in, and bytes to which each weight in them begins."""
STAGED = 2
"""Layers that wait on disk and are in host memory at once, on their way to the card."""
MLP_TILE = 4096
"""Tokens at once at most in the MLP of a fused layer that is recomputed: beyond, gate and up would be the peak."""
LOSS_ROWS, LOSS_COLUMNS = 4096, 32768
"""Tile of logits in trl 1.16 (TOKEN_CHUNK_SIZE, _CHUNKED_LOGPROB_CHUNK_SIZE)."""
JOINED = 4 * 2**20
"""Elements of adapters at most that are copied together for one update; a longer tensor is updated in place."""
BLOCK = 64
"""Weights under one quantization constant in 4 bits (bitsandbytes' default)."""
PAGED_FROM, QUANTIZED_FROM, STATE_BLOCK = 100_000, 4096, 256
"""bitsandbytes' optimizers: elements from which a state is paged, from which it is 8-bit, and under one constant."""

WEIGHTS, CONSTANTS, EMBEDDINGS, ADAPTERS = "weights", "quantization constants", "embeddings and head", "adapters"
GRADIENTS, OPTIMIZER, ACTIVATIONS = "gradients", "optimizer", "activations"
LOSS, TEMPORARIES, LIBRARIES = "loss", "temporaries", "cuBLAS workspace"
BUCKETS = (WEIGHTS, CONSTANTS, EMBEDDINGS, ADAPTERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOSS, TEMPORARIES, LIBRARIES)
LOAD, ADAPT, FORWARD, HEAD, HEAD_BACKWARD = "load", "adapters made", "forward", "loss", "backward of the loss"
BACKWARD, RECOMPUTED, STEP = "backward", "backward of a recomputed layer", "optimizer step"
INSTANTS = (LOAD, ADAPT, FORWARD, HEAD, HEAD_BACKWARD, BACKWARD, RECOMPUTED, STEP)
"""Parts of a training, each with a peak of its own."""
EMPTIED = "cache emptied"
"""Mark of the moment at which transformers gives the allocator's free memory back, before the first step."""


@dataclass(frozen=True)
class Workload:
    """All that a step's memory depends on."""

    model: Architecture
    rows: int
    """Rows of a micro-batch."""
    length: int
    """Tokens a row, the longest of the micro-batch."""
    layers: tuple[str, ...]
    """STORED, HALVED, CHECKPOINTED or OFFLOADED for each decoder layer, the first one first."""
    fused: bool = False
    """Layers and loss as model/fused.py computes them, not as transformers, peft and trl do."""
    dtype: str = "fp16"
    quantization: str | None = "nf4"
    """nf4, fp4, int8, or None for weights in `dtype`."""
    full: bool = False
    """All weights are trained, in fp32 under autocast; no adapters."""
    double_quant: bool = True
    rank: int = 16
    targets: tuple[str, ...] = LINEAR_LAYERS
    dropout: bool = False
    optimizer: str = "paged_adamw_8bit"
    kernel: str = "memory-efficient"
    padded: bool = True
    """Rows of unequal length in a micro-batch: attention then needs a mask. One row alone never does."""
    accumulation: int = 2
    """Micro-batches in an optimizer step; from the second on gradients are there from the start."""
    trained_tokens: int | None = None
    """Tokens of a micro-batch that the loss is taken on; None: all of them, the most there can be."""
    blas_workspace: int = 8_519_680
    """Bytes that cuBLAS holds: a workspace for each thread that calls it, and one thread does."""
    joined: bool = True
    """Adapters are updated several at once (training/optimizer.py), where bitsandbytes updates them."""
    streamed: int = 0
    """Layers whose weights lie in host memory (model/streamed.py), spread over all of them."""
    shards: int = 1
    """Cards that share those weights instead, each with a part of every layer on it (scale/sharded.py)."""

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def replace(self, **changes) -> Workload:
        return replace(self, **changes)


def spread(count: int, layers: int) -> tuple[int, ...]:
    """`count` of the numbers below `layers`, as evenly as can be, the last one among them: so that a copy has as many
    layers' work as there is to hide behind."""
    return tuple(n for n in range(layers) if (n + 1) * count // layers > n * count // layers)


def joined(sizes: Sequence[int], of_layer: int) -> list[range]:
    """Which tensors of so many elements, by number, one of bitsandbytes' updates is for: neighbours of whole blocks
    in the same layer, which has `of_layer` tensors. Every tensor is in one."""
    made: list[range] = []
    room = 0
    for number, size in enumerate(sizes):
        whole = size % STATE_BLOCK == 0 and size >= QUANTIZED_FROM
        if number % of_layer and whole and size <= room:
            made[-1] = range(made[-1].start, number + 1)
            room -= size
        else:
            made.append(range(number, number + 1))
            room = JOINED - size if whole else 0
    return made


def mlp_tile(tokens: int) -> int:
    """Tokens of a tile, all of them alike but for the last."""
    return -(-tokens // -(-tokens // MLP_TILE))


class Tape:
    """Allocations and frees in order. `events`: slot + 1 where one is allocated, -(slot + 1) where it is freed."""

    def __init__(self):
        self.events: list[int] = []
        self.sizes: list[int] = []
        self.buckets: list[str] = []
        self.marks: list[tuple[int, str]] = []
        """(events before it, what begins there)."""
        self.dequantized = 0
        """Bytes of all weights that fused layers have dequantized, each as often as it was."""

    def new(self, size: int, bucket: str = TEMPORARIES) -> int:
        self.sizes.append(size)
        self.buckets.append(bucket)
        self.events.append(len(self.sizes))
        return len(self.sizes) - 1

    def free(self, *slots: int | None) -> None:
        for slot in slots:
            if slot is not None:
                self.events.append(-slot - 1)

    def keep(self, *slots: int | None) -> None:
        """Makes temporaries activations: they wait for the backward pass."""
        for slot in slots:
            if slot is not None:
                self.buckets[slot] = ACTIVATIONS

    def mark(self, name: str) -> None:
        self.marks.append((len(self.events), name))
