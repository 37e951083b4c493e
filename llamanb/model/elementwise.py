"""What lies between a layer's products, in plain PyTorch; on a GPU with Triton, `kernels.py` does the same faster.

Shapes: x and gradients of it (tokens, width). A gradient that a function is given is its own to overwrite.
"""

from __future__ import annotations

import importlib.util

import bitsandbytes.functional as bnb
import torch
from torch import Tensor
from torch.nn import functional as F


class Fast:
    """Whether Triton's kernels are used; `why_not` says what speaks against it."""

    why_not = "" if importlib.util.find_spec("triton") else "Triton is not installed"

    @classmethod
    def for_(cls, x: Tensor) -> bool:
        return x.is_cuda and not cls.why_not


def dequantize(weight: Tensor) -> Tensor:
    """(out, in) of a 4-bit weight of bitsandbytes, in the dtype it was quantized from."""
    state = weight.quant_state
    whole = weight.numel() % 32 == 0  # each constant has all of its 64 weights
    usual = whole and state.blocksize == 64 and (not state.nested or state.state2.blocksize == 256)
    if Fast.for_(weight) and usual:
        return _kernels().dequantize(weight.data, state)
    return bnb.dequantize_4bit(weight.data, state)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root mean square norm over the last dimension, in fp32 (Zhang and Sennrich 2019)."""
    if Fast.for_(x):
        return _kernels().rms_norm(x, weight, epsilon)
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return weight * scaled.to(x.dtype)


def rms_norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    if Fast.for_(x):
        return _kernels().rms_norm_backward(gradient, x, weight, epsilon)
    wide = x.float()
    root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    scaled, weighted = wide * root, (gradient * weight).float()
    return (root * (weighted - scaled * (weighted * scaled).mean(-1, keepdim=True))).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020)."""
    return _kernels().swiglu(gate, up) if Fast.for_(gate) else F.silu(gate) * up


def swiglu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    if Fast.for_(gate):
        return _kernels().swiglu_backward(gradient, gate, up)
    g, wide, u = gradient.float(), gate.float(), up.float()
    sigmoid = torch.sigmoid(wide)
    silu = wide * sigmoid
    return (g * u * (sigmoid + silu * (1 - sigmoid))).to(gate.dtype), (g * silu).to(up.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int = 1) -> Tensor:
    """Rotary position embeddings (Su et al. 2021), in transformers' order of a head's numbers: halves, not pairs.

    Shapes: x (tokens, heads, head size); cos and sin (tokens, head size). `sign` -1 turns back.
    """
    if Fast.for_(x):
        return _kernels().rotate(x, cos, sin, sign)
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos.unsqueeze(1) + turned * (sign * sin).unsqueeze(1)


def cross_entropy_(logits: Tensor, labels: Tensor) -> Tensor:
    """The summed loss of (tokens, vocabulary) logits, in nats; the logits' place is taken by their gradient."""
    if Fast.for_(logits):
        return _kernels().cross_entropy_(logits, labels)
    wide = logits.float()
    loss = F.cross_entropy(wide, labels, reduction="sum")
    wide = wide.softmax(-1)
    wide[torch.arange(len(labels), device=labels.device), labels] -= 1
    logits.copy_(wide)
    return loss


def _kernels():
    from llamanb.model import kernels

    return kernels
