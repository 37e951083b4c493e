"""Causal attention of rows that lie one behind the other, for fused layers: by the kernel that a card has, keeping what
the backward pass needs and no more.

FlashAttention and the memory-efficient kernel both take rows of uneven lengths by their borders. The latter takes no
grouped heads (attention.py); here keys and values are repeated for as long as it runs, and not kept.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CAUSAL = 1
"""The memory-efficient kernel's number for a mask in which each token sees itself and what comes before."""
NARROW, AT_ONCE = 64, 3
"""Blocks of the memory-efficient kernel's backward that a multiprocessor takes at once, with heads up to so wide."""
ADDING_UP, MOST_SPLITS = 174, 16
"""Tokens of a row whose turn takes as long as adding up does. By these, the backward takes 1.01 times as long as with
the best of nine numbers of parts, on average over 22 shapes on an H200, and 1.10 at most
(benchmarks/attention_splits.py, benchmarks/results/speed.md)."""


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
            seed, offset, CAUSAL, False, num_splits_key=splits(query, borders, ctx.longest),
        )  # fmt: skip
        del repeated
        of_key, of_value = (t.unflatten(2, (-1, ctx.groups)).sum(3) for t in of_repeated)
        return of_query, of_key, of_value, None, None


def splits(query: Tensor, borders: Tensor | None, longest: int) -> int:
    """Parts into which the memory-efficient kernel's backward is to split each row's keys; query (batch, tokens, heads,
    head size)."""
    rows = len(borders) - 1 if borders is not None else len(query)
    there = torch.cuda.get_device_properties(query.device).multi_processor_count
    return _splits(rows * query.shape[2], there * (AT_ONCE if query.shape[3] <= NARROW else 1), longest)


@functools.cache
def _splits(blocks: int, places: int, longest: int) -> int:
    """One part of one row and head is one block of threads, of which the GPU has room for so many at once: all take as
    many turns as that makes, each of a part's time, and add up their parts of the queries' gradient."""
    turns = {parts: math.ceil(blocks * parts / places) / parts for parts in range(1, MOST_SPLITS + 1)}
    return min(turns, key=lambda parts: turns[parts] + (turns[1] * ADDING_UP / longest if parts > 1 else 0))
