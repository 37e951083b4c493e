"""What lies between a layer's products, in plain PyTorch; on a GPU with Triton, `kernels.py` does the same faster.

Shapes: x and gradients of it (tokens, width). A gradient that a function is given is its own to overwrite.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Params4bit
from torch import Tensor
from torch.nn import functional as F

from llamanb.nvml import first_line

PLAIN_TOKENS, PLAIN_ROWS = 256, 64
"""Tokens at once without the kernels, and rows of logits: in fp32 and step by step, all would take gigabytes."""


class Fast:
    """Whether Triton's kernels are used; `why_not` says what speaks against it."""

    why_not = "" if importlib.util.find_spec("triton") else "Triton is not installed"

    @classmethod
    def for_(cls, x: Tensor) -> bool:
        return x.is_cuda and not cls.why_not

    @classmethod
    def try_on(cls, weight: Tensor) -> None:
        """Runs every kernel once on the GPU and in the dtype of `weight`; where one fails, or there is no compiler for
        it, all is done in plain PyTorch from then on, and a warning says so."""
        if not cls.for_(weight):
            return
        x = torch.randn(4, 64, device=weight.device, dtype=weight.dtype)
        torch.cuda.synchronize()  # an earlier error is not the kernels'
        try:
            for function, args in (
                (rms_norm, (x, x[0], 1e-5)),
                (rms_norm_backward, (x.clone(), x, x[0], 1e-5)),
                (swiglu, (x, x)),
                (swiglu_backward, (x.clone(), x, x)),
                (rotate, (x.view(4, 2, 32), x[:, :32], x[:, :32])),
                (cross_entropy_, (x.clone(), torch.zeros(4, device=x.device, dtype=torch.int64))),
                (dequantize, (Params4bit(x.cpu(), quant_type="nf4", requires_grad=False).to(x.device),)),
            ):
                function(*args)
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler, a driver or a launch says
            cls.why_not = f"{type(error).__name__}: {first_line(error)}"
            warnings.warn(f"Triton's kernels do not run here, so steps take longer: {cls.why_not}", stacklevel=3)


def _by_tokens(own: bool = False) -> Callable[[Callable], Callable]:
    """Does a plain function on a GPU for PLAIN_TOKENS tokens after the other: tensors of as many tokens as the first
    are split, the others are taken as they are. `own`: the first is overwritten with the first result."""

    def wrap(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(first: Tensor, *args):
            if not first.is_cuda or Fast.for_(first) or len(first) <= PLAIN_TOKENS:
                return function(first, *args)
            split = [isinstance(a, Tensor) and a.dim() > 1 and len(a) == len(first) for a in args]
            results: list[Tensor] = [first] if own else []
            for begin in range(0, len(first), PLAIN_TOKENS):
                at = slice(begin, begin + PLAIN_TOKENS)
                found = function(first[at], *(a[at] if s else a for a, s in zip(args, split, strict=True)))
                found = found if isinstance(found, tuple) else (found,)
                results += [first.new_empty((len(first), *part.shape[1:])) for part in found[len(results) :]]
                for result, part in zip(results, found, strict=True):
                    result[at] = part
            return tuple(results) if len(results) > 1 else results[0]

        return call

    return wrap


def dequantize(weight: Tensor) -> Tensor:
    """(out, in) of a 4-bit weight of bitsandbytes, in the dtype it was quantized from."""
    packed, state = weight.data, weight.quant_state  # whatever is asked of bitsandbytes' parameter goes through Python
    whole = packed.numel() % 32 == 0  # each constant has all of its 64 weights
    usual = whole and state.blocksize == 64 and (not state.nested or state.state2.blocksize == 256)
    if Fast.for_(packed) and usual:
        return _kernels().dequantize(packed, state)
    return bnb.dequantize_4bit(packed, state)


@_by_tokens()
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root mean square norm over the last dimension, in fp32 (Zhang and Sennrich 2019)."""
    if Fast.for_(x):
        return _kernels().rms_norm(x, weight, epsilon)
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return weight * scaled.to(x.dtype)


@_by_tokens(own=True)
def rms_norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    if Fast.for_(x):
        return _kernels().rms_norm_backward(gradient, x, weight, epsilon)
    wide = x.float()
    root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    scaled, weighted = wide * root, (gradient * weight).float()
    return (root * (weighted - scaled * (weighted * scaled).mean(-1, keepdim=True))).to(x.dtype)


@_by_tokens()
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020)."""
    return _kernels().swiglu(gate, up) if Fast.for_(gate) else F.silu(gate) * up


@_by_tokens(own=True)
def swiglu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    if Fast.for_(gate):
        return _kernels().swiglu_backward(gradient, gate, up)
    g, wide, u = gradient.float(), gate.float(), up.float()
    sigmoid = torch.sigmoid(wide)
    silu = wide * sigmoid
    return (g * u * (sigmoid + silu * (1 - sigmoid))).to(gate.dtype), (g * silu).to(up.dtype)


@_by_tokens()
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
    loss = torch.zeros((), device=logits.device)
    for rows, right in zip(logits.split(PLAIN_ROWS), labels.split(PLAIN_ROWS), strict=True):
        wide = rows.float()
        loss += F.cross_entropy(wide, right, reduction="sum")
        wide = wide.softmax(-1)
        wide[torch.arange(len(right), device=right.device), right] -= 1
        rows.copy_(wide)
    return loss


@functools.cache
def _kernels():
    from llamanb.model import kernels

    return kernels
