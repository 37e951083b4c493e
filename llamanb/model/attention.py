"""Attention for cards without FlashAttention, registered with transformers under EXPANDED_ATTENTION.

Llama 3 has fewer key and value heads than query heads. SDPA's memory-efficient kernel refuses that, so without
FlashAttention PyTorch takes the math kernel without a word: time and memory then grow with the square of the length.
One layer of 8B's attention, 2 × 4,096 tokens forward and backward: 16.5 GiB and 86 ms as transformers calls it, 2.9 GiB
and 37 ms with keys and values repeated for every query head, which the memory-efficient kernel takes
(tests/gpu/test_traps.py on an H200; benchmarks/results/gpu_tests.md).
"""

from __future__ import annotations

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from llamanb.layout import EXPANDED_ATTENTION


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


def register() -> None:
    """Makes EXPANDED_ATTENTION a name that `attn_implementation` takes."""
    AttentionInterface.register(EXPANDED_ATTENTION, expanded_attention)
    AttentionMaskInterface.register(EXPANDED_ATTENTION, sdpa_mask)
