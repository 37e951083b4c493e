"""What really runs here: precisions and attention kernels, each one tried on small tensors.

What a torch build, a GPU, a dtype and a head layout promise together is not always what runs. Llama 3 has fewer key and
value heads than query heads (grouped-query attention): on a T4 every fused kernel refuses that, and torch then takes
the math kernel without a word, whose memory grows with the square of the length.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from llamanb.nvml import first_line

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""The names used in recipes and cards, and what torch calls them."""

KERNELS = {
    "flash": ("FLASH_ATTENTION", "flash"),
    "cudnn": ("CUDNN_ATTENTION", "cudnn"),
    "memory-efficient": ("EFFICIENT_ATTENTION", "mem_efficient"),
    "math": ("MATH", "math"),
}
"""Kernels of scaled_dot_product_attention: torch's name in `SDPBackend`, and in `torch.backends.cuda.enable_*_sdp`."""


@dataclass(frozen=True)
class Attention:
    """Which kernels of scaled_dot_product_attention ran. Each kernel maps to "" when it ran, or to why it did not."""

    dtype: str
    device: str
    plain: dict[str, str]
    """With as many key and value heads as query heads."""
    grouped: dict[str, str]
    """With fewer of them and `enable_gqa=True`, as transformers calls it for Llama 3."""

    def runs(self, gqa: bool = False) -> tuple[str, ...]:
        """Names of the kernels that ran."""
        return tuple(kernel for kernel, error in (self.grouped if gqa else self.plain).items() if not error)


def working_attention(
    dtype: str = "fp16", device: str = "cuda", *, heads: int = 8, kv_heads: int = 2, head_dim: int = 128
) -> Attention:
    """Runs each attention kernel, forward and backward, on 64 tokens, and compares it with fp32 on the CPU.

    A kernel that is switched off in this process (`torch.backends.cuda.enable_flash_sdp(False)`) counts as not running.
    The caller's random state is left alone.

    Args:
        dtype: one of `DTYPES`.
        device: a torch device.
        heads, kv_heads, head_dim: shape of the attention; Llama 3's heads are 64 or 128 wide.
    """
    torch = importlib.import_module("torch")
    functional = torch.nn.functional
    attention = importlib.import_module("torch.nn.attention")
    source = torch.Generator().manual_seed(0)

    def inputs(group: int) -> list:
        # (batch, heads, tokens, head_dim), laid out as transformers hands them over
        shapes = [(1, 64, n, head_dim) for n in (heads, heads // group, heads // group)]
        return [torch.randn(shape, generator=source).transpose(1, 2) for shape in shapes]

    def forward_backward(tensors: Sequence, group: int, where: str, what) -> list:
        leaves = [tensor.detach().to(where, what).requires_grad_() for tensor in tensors]
        out = functional.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=group > 1)
        gradients = torch.autograd.grad(out.float().square().sum(), leaves)
        return [tensor.detach().float().cpu() for tensor in (out, *gradients)]

    def why_not(kernel: str, tensors: Sequence, group: int, expected: Sequence) -> str:
        backend, switch = KERNELS[kernel]
        if not getattr(torch.backends.cuda, f"{switch}_sdp_enabled")():
            return f"switched off: torch.backends.cuda.enable_{switch}_sdp(False)"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with attention.sdpa_kernel(getattr(attention.SDPBackend, backend)):
                    got = forward_backward(tensors, group, device, getattr(torch, DTYPES[dtype]))
            except Exception as error:  # the kernel's refusal is the answer, whatever its type
                return refusal(kernel, error, [str(warning.message) for warning in caught])
        for is_, should_be in zip(got, expected, strict=True):
            distance = ((is_ - should_be).norm() / should_be.norm()).item()
            if not distance < 0.03:  # 16-bit rounding gives 0.0005 to 0.005; NaN ends here too
                return f"it ran, but its result is off by {distance:.2g}, relative to fp32"
        return ""

    found = {}
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autograd.set_multithreading_enabled(False),  # the cuBLAS workspace of another thread would stay
    ):
        for group in (1, heads // kv_heads):
            tensors = inputs(group)
            with attention.sdpa_kernel(attention.SDPBackend.MATH):  # runs even where the caller has switched it off
                expected = forward_backward(tensors, group, "cpu", torch.float32)
            found[group] = {kernel: why_not(kernel, tensors, group, expected) for kernel in KERNELS}
    return Attention(dtype, str(device), plain=found[1], grouped=found[heads // kv_heads])


def refusal(kernel: str, error: Exception, messages: Sequence[str]) -> str:
    """Why `kernel` did not run, from torch's error and the warnings that came with it.

    Torch raises one error for all ("No available kernel") and warns the reasons in turns: a line "<Kernel> kernel not
    used because:" per kernel, its reasons after it (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
    """
    reasons, mine = [], False
    for message in messages:
        text = message.split(" (Triggered internally", 1)[0].strip()
        if text.endswith("kernel not used because:"):
            mine = text.lower().replace(" ", "-").startswith(kernel)
        elif mine and text not in reasons:
            reasons.append(text)
    return " ".join(reasons) or in_words(error)


def in_words(error: Exception) -> str:
    """The first line of an error, or what torch means by one that says nothing."""
    text = first_line(error) or type(error).__name__
    if text.startswith(("No available kernel", "No viable backend")):  # and no reason came with it
        return "torch has no such kernel for this device and dtype"
    return text
