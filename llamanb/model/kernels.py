"""The Triton kernels between a layer's products: one pass over memory where PyTorch takes three to ten.

Elementwise work and sums along a row only, no matrix products: Triton compiles those for every card from the T4 on
(`tl.dot` begins with sm_80; tests/unit/test_kernels.py compiles all of them for sm_75). All tensors are contiguous in
their last dimension. Arithmetic is fp32; each function is named like its plain form in `elementwise.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BYTES_AT_ONCE, NUMBERS_AT_ONCE = 1024, 2048
"""Packed bytes, two weights each, that one program of `dequantize` takes; and numbers, one of `swiglu`."""


def _power_of_2(n: int) -> int:
    """The smallest that is no less. Triton's own, like its cdiv, takes as long as a launch."""
    return 1 << (n - 1).bit_length()


@triton.jit
def _dequantize(
    packed, constants, values, levels, scales, mean, out, bytes_, nested: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    # 32 bytes lie under one constant, 256 constants under one scale (bitsandbytes' block sizes); written out, because
    # Triton compares a kernel's globals at each launch
    blocks = tl.program_id(0) * (block // 32) + tl.arange(0, block // 32)
    real = blocks < bytes_ // 32
    constant = tl.load(constants + blocks, real, 0)
    if nested:
        constant = tl.load(levels + constant.to(tl.int32)) * tl.load(scales + blocks // 256, real, 0)
        constant = constant + tl.load(mean)
    at = blocks[:, None] * 32 + tl.arange(0, 32)[None, :]
    pair = tl.load(packed + at, real[:, None], 0).to(tl.int32)
    first = tl.load(values + (pair >> 4)) * constant[:, None]
    second = tl.load(values + (pair & 15)) * constant[:, None]
    at = blocks[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out + at, tl.interleave(first, second), real[:, None])


def dequantize(weight: Tensor, state) -> Tensor:
    """The (out, in) weight of bitsandbytes' packed bytes and QuantState, bit for bit as its own kernels make it."""
    out = torch.empty(state.shape, dtype=state.dtype, device=weight.device)
    inner = state.state2 if state.nested else state
    scales, mean = (inner.absmax, state.offset) if state.nested else (state.absmax, state.absmax)
    count = weight.numel()
    _dequantize[(-(-count // BYTES_AT_ONCE),)](
        weight, state.absmax, state.code, inner.code, scales, mean, out, count, state.nested, BYTES_AT_ONCE,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


@triton.jit
def _rms_norm(x, weight, out, width, epsilon, block: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    real = at < width
    wide = tl.load(x + row * width + at, real, 0).to(tl.float32)
    root = tl.rsqrt(tl.sum(wide * wide) / width + epsilon)
    scaled = (wide * root).to(out.dtype.element_ty).to(tl.float32)  # rounded as the plain form does
    tl.store(out + row * width + at, scaled * tl.load(weight + at, real, 0), real)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    out = torch.empty_like(x)
    _rms_norm[(len(x),)](x, weight, out, x.shape[1], epsilon, _power_of_2(x.shape[1]), num_warps=8)
    return out


@triton.jit
def _rms_norm_backward(gradient, x, weight, width, epsilon, block: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    real = at < width
    wide = tl.load(x + row * width + at, real, 0).to(tl.float32)
    root = tl.rsqrt(tl.sum(wide * wide) / width + epsilon)
    scaled = wide * root
    weighted = tl.load(gradient + row * width + at, real, 0).to(tl.float32) * tl.load(weight + at, real, 0)
    mean = tl.sum(weighted * scaled) / width
    tl.store(gradient + row * width + at, root * (weighted - scaled * mean), real)


def rms_norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    width = x.shape[1]
    _rms_norm_backward[(len(x),)](gradient, x, weight, width, epsilon, _power_of_2(width), num_warps=8)
    return gradient


@triton.jit
def _swiglu(gate, up, out, count, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    g = tl.load(gate + at, at < count, 0).to(tl.float32)
    silu = (g * tl.sigmoid(g)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + at, silu * tl.load(up + at, at < count, 0), at < count)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    count = gate.numel()
    _swiglu[(-(-count // NUMBERS_AT_ONCE),)](gate, up, out, count, NUMBERS_AT_ONCE)
    return out


@triton.jit
def _swiglu_backward(gradient, gate, up, of_up, count, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    d = tl.load(gradient + at, at < count, 0).to(tl.float32)
    g = tl.load(gate + at, at < count, 0).to(tl.float32)
    u = tl.load(up + at, at < count, 0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    silu = g * sigmoid
    tl.store(gradient + at, d * u * (sigmoid + silu * (1 - sigmoid)), at < count)
    tl.store(of_up + at, d * silu, at < count)


def swiglu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    of_up = torch.empty_like(up)
    count = gate.numel()
    _swiglu_backward[(-(-count // NUMBERS_AT_ONCE),)](gradient, gate, up, of_up, count, NUMBERS_AT_ONCE)
    return gradient, of_up


@triton.jit
def _rotate(x, out, by_token, by_head, cos, sin, heads, half, sign, block_heads: tl.constexpr, block: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head, at = tl.arange(0, block_heads)[:, None], tl.arange(0, block)[None, :]
    real = (head < heads) & (at < half)
    c = tl.load(cos + token * 2 * half + at, at < half, 0).to(tl.float32)
    s = tl.load(sin + token * 2 * half + at, at < half, 0).to(tl.float32) * sign
    source = x + token * by_token + head * by_head + at
    first, second = tl.load(source, real, 0).to(tl.float32), tl.load(source + half, real, 0).to(tl.float32)
    target = out + token * heads * 2 * half + head * 2 * half + at
    tl.store(target, first * c - second * s, real)
    tl.store(target + half, second * c + first * s, real)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    tokens, heads, size = x.shape
    out = torch.empty((tokens, heads, size), dtype=x.dtype, device=x.device)
    blocks = _power_of_2(heads), _power_of_2(size // 2)
    _rotate[(tokens,)](x, out, x.stride(0), x.stride(1), cos, sin, heads, size // 2, sign, *blocks)
    return out


@triton.jit
def _cross_entropy(logits, labels, losses, columns: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    label = tl.load(labels + row)
    right = tl.load(logits + label).to(tl.float32)
    largest, total = tl.full((), float("-inf"), tl.float32), tl.full((), 0, tl.float32)
    for begin in range(0, columns, block):
        at = begin + tl.arange(0, block)
        wide = tl.load(logits + at, at < columns, float("-inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(wide))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(wide - new))
        largest = new
    for begin in range(0, columns, block):
        at = begin + tl.arange(0, block)
        wide = tl.load(logits + at, at < columns, float("-inf")).to(tl.float32)
        tl.store(logits + at, tl.exp(wide - largest) / total - (at == label), at < columns)
    tl.store(losses + row, tl.log(total) + largest - right)


def cross_entropy_(logits: Tensor, labels: Tensor) -> Tensor:
    losses = torch.empty(len(logits), device=logits.device)
    _cross_entropy[(len(logits),)](logits, labels, losses, logits.shape[1], 4096, num_warps=8)
    return losses.sum()
