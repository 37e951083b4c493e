"""NVML, as far as llamanb asks it: a GPU's memory and who holds it.

The only view of other processes, and the only one that needs no CUDA context. It can be absent, refuse, or lose the
GPU, so every answer may be None. Where a function takes `nvml`, leave it out to get the real one.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


def start_nvml(nvml: Any = None) -> tuple[Any, str]:
    """NVML's module (nvidia-ml-py's `pynvml`), started, or None and why it cannot be used. Raises nothing."""
    try:
        nvml = nvml or importlib.import_module("pynvml")
        nvml.nvmlInit()
    except ImportError:
        return None, "nvidia-ml-py is not installed (pip install nvidia-ml-py)"
    except Exception as error:  # no library, no driver, driver and library of different versions
        return None, f"NVML says: {first_line(error)}"
    return nvml, ""


def ask(function: Callable | None, *args: Any) -> Any:
    """`function(*args)`, or None when NVML cannot tell ("N/A", not permitted, too old a driver, GPU lost)."""
    with contextlib.suppress(Exception):
        return function(*args)
    return None


def nvml_handle(nvml: Any, properties: Any) -> Any:
    """NVML's handle of the GPU with these `torch.cuda.get_device_properties`; None when it finds no such GPU.

    Never by number: NVML counts every GPU in bus order, torch those that CUDA_VISIBLE_DEVICES leaves, fastest first.
    """
    uuid = str(getattr(properties, "uuid", "")).removeprefix("GPU-")
    for kind in ("GPU-", "MIG-") if uuid else ():
        handle = ask(getattr(nvml, "nvmlDeviceGetHandleByUUID", None), kind + uuid)
        if handle is not None:
            return handle
    parts = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    if None in parts:
        return None
    address = "{:08X}:{:02X}:{:02X}.0".format(*parts)
    return ask(getattr(nvml, "nvmlDeviceGetHandleByPciBusId", None), address)


def nvml_handles(nvml: Any) -> list[Any]:
    """NVML's handle of every GPU that it lists, hidden from torch or not; None for one that does not answer."""
    count = ask(getattr(nvml, "nvmlDeviceGetCount", None)) or 0
    return [ask(nvml.nvmlDeviceGetHandleByIndex, number) for number in range(count)]


def only_gpu(nvml: Any, environ: Mapping[str, str] = os.environ) -> Any:
    """NVML's handle of the GPU that a new process would use; None when there is none, or no telling which.

    CUDA_VISIBLE_DEVICES may name numbers or the beginnings of UUIDs. Numbers among several GPUs count only in bus
    order (CUDA_DEVICE_ORDER=PCI_BUS_ID), which is NVML's. A GPU cut into slices (MIG) does not count.
    """
    handles, entry = nvml_handles(nvml), environ.get("CUDA_VISIBLE_DEVICES", "0").strip()
    if None in handles:
        return None
    if entry.startswith("GPU-"):
        handles = [handle for handle in handles if (gpu_uuid(nvml, handle) or "").startswith(entry)]
    elif entry.isdecimal() and (len(handles) == 1 or environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"):
        handles = handles[int(entry) : int(entry) + 1]
    else:
        return None
    if len(handles) != 1:
        return None
    mode = ask(getattr(nvml, "nvmlDeviceGetMigMode", None), handles[0])
    return None if mode and mode[0] else handles[0]


def gpu_uuid(nvml: Any, handle: Any) -> str | None:
    """A GPU's UUID, "GPU-..."; None when NVML does not tell."""
    return ask(getattr(nvml, "nvmlDeviceGetUUID", None), handle)


class NvmlMemory(NamedTuple):
    """NVML's view of a GPU, in bytes."""

    total: int
    used: int
    free: int
    reserved: int | None
    """What driver and firmware keep for themselves; None where NVML counts it as used."""

    def is_of(self, total: int) -> bool:
        """Whether this is the memory of a device of `total` bytes, not of the whole card that it is a slice of."""
        return self.total < 1.25 * total


def nvml_memory(nvml: Any, handle: Any) -> NvmlMemory | None:
    """What NVML says of a GPU's memory; None when it does not say."""
    query = getattr(nvml, "nvmlDeviceGetMemoryInfo", None)
    version = getattr(nvml, "nvmlMemory_v2", None)  # like nvidia-smi: what the driver reserves apart from what is used
    info = (ask(query, handle, version) if version else None) or ask(query, handle)
    if info is None or not 0 < info.total < 2**62:  # "N/A" is all ones
        return None
    return NvmlMemory(info.total, info.used, info.free, getattr(info, "reserved", None))


class GpuProcess(NamedTuple):
    """A process that holds memory of a GPU."""

    pid: int
    name: str
    """Empty when NVML does not tell."""
    bytes: int | None
    """None when NVML does not tell (WSL2, MIG)."""


def gpu_processes(nvml: Any, handle: Any) -> list[GpuProcess] | None:
    """Who holds this GPU's memory, largest first; None when NVML does not tell.

    A process that both computes and draws is on both of NVML's lists and counted once.
    """
    kinds = ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses")
    lists = [ask(getattr(nvml, kind, None), handle) for kind in kinds]
    if all(entries is None for entries in lists):
        return None
    held: dict[int, int | None] = {}
    for entry in (entry for entries in lists for entry in entries or ()):
        size = entry.usedGpuMemory
        if size is None or size >= 2**62:
            held.setdefault(entry.pid, None)
        else:
            held[entry.pid] = max(held.get(entry.pid) or 0, size)
    found = [GpuProcess(pid, str(ask(nvml.nvmlSystemGetProcessName, pid) or ""), size) for pid, size in held.items()]
    return sorted(found, key=lambda process: -(process.bytes or 0))


def first_line(error: object) -> str:
    """What an error says, without its longer explanations."""
    return (str(error).strip().splitlines() or [""])[0]
