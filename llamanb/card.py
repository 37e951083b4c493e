"""One GPU's facts, asked for and tried on this machine.

    from llamanb import Card
    Card.here()             # what plans start from: this machine's GPU, with what is known of its speed
    Card.measure()          # the same, its speed and overhead measured now and kept for the next time
    Card.known("RTX 3060")  # one of the table in cards.py
    Card.pretend("T4")      # a bigger GPU, made to behave like a T4 in this process

Torch and NVML load inside the functions, so a card can be read and written without either. Where a function takes
`torch` or `nvml`, leave it out to get the real one; anything that answers the same calls does (the tests use that).
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from llamanb.errors import GpuError
from llamanb.html import Table
from llamanb.machine import surroundings
from llamanb.nvml import first_line, nvml_handle, nvml_memory, start_nvml
from llamanb.precision import BF16_CAPABILITY, Precision, choose_precision, dotted
from llamanb.trials import KERNELS, Attention, working_attention

GIB = 2**30

KERNELS_LATER_GIB = 0.14
"""Free memory that kernels loaded later still take, outside torch's allocator: from 0.60 GiB after the first tensor to
0.73 at the end of a QLoRA step on an H200. Smaller cards take less."""

NUMBERS = {
    "vram_gib": ("GiB", ""),
    "free_gib": ("GiB", ""),
    "context_gib": ("GiB", "outside torch's allocator"),
    "blas_workspace_mib": ("MiB", ""),
    "tflops": ("TFLOP/s", "16-bit products"),
    "bandwidth_gbs": ("GB/s", "its memory"),
    "host_link_gbs": ("GB/s", "from the host"),
    "launch_us": ("microseconds", "launch of an operation"),
    "flash_tflops": ("TFLOP/s", "FlashAttention"),
    "efficient_tflops": ("TFLOP/s", "memory-efficient attention"),
    "multiprocessors": ("multiprocessors", ""),
}
"""Units of a card's numbers, and what those are called that have a row of their own in its table."""
SPEEDS = ("tflops", "bandwidth_gbs", "host_link_gbs", "launch_us", "flash_tflops", "efficient_tflops")


