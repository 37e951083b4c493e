"""Causal attention of rows that lie one behind the other, for fused layers: by the kernel that a card has, keeping what
the backward pass needs and no more.

FlashAttention and the memory-efficient kernel both take rows of uneven lengths by their borders. The latter takes no
grouped heads (attention.py); here keys and values are repeated for as long as it runs, and not kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llamanb import turns

CAUSAL = 1
"""The memory-efficient kernel's number for a mask in which each token sees itself and what comes before."""


def for_rows(lengths: Sequence[int], kernel: str, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Causal attention for rows of these lengths that lie one behind the other and do not see each other.

    The function takes queries, keys and values, (tokens, heads, head size), the latter two with fewer heads, and gives
    (tokens, heads, head size). Rows of one length go through scaled_dot_product_attention, or the memory-efficient
    kernel, as a batch; others through that kernel or FlashAttention with their borders.
    """
    efficient, longest = kernel == "memory-efficient", max(lengths)
    if len(set(lengths)) == 1:
        if efficient:
            return lambda q, k, v: _Efficient.apply(q, k, v, None, longest)
        return lambda q, k, v: _sdpa(*(_batch(t, None, longest) for t in (q, k, v))).flatten(0, 1)
    if not kernel:

        def each(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rows = zip(*(t[None].split(list(lengths), dim=1) for t in (q, k, v)), strict=True)
            return torch.cat([_sdpa(*row)[0] for row in rows])

        return each
    borders = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
    if efficient:
        return lambda q, k, v: _Efficient.apply(q, k, v, borders, longest)
    return lambda q, k, v: torch.ops.aten._flash_attention_forward(
        q, k, v, borders, borders, longest, longest, 0.0, True, False
    )[0]


def _batch(t: Tensor, borders: Tensor | None, longest: int) -> Tensor:
    """(rows, tokens, heads, head size), or one row of all where `borders` part them."""
    return t.unflatten(0, (-1, longest)) if borders is None else t[None]


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(batch, tokens, heads, head size) each."""
    turned = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*turned, is_causal=True, enable_gqa=True).transpose(1, 2)


class _Efficient(torch.autograd.Function):
    """The memory-efficient kernel, causal, with keys and values repeated for as long as it runs: what is kept is not.

    Shapes: query (tokens, heads, head size); key and value with their own heads. `longest`: tokens of each row, or of
    the longest where `borders` part them, the cumulated lengths of rows (0 first, int32).
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, borders: Tensor | None, longest: int) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        repeated = (_batch(t, borders, longest).repeat_interleave(groups, dim=2) for t in (key, value))
        told = None if borders is None else longest
        output, normalizer, seed, offset, _, _ = torch.ops.aten._efficient_attention_forward(
            _batch(query, borders, longest), *repeated, None, borders, borders, told, told, 0.0, CAUSAL, True
        )
        output = output.flatten(0, 1)
        ctx.save_for_backward(query, key, value, output, normalizer, seed, offset, borders)
        ctx.groups, ctx.longest = groups, longest
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        query, key, value, output, normalizer, seed, offset, borders = ctx.saved_tensors
        gradient, query, key, value, output = (
            _batch(t, borders, ctx.longest) for t in (gradient, query, key, value, output)
        )
        repeated = [t.repeat_interleave(ctx.groups, dim=2) for t in (key, value)]
        of_query, *of_repeated, _ = torch.ops.aten._efficient_attention_backward(
            gradient, query, *repeated, None, output, borders, borders, ctx.longest, ctx.longest, normalizer, 0.0,
            seed, offset, CAUSAL, False, num_splits_key=splits(query, ctx.longest),
        )  # fmt: skip
        del repeated
        of_key, of_value = (t.unflatten(2, (-1, ctx.groups)).sum(3).flatten(0, 1) for t in of_repeated)
        return of_query.flatten(0, 1), of_key, of_value, None, None


def splits(query: Tensor, longest: int) -> int:
    """Parts into which the memory-efficient kernel's backward is to split the keys of rows of up to `longest` tokens;
    query (batch, tokens, heads, head size). One part adds up in the same order each time, more do not."""
    there, size = torch.cuda.get_device_properties(query.device), query.shape[3]
    if torch.are_deterministic_algorithms_enabled() or not turns.may_split(there.major, size):
        return 1
    rows = round(query.shape[0] * query.shape[1] / longest)  # at least one
    return turns.best_parts(rows * query.shape[2], turns.blocks_at_once(there.multi_processor_count, size), longest)
