"""How fast a model reads, and what a kernel for 2:4 would change, tried on the present card."""

from __future__ import annotations

import statistics
import time

import torch

from llamanb.data import TrainingData

TIMED = 3
"""Times that rows are read; the middle one counts."""
ROWS, TOKENS = 16, 4096
"""Read at once at most; one row at least."""


@torch.no_grad()
def tokens_per_s(model, data: TrainingData) -> float:
    """Tokens of held-out rows that the model reads in a second."""
    longest = max(len(row.input_ids) for row in data.held_out)
    rows = [torch.tensor(row.input_ids) for row in data.held_out[: max(1, min(ROWS, TOKENS // longest))]]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
    took = []
    for _ in range(TIMED + 1):
        begin_s = time.monotonic()
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
        if ids.is_cuda:
            torch.cuda.synchronize()
        took.append(time.monotonic() - begin_s)
    return sum(map(len, rows)) / statistics.median(took[1:])


def try_two_of_four(out: int = 4096, width: int = 4096, tokens: int = 2048) -> str:
    """What torch's kernel for 2:4 does on this card to a matrix (out, width), in words."""
    if not torch.cuda.is_available():
        return "no GPU here to try a kernel on"
    try:
        weight = torch.randn(out, width, dtype=torch.float16, device="cuda")
        weight *= torch.tensor([1, 1, 0, 0], device="cuda").repeat(width // 4)
        x = torch.randn(tokens, width, dtype=torch.float16, device="cuda")
        packed = torch.sparse.to_sparse_semi_structured(weight)
        parts = [part for part in (packed.packed, packed.meta) if part is not None]
        share = sum(part.numel() * part.element_size() for part in parts) / (2 * weight.numel())
        speed = _product_s(x, weight) / _product_s(x, packed)
    except (RuntimeError, NotImplementedError, AttributeError, ValueError) as error:
        return f"no kernel runs on this card ({str(error).splitlines()[0][:80]})"
    return f"converted for this card's kernel: {share:.2f} of the bytes, products {speed:.2f} times as fast"


def _product_s(x: torch.Tensor, weight: torch.Tensor, times: int = 20) -> float:
    for _ in range(2):  # the first round warms up
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            torch.nn.functional.linear(x, weight)
        end.record()
        torch.cuda.synchronize()
    return begin.elapsed_time(end) / times / 1000
