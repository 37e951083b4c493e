"""What really runs here: precisions and attention kernels, each one tried on small tensors.

What a torch build, a GPU, a dtype and a head layout promise together is not always what runs. Llama 3 has fewer key and
value heads than query heads (grouped-query attention): on a T4 every fused kernel refuses that, and torch then takes
the math kernel without a word, whose memory grows with the square of the length.
"""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

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
    return " ".join(reasons) or plain(error)


def seconds_per_call(work: Callable[[], Any], device: str, at_least_s: float = 0.0, burst: int = 4) -> float:
    """Seconds that one `work()` takes, over bursts that keep a GPU's queue from running empty."""
    torch = importlib.import_module("torch")
    synchronize = partial(torch.cuda.synchronize, device) if torch.device(device).type == "cuda" else lambda: None
    for _ in range(2):  # loads kernels, and lets the clock rise
        work()
    synchronize()
    done, start = 0, time.perf_counter()
    while True:
        for _ in range(burst):
            work()
        synchronize()
        done, spent = done + burst, time.perf_counter() - start
        if spent >= at_least_s:
            return spent / done


@dataclass(frozen=True)
class Rates:
    """How fast a GPU is, in the units of `Card`; None where a trial did not run."""

    tflops: float | None
    bandwidth_gbs: float | None
    host_link_gbs: float | None
    launch_us: float | None
    flash_tflops: float | None = None
    efficient_tflops: float | None = None


def measure_rates(dtype: str, device: str, *, free_gib: float, seconds: float = 0.5) -> Rates:
    """Matrix products, copies in the GPU's memory and from pinned host memory, launches of a small operation, and
    attention.

    Up to 1 GiB of the GPU for a moment, half of what is free where that is less; 64 MiB of pinned host memory. The
    matrices are random: zeros switch fewer transistors and run faster than any model does. Attention has a head for
    each multiprocessor.

    Args:
        dtype: one of `DTYPES`, 16 bits wide.
        device: a torch device, a GPU.
        free_gib: what may be allocated.
        seconds: how long to multiply; all else takes about as long, and half again.
    """
    torch = importlib.import_module("torch")
    room = min(free_gib / 4, 0.5) * 2**30
    what = getattr(torch, DTYPES[dtype])

    def products() -> float:
        size = 8192
        while size > 512 and 3 * 2 * size**2 > room:
            size //= 2
        a, b = (torch.randn(size, size, device=device, dtype=what) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * size**3 / seconds_per_call(lambda: torch.mm(a, b, out=out), device, seconds) / 1e12

    def copies() -> float:
        size = int(room // 2)
        source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
        taken_s = seconds_per_call(lambda: target.copy_(source), device, seconds / 4)
        return 2 * size / taken_s / 1e9  # read once, written once

    def from_host() -> float:
        size = min(64 * 2**20, int(room))
        source = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
        target = torch.zeros(size, dtype=torch.uint8, device=device)
        return size / seconds_per_call(lambda: target.copy_(source, non_blocking=True), device, seconds / 4) / 1e9

    def launches() -> float:
        number = torch.zeros(1, device=device)
        # 500 at once are fewer than the GPU's queue holds: the last one waits for none before it. What else the host
        # does adds to some bursts: the fastest of them counts.
        return 1e6 * min(seconds_per_call(lambda: number.add_(1), device, burst=500) for _ in range(20))

    def attention(kernel: str) -> float:
        aten, backends = torch.ops.aten, importlib.import_module("torch.nn.attention")
        heads, size, length = torch.cuda.get_device_properties(device).multi_processor_count, 128, 2048
        while length > 256 and 12 * 2 * length * heads * size > 2 * room:  # what both passes keep, and work with
            length //= 2

        def flash() -> None:
            query, key, value = (leaf.transpose(1, 2) for leaf in leaves)
            output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            torch.autograd.grad(output, leaves, gradient.transpose(1, 2))

        def efficient() -> None:  # causal (1), and each block whole, as turns.py counts them: torch would split some
            output, sums, seed, offset, *_ = aten._efficient_attention_forward(
                *leaves, None, None, None, None, None, 0.0, 1, True
            )
            aten._efficient_attention_backward(
                gradient, *leaves, None, output, None, None, length, length, sums, 0.0, seed, offset, 1, False,
                num_splits_key=1,
            )  # fmt: skip

        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(kernel == "flash"),
            torch.autograd.set_multithreading_enabled(False),
            backends.sdpa_kernel(backends.SDPBackend.FLASH_ATTENTION),
        ):
            gradient, *leaves = (torch.randn(1, length, heads, size, device=device, dtype=what) for _ in range(4))
            for leaf in leaves:
                leaf.requires_grad_(kernel == "flash")
            taken_s = seconds_per_call(flash if kernel == "flash" else efficient, device, seconds / 4)
        return 3.5 * 2 * length**2 * heads * size / taken_s / 1e12

    def tried(trial: Callable[[], float]) -> float | None:
        try:
            return trial()
        except Exception:  # no room, no pinned memory, no such kernel: a figure less
            return None
        finally:
            torch.cuda.empty_cache()

    with torch.inference_mode():
        attentions = (tried(partial(attention, kernel)) for kernel in ("flash", "memory-efficient"))
        return Rates(tried(products), tried(copies), tried(from_host), tried(launches), *attentions)


def plain(error: Exception) -> str:
    text = first_line(error) or type(error).__name__
    if text.startswith(("No available kernel", "No viable backend")):  # and no reason came with it
        return "torch has no such kernel for this device and dtype"
    return text
