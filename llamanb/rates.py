"""How fast this GPU is: matrix products, copies, launches and attention, timed.

`Card.measure` is the door to this module.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from llamanb.trials import DTYPES


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
        seconds: how long to multiply; copies and attention each take a quarter of it, launches less.
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
        # 500 at once are fewer than the GPU's queue holds: the last one waits for none before it
        return 1e6 * min(seconds_per_call(lambda: number.add_(1), device, burst=500) for _ in range(5))

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
        found, launched = [], [tried(launches)]
        for trial in (products, copies, from_host, *(partial(attention, kernel) for kernel in ("flash", "efficient"))):
            found.append(tried(trial))
            launched.append(tried(launches))  # what else the host does now and then adds to it: the quickest counts
        quickest = min((each for each in launched if each), default=None)
        return Rates(*found[:3], quickest, *found[3:])
