"""A big GPU that behaves like a small one in this process: what fits on a T4 can be tried without one.

    from llamanb import Card, plan, train
    card = Card.pretend("T4")            # before anything is put on the GPU
    train(plan(recipe, card), data)      # fails where a T4 would run out of memory, computes in fp16, without flash

Pretended: how much torch's allocator may take, which attention kernels run, and bf16 (through the capability). Not
pretended: speed, and cuBLAS's workspace, which are those of the GPU that is there; the card says so in its figures.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from llamanb import cards
from llamanb.card import GIB, KERNELS_LATER_GIB, SPEEDS, Card, answering, gpu_in_use
from llamanb.card import blas_workspace_mib as workspace_mib
from llamanb.errors import GpuError
from llamanb.measured import figures
from llamanb.precision import BF16_CAPABILITY, dotted
from llamanb.trials import KERNELS

_undo = contextlib.ExitStack()


def pretend(name: str, *, ballast: bool = False, torch: Any = None, driver: Any = None) -> Card:
    """Makes this process's GPU behave like the known card `name`, until `release` or the next `pretend`.

    Args:
        name: a card of the table; see `cards.find`.
        ballast: also take the rest of the GPU's memory from the driver, so that whoever asks it (cudaMemGetInfo, NVML,
            unified memory) sees about as much free as the small card would have. It asks CUDA's driver library, because
            torch's allocator is the one that is limited.
        torch, driver: stand-ins for torch and for libcuda.so.1.

    Raises:
        GpuError: the card is not in the table, there is no GPU, or the one there has less memory or no bf16.
    """
    card = cards.find(name)
    torch = torch or importlib.import_module("torch")
    release()
    index, why = gpu_in_use(torch)
    fix = f"Plan for one without it: plan(recipe, Card.known({card.name!r})) needs no GPU."
    if index is None:
        raise GpuError(f"nothing here can pretend to be a {card.name}", f"{why}.", fix)
    with answering():
        there = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        room = free + torch.cuda.memory_reserved(index)
    limit = round(card.free_gib * GIB)
    capability = (there.major, there.minor)
    if total < card.vram_gib * GIB or room < limit:
        why = (
            f"It has {total / GIB:.2f} GiB, {room / GIB:.2f} of them for this process; a {card.name} has more to give."
        )
        raise GpuError(f"this {there.name} cannot pretend to be a {card.name}", why, fix)
    if capability < BF16_CAPABILITY <= card.capability:
        why = f"Its compute capability {dotted(capability)} has neither bf16 nor FlashAttention."
        raise GpuError(f"this {there.name} cannot pretend to be a {card.name}", why, fix)

    with contextlib.ExitStack() as undo:
        if ballast and (rest := room - limit - round(KERNELS_LATER_GIB * GIB)) > 0:
            undo.callback(_take(rest, driver or ctypes.CDLL("libcuda.so.1")))
        torch.cuda.set_per_process_memory_fraction(limit / total, index)
        undo.callback(torch.cuda.set_per_process_memory_fraction, 1.0, index)
        for kernel in set(KERNELS) - set(card.attention):
            switch = KERNELS[kernel][1]
            was_on = getattr(torch.backends.cuda, f"{switch}_sdp_enabled")()
            getattr(torch.backends.cuda, f"enable_{switch}_sdp")(False)
            undo.callback(getattr(torch.backends.cuda, f"enable_{switch}_sdp"), was_on)
        _undo.push(undo.pop_all())
    known = figures(there, total / GIB)
    return replace(
        card,
        name=f"pretend {card.name}",
        blas_workspace_mib=workspace_mib(torch, capability),
        multiprocessors=there.multi_processor_count,
        computes_as=capability,
        source=f"memory and kernels of a {card.name}; speed of the {there.name} it runs on"
        + (f" ({known.source})" if known else ", not known"),
        **{field: getattr(known, field, None) for field in SPEEDS},
    )


def release() -> None:
    """Gives this process its whole GPU back. Harmless where nothing was pretended."""
    _undo.close()


def _take(size: int, driver: Any) -> Callable[[], None]:
    """Allocates `size` bytes from the driver, in torch's context; returns what frees them."""
    pointer = ctypes.c_uint64()
    code = driver.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(size))
    if code:
        why = f"CUDA's driver answers {code} when it is asked for {size / GIB:.2f} GiB."
        raise GpuError("the rest of the GPU's memory could not be taken as ballast", why, "Pretend without ballast.")

    def free() -> None:
        driver.cuMemFree_v2(pointer)

    return free