@dataclass(frozen=True)
class Card:
    """A GPU as a plan sees it, or the CPU. Plain data: a card of the table, a friend's or a pretended one is the same.

    Raises:
        GpuError: sizes that are negative or not a number, more free than there is, a capability that is no pair.
    """

    name: str
    capability: tuple[int, int] | None
    """Compute capability; None for a CPU."""
    vram_gib: float = 0.0
    """What a process can be given (the driver's total; a T4's nominal 15 GiB come out as 14.56). 0 for a CPU."""
    free_gib: float | None = None
    """What plans start from: what torch's allocator can be given. Of the GPU at hand: free now, torch's own unused
    cache included, less KERNELS_LATER_GIB. Left out: all but the context."""
    attention: tuple[str, ...] = ()
    """Attention kernels (of `KERNELS`) that ran, forward and backward, with a key and value head per query head."""
    attention_gqa: tuple[str, ...] = ()
    """Those that ran with grouped heads (`enable_gqa=True`), which is how Llama 3 calls them."""
    context_gib: float | None = None
    """What one process takes outside torch's allocator by the end of a step: CUDA context and kernels."""
    blas_workspace_mib: float | None = None
    """cuBLAS's workspace for each handle and stream, inside torch's allocator; see `workspace_mib`."""
    tflops: float | None = None
    """Sustained TFLOP/s of matrix products in 16 bits that add up in 32."""
    bandwidth_gbs: float | None = None
    """GB/s (1e9 bytes) of its memory."""
    host_link_gbs: float | None = None
    """GB/s from pinned host memory to it."""
    host_gib: float | None = None
    """Free memory of the machine that it is in, for weights that are streamed; None: as much as it takes."""
    disk_gib: float | None = None
    """Of that machine's disk, for weights that its memory has no room for; None: as much as they take."""
    disk_gbs: float | None = None
    """GB/s that the disk reads, past its cache."""
    launch_us: float | None = None
    """Microseconds that Python and torch take to launch one operation."""
    flash_tflops: float | None = None
    efficient_tflops: float | None = None
    """TFLOP/s of attention, forward and backward, by FlashAttention and by the memory-efficient kernel, in the card's
    own 16-bit dtype and with all of its multiprocessors at work."""
    multiprocessors: int | None = None
    computes_as: tuple[int, int] | None = None
    """Compute capability of the GPU that computes in a pretended card's place, at its speeds and with its
    multiprocessors; None for any other card."""
    pages: bool = True
    """Whether what paged optimizers keep can leave it for the host's memory. Not on WSL2, which lacks managed memory
    (NVIDIA's CUDA on WSL guide, Known Limitations)."""
    source: str = ""
    """Where these figures come from."""

    def __post_init__(self):
        for field in ("attention", "attention_gqa"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        for field, (unit, _) in NUMBERS.items():
            value = getattr(self, field)
            if value is None and field != "vram_gib":
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
            least = "above 0" if field in SPEEDS else "0 or more"
            self._require(number and (value or field not in SPEEDS), f"{field}={value!r}", f"It is in {unit}, {least}.")
        for field in ("capability", "computes_as"):
            if (value := getattr(self, field)) is not None:
                pair = tuple(value) if isinstance(value, list | tuple) else ()
                fits = len(pair) == 2 and all(type(part) is int and part >= 0 for part in pair)
                self._require(fits, f"{field}={value!r}", "It is a pair of whole numbers, or None for a CPU.")
                object.__setattr__(self, field, pair)
        context, all_there_is = self.context_gib or 0, f"vram_gib={self.vram_gib} is all there is"
        self._require(
            not context or context < self.vram_gib,
            f"context_gib={context}",
            f"{all_there_is}, and tensors need some of it.",
        )
        if self.free_gib is None:
            object.__setattr__(self, "free_gib", self.vram_gib - context)
        self._require(self.free_gib <= self.vram_gib, f"free_gib={self.free_gib}", f"{all_there_is}.")
        unknown = ", ".join(sorted({*self.attention, *self.attention_gqa} - KERNELS.keys()))
        self._require(not unknown, f"no attention kernel is called {unknown}", f"Known kernels: {', '.join(KERNELS)}.")

    def _require(self, holds: object, what: str, why: str) -> None:
        if not holds:
            fix = 'For example Card(name="T4", capability=(7, 5), vram_gib=14.56, free_gib=14.0).'
            raise GpuError(f"Card {self.name!r}: {what}", why, fix)

    @classmethod
    def present(
        cls, *, torch: Any = None, nvml: Any = None, try_attention: Callable[..., Attention] | None = None
    ) -> Card:
        """The card of this machine: the GPU that torch would use, or the CPU when there is none.

        It makes a CUDA context and runs the attention kernels on small tensors (a second or two at the first call).

        Raises:
            GpuError: torch sees a GPU that does not answer (taken by another process, lost, a forked process).
        """
        torch = torch or importlib.import_module("torch")
        pages = "WSL2" not in surroundings()
        index, _ = gpu_in_use(torch)
        if index is None:
            card = cls(name="CPU", capability=None)
        else:
            with answering():
                properties = torch.cuda.get_device_properties(index)
                total, free = _free_bytes(torch, index, properties, nvml)
            capability = (properties.major, properties.minor)
            left = max(free / GIB - KERNELS_LATER_GIB, 0.0)
            workspace = blas_workspace_mib(torch, capability)
            card = cls(properties.name, capability, total / GIB, left, blas_workspace_mib=workspace, pages=pages)
            card = replace(card, multiprocessors=properties.multi_processor_count)
        tried = (try_attention or working_attention)(card.dtype, "cpu" if index is None else f"cuda:{index}")
        return replace(card, attention=tried.runs(), attention_gqa=tried.runs(gqa=True))

    @classmethod
    def here(cls) -> Card:
        """What plans start from: this machine's card, with the figures of its last measurement or of the table.

        Where a measurement is kept and NVML shows one GPU, torch is not even imported; else like `present`.
        """
        from llamanb.measured import here

        return here()

    @classmethod
    def measure(cls, save: bool = True) -> Card:
        """This machine's card, measured: context, kernels that run, speeds. About five seconds, 1 GiB.

        Args:
            save: keep it in the user's cache folder, for `here`.
        """
        from llamanb.measured import measure

        return measure(save=save)

    @classmethod
    def known(cls, name: str) -> Card:
        """A card of the table, such as "T4" or "RTX 4090"; case, spaces and NVIDIA's prefixes do not matter.

        Raises:
            GpuError: the table has no such card.
        """
        from llamanb.cards import find

        return find(name)

    @classmethod
    def pretend(cls, name: str, *, ballast: bool = False) -> Card:
        """Makes this process behave as if its GPU were a smaller one of the table; `llamanb.pretend` undoes it.

        Args:
            name: as for `known`.
            ballast: hold the rest of the memory too, for whoever asks the driver what is free.

        Raises:
            GpuError: there is no GPU, or one that is smaller or older than the card it should be.
        """
        from llamanb.pretend import pretend

        return pretend(name, ballast=ballast)

    @property
    def grouped_kernels(self) -> tuple[str, ...]:
        """Attention kernels that take grouped heads: those that ran; where none was tried, those of its capability."""
        return self.attention_gqa or grouped_kernels(self.capability)

    @property
    def workspace_mib(self) -> float:
        """cuBLAS's workspace for each handle and stream: as told, or torch's default for this capability."""
        return default_workspace_mib(self.capability) if self.blas_workspace_mib is None else self.blas_workspace_mib

    @property
    def runs_default_torch(self) -> bool:
        """Whether the PyTorch build that a plain `pip install torch` brings has code for it; the CPU runs every one.

        Below it (P100, V100) `llamanb.setup.torch_build` chooses the build for CUDA 12.6.
        """
        from llamanb.setup.torch_build import DEFAULT_OLDEST_GPU

        return self.capability is None or self.capability >= DEFAULT_OLDEST_GPU

    def choose_precision(self, wanted: str = "auto") -> Precision:
        """`choose_precision` for this card."""
        return choose_precision(self.capability, wanted)

    @property
    def dtype(self) -> str:
        """What it computes in when nothing is asked for."""
        return self.choose_precision().dtype

    @property
    def is_gpu(self) -> bool:
        return self.capability is not None

    def table(self) -> Table:
        """Its facts, one a row."""
        precision, rows = self.choose_precision(), []
        if self.is_gpu:
            rows.append(["compute capability", dotted(self.capability)])
            rows.append(["memory", f"{self.vram_gib:.2f} GiB, {self.free_gib:.2f} GiB free"])
        rows.append(["computes in", f"{precision.dtype}: {precision.reason}"])
        for label, kernels in (("attention", self.attention), ("attention, grouped heads", self.attention_gqa)):
            rows.append([label, ", ".join(kernels) or "not tried"])
        for field, (unit, label) in NUMBERS.items():
            if label and (value := getattr(self, field)) is not None:
                rows.append([label, f"{value:.3g} {unit}"])
        rows += [["figures from", self.source]] if self.source else []
        return Table(["card", self.name], rows)

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def grouped_kernels(capability: tuple[int, int]) -> tuple[str, ...]:
    """Attention kernels that take grouped heads on GPUs of a capability (aten/src/ATen/native/transformers/cuda/
    sdp_utils.cpp); Ampere brought them, as it did bf16."""
    return ("flash", "cudnn", "math") if capability >= BF16_CAPABILITY else ("math",)


def gpu_in_use(torch: Any = None) -> tuple[int | None, str]:
    """Number of the GPU that torch would use, or None and why it has none.

    Raises:
        GpuError: torch sees a GPU and cannot start on it.
    """
    torch = torch or importlib.import_module("torch")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        with answering():
            return torch.cuda.current_device(), ""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None:
        return None, f"this torch ({torch.__version__}) is built without CUDA"
    if caught:
        return None, f"torch says: {first_line(caught[0].message)}"
    if hidden is not None:
        return None, f"CUDA_VISIBLE_DEVICES={hidden!r} leaves torch no GPU"
    return None, "torch finds no NVIDIA GPU or no driver"


@contextlib.contextmanager
def answering():
    """Turns what torch raises when a GPU does not answer into a GpuError; the type differs by torch's version."""
    try:
        yield
    except Exception as error:
        raise GpuError(
            "The GPU is there but does not answer.",
            f"torch says: {first_line(error)}",
            "See in nvidia-smi whether another process has it. Restart the kernel; if that is not enough, the machine.",
        ) from error


def default_workspace_mib(capability: tuple[int, int] | None) -> float:
    """cuBLAS's workspace for each handle and stream when nobody set CUBLAS_WORKSPACE_CONFIG, in MiB; 0 without a GPU.

    As `parseChosenWorkspaceSize` of aten/src/ATen/cuda/CublasHandlePool.cpp has it since torch 2.12: 32 MiB on Hopper
    and Blackwell (majors 9, 10 and 12), else `:4096:2:16:8`, which is 2 × 4096 + 8 × 16 KiB.
    """
    if capability is None:
        return 0.0
    return 32.0 if capability[0] in (9, 10, 12) else 8.125


def blas_workspace_mib(torch: Any, capability: tuple[int, int]) -> float:
    """cuBLAS's workspace as this torch says (2.13 does), or by capability."""
    with contextlib.suppress(Exception):
        return torch.backends.cuda.cublas_workspace_size() / 2**20
    return default_workspace_mib(capability)


def _free_bytes(torch: Any, index: int, properties: Any, nvml: Any) -> tuple[int, int]:
    """(total, free) bytes for this process: the driver's word, lowered to NVML's where that says less.

    NVML counts what every process holds; where the driver hands out budgets (WSL2) its own figure can be the larger.
    """
    free, total = torch.cuda.mem_get_info(index)
    cache = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
    nvml, _ = start_nvml(nvml)
    handle = nvml_handle(nvml, properties)
    seen = nvml_memory(nvml, handle) if handle is not None else None
    if seen and seen.is_of(total):
        free = min(free, seen.free)
    return total, min(free + cache, total)
