"""Attention for cards without FlashAttention, registered with transformers under EXPANDED_ATTENTION.

Llama 3 has fewer key and value heads than query heads. SDPA's memory-efficient kernel refuses that, so without
FlashAttention PyTorch takes the math kernel without a word: time and memory then grow with the square of the length.
One layer of 8B's attention, 2 × 4,096 tokens forward and backward: 16.5 GiB and 86 ms as transformers calls it, 2.9 GiB
and 37 ms with keys and values repeated for every query head, which the memory-efficient kernel takes
(tests/gpu/test_traps.py on an H200; benchmarks/results/gpu_tests.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from llamanb.layout import EXPANDED_ATTENTION

CAUSAL = 1
"""The memory-efficient kernel's number for a mask in which each token sees itself and what comes before."""


def expanded_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention, a key and value head for each query head.

    Shapes: query (batch, heads, tokens, head size); key and value (batch, key heads, seen tokens, head size); mask
    (batch, 1, tokens, seen tokens) or None for causal. Returns (batch, tokens, heads, head size).
    """
    groups = query.shape[1] // key.shape[1]
    output = torch.nn.functional.scaled_dot_product_attention(
        query,
        key.repeat_interleave(groups, dim=1),
        value.repeat_interleave(groups, dim=1),
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=attention_mask is None and query.shape[2] > 1,
    )
    return output.transpose(1, 2).contiguous(), None


def for_rows(lengths: Sequence[int], kernel: str, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Causal attention for rows of these lengths that lie one behind the other and do not see each other.

    The function takes queries, keys and values, (tokens, heads, head size), the latter two with fewer heads, and gives
    (tokens, heads, head size). Rows of one length go through scaled_dot_product_attention, or the memory-efficient
    kernel, as a batch; others through that kernel or FlashAttention with their borders.
    """
    if len(set(lengths)) == 1:
        shape = (len(lengths), lengths[0])
        efficient = kernel == "memory-efficient"

        def even(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            batch = [t.unflatten(0, shape) for t in (q, k, v)]
            return (_Efficient.apply(*batch, None, None) if efficient else _sdpa(*batch)).flatten(0, 1)

        return even
    if not kernel:

        def each(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rows = zip(*(t[None].split(list(lengths), dim=1) for t in (q, k, v)), strict=True)
            return torch.cat([_sdpa(*row)[0] for row in rows])

        return each
    borders = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
    longest = max(lengths)
    if kernel == "memory-efficient":
        return lambda q, k, v: _Efficient.apply(q[None], k[None], v[None], borders, longest)[0]
    return lambda q, k, v: torch.ops.aten._flash_attention_forward(
        q, k, v, borders, borders, longest, longest, 0.0, True, False
    )[0]


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(batch, tokens, heads, head size) each."""
    turned = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*turned, is_causal=True, enable_gqa=True).transpose(1, 2)


class _Efficient(torch.autograd.Function):
    """The memory-efficient kernel, causal, with keys and values repeated for as long as it runs: what is kept is not.

    Shapes: query (batch, tokens, heads, head size); key and value with their own heads. With `borders`, the cumulated
    lengths of rows (0 first, int32), the batch is one of several rows that do not see each other.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, borders: Tensor | None, longest: int | None) -> Tensor:
        groups = query.shape[2] // key.shape[2]
        repeated = (t.repeat_interleave(groups, dim=2) for t in (key, value))
        output, normalizer, seed, offset, _, _ = torch.ops.aten._efficient_attention_forward(
            query, *repeated, None, borders, borders, longest, longest, 0.0, CAUSAL, True
        )
        ctx.save_for_backward(query, key, value, output, normalizer, seed, offset, borders)
        ctx.groups, ctx.longest = groups, longest or query.shape[1]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        query, key, value, output, normalizer, seed, offset, borders = ctx.saved_tensors
        repeated = [t.repeat_interleave(ctx.groups, dim=2) for t in (key, value)]
        of_query, *of_repeated, _ = torch.ops.aten._efficient_attention_backward(
            gradient, query, *repeated, None, output, borders, borders, ctx.longest, ctx.longest, normalizer, 0.0,
            seed, offset, CAUSAL, False, num_splits_key=splits(query, borders),
        )  # fmt: skip
        del repeated
        of_key, of_value = (t.unflatten(2, (-1, ctx.groups)).sum(3) for t in of_repeated)
        return of_query, of_key, of_value, None, None


def splits(query: Tensor, borders: Tensor | None) -> int:
    """Parts into which the memory-efficient kernel's backward is to split each row's keys.

    One part of one row and head is one block of threads, and there should be as many as the GPU has multiprocessors.
    torch splits further, and the parts then wait for each other to add up: of this kernel's time on an H200 that is
    5 % at 1 × 2,048 tokens of 8B, a fifth at 4 × 512.
    """
    rows = len(borders) - 1 if borders is not None else len(query)
    there = torch.cuda.get_device_properties(query.device).multi_processor_count
    return max(1, round(there / (rows * query.shape[2])))


def register() -> None:
    """Makes EXPANDED_ATTENTION a name that `attn_implementation` takes."""
    AttentionInterface.register(EXPANDED_ATTENTION, expanded_attention)
    AttentionMaskInterface.register(EXPANDED_ATTENTION, sdpa_mask)
