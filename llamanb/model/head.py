"""The loss from the last hidden states, a tile of logits at a time; nothing of them is kept.

Whole logits of 4,096 tokens are 1 GiB, twice that with their gradient. The head is frozen, so a tile's gradient of the
hidden states can be had at once from the tile itself, which is then gone: two products with the head instead of the
three that computing the logits again in the backward pass takes (Hsu et al. 2024, Liger Kernel).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llamanb.data.encode import IGNORE
from llamanb.model.elementwise import cross_entropy_
from llamanb.tape import HEAD_TILE


def head_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy summed over the trained tokens, in nats.

    Args:
        hidden: (tokens, hidden), after the last norm.
        weight: of the head, (vocabulary, hidden), frozen.
        labels: (tokens,), the token that each is to be followed by; IGNORE where nothing is trained.
    """
    trained = (labels != IGNORE).nonzero().squeeze(1)
    return _HeadLoss.apply(hidden, weight, trained, labels[trained])


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, trained: Tensor, labels: Tensor) -> Tensor:
        gradient = hidden.new_empty((len(trained), hidden.shape[1]))
        loss = torch.zeros((), device=hidden.device)
        tiles = (t.split(HEAD_TILE) for t in (trained, labels, gradient))
        for rows, right, out in zip(*tiles, strict=True):
            logits = hidden[rows] @ weight.t()
            loss += cross_entropy_(logits, right)
            torch.mm(logits, weight, out=out)
            del logits
        ctx.save_for_backward(gradient, trained)
        ctx.shape = hidden.shape
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor):
        gradient, trained = ctx.saved_tensors
        whole = gradient.new_zeros(ctx.shape)
        for rows, part in zip(trained.split(HEAD_TILE), gradient.split(HEAD_TILE), strict=True):
            whole[rows] = (part.float() * scale).to(part.dtype)  # fp16's loss scale alone may leave fp16's range
        return whole, None, None, None
