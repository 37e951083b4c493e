"""This machine's GPU, measured once and kept, so that later plans know its speed without importing torch.

`Card.measure()` and `Card.here()` are the doors to this module. Measurements lie in the user's cache folder, one file
a GPU; a file that cannot be read, or was written with another torch or driver, counts as none.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import json
import os
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llamanb import cards, disk, rates
from llamanb.card import GIB, SPEEDS, Card, gpu_in_use
from llamanb.nvml import ask, gpu_processes, gpu_uuid, nvml_handle, nvml_handles, nvml_memory, only_gpu, start_nvml
from llamanb.setup.loaded import version

FIGURES = ("context_gib", *SPEEDS)
"""What a kept measurement or the table adds to a card that was only looked at."""


def measure(
    *, save: bool = True, torch: Any = None, nvml: Any = None, try_attention: Any = None, try_rates: Any = None
) -> Card:
    """The present card with its context, kernels and speeds measured; the CPU's card without a GPU.

    Args:
        save: keep it for `here`.
        torch, nvml, try_attention, try_rates: stand-ins for the real ones.

    Raises:
        GpuError: torch sees a GPU that does not answer.
    """
    torch = torch or importlib.import_module("torch")
    started, _ = start_nvml(nvml)
    before = {} if torch.cuda.is_initialized() else _used(started)
    card = Card.present(torch=torch, nvml=nvml, try_attention=try_attention)
    if not card.is_gpu:
        return card
    index, _ = gpu_in_use(torch)
    found = (try_rates or rates.measure_rates)(card.dtype, f"cuda:{index}", free_gib=card.free_gib)
    properties = torch.cuda.get_device_properties(index)
    handle = nvml_handle(started, properties)
    context = _context_gib(started, handle, torch.cuda.memory_reserved(index), before)
    card = replace(
        card,
        context_gib=context if context and context < card.vram_gib else None,
        **dataclasses.asdict(found),
        source=f"measured {datetime.date.today()} with torch {torch.__version__}",
    )
    if save:
        keep(card, _key(properties), started)
        disk.measure()
    return card


def _used(nvml: Any) -> dict[str | None, int]:
    """Bytes in use by UUID, of every GPU that NVML lists."""
    seen = {gpu_uuid(nvml, handle): nvml_memory(nvml, handle) for handle in nvml_handles(nvml) if handle is not None}
    return {uuid: memory.used for uuid, memory in seen.items() if memory}


def _context_gib(nvml: Any, handle: Any, reserved: int, before: Mapping[str | None, int]) -> float | None:
    """What this process holds of the GPU beyond the `reserved` bytes of torch's allocator; None when nobody tells.

    NVML's list of processes says it, except in containers and on WSL2; there, what is in use now against `before`
    this process had a context.
    """
    listed = [one.bytes for one in gpu_processes(nvml, handle) or () if one.pid == os.getpid()]
    held = listed[0] if listed else None
    memory, uuid = nvml_memory(nvml, handle), gpu_uuid(nvml, handle)
    if not held and memory and uuid in before:
        held = memory.used - before[uuid]
    return (held - reserved) / GIB if held and held > reserved else None


def here(*, torch: Any = None, nvml: Any = None, try_attention: Any = None, environ: Mapping = os.environ) -> Card:
    """This machine's card with what is known of its speed.

    A kept measurement and NVML's word on free memory are enough where NVML shows exactly one GPU and this process has
    no context yet: torch stays out. Otherwise the card is looked at (`Card.present`), and the measurement or the
    table's card of the same product adds its FIGURES.

    Raises:
        GpuError: torch sees a GPU that does not answer.
    """
    loaded = sys.modules.get("torch")
    has_context = loaded is not None and loaded.cuda.is_initialized()
    if torch is None and not has_context and (card := _without_torch(nvml, environ)):
        return card
    torch = torch or importlib.import_module("torch")
    card = Card.present(torch=torch, nvml=nvml, try_attention=try_attention)
    if not card.is_gpu:
        return card
    index, _ = gpu_in_use(torch)
    known = figures(torch.cuda.get_device_properties(index), card.vram_gib, nvml)
    if known is None:
        return card
    return replace(card, source=known.source, **{field: getattr(known, field) for field in FIGURES})


def figures(properties: Any, vram_gib: float, nvml: Any = None) -> Card | None:
    """The card whose FIGURES hold for the GPU of torch's `properties`: its kept measurement, or the table's card of the
    same product; None when it is neither measured nor known."""
    started, _ = start_nvml(nvml)
    return kept(_key(properties), started) or cards.match(properties.name, vram_gib)


def _without_torch(nvml: Any, environ: Mapping) -> Card | None:
    started, _ = start_nvml(nvml)
    handle = only_gpu(started, environ) if started else None
    card = kept(gpu_uuid(started, handle), started) if handle is not None else None
    memory = nvml_memory(started, handle) if card else None
    if memory is None or card.context_gib is None or not memory.is_of(card.vram_gib * GIB):
        return None
    return replace(card, free_gib=max(min(memory.free / GIB, card.vram_gib) - card.context_gib, 0.0))


# The files


def folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where measurements are kept: the user's cache folder."""
    home = environ.get("XDG_CACHE_HOME", "")
    cache = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    return cache / "llamanb" / "cards"


def _file(key: str) -> Path:
    return folder() / f"{re.sub(r'[^A-Za-z0-9.-]', '_', key)[:100]}.json"


def _key(properties: Any) -> str:
    """A GPU's name for its file: the UUID, as NVML writes it, or the product's name."""
    uuid = str(getattr(properties, "uuid", "") or "")
    return f"GPU-{uuid.removeprefix('GPU-')}" if uuid else str(properties.name)


def _versions(nvml: Any) -> dict[str, str | list[str]]:
    """What a measurement holds for: another torch may run other kernels, another driver takes other memory, and an
    older one of these lacks some of the speeds."""
    driver = ask(getattr(nvml, "nvmlSystemGetDriverVersion", None))
    return {"torch": version("torch").installed or "", "driver": str(driver or ""), "speeds": [*SPEEDS]}


def keep(card: Card, key: str, nvml: Any = None) -> None:
    """Writes a measured card whole or not at all; warns where that cannot be."""
    path = _file(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps({"for": _versions(nvml), "card": dataclasses.asdict(card)}, indent=1))
        new.replace(path)
    except OSError as error:
        warnings.warn(f"the measurement of {card.name} could not be kept in {path.parent}: {error}", stacklevel=2)


def kept(key: str | None, nvml: Any = None) -> Card | None:
    """The card kept under `key`; None where there is none that holds for this torch and driver."""
    if not key:
        return None
    try:
        found = json.loads(_file(key).read_text(encoding="utf-8"))
        return Card(**found["card"]) if found["for"] == _versions(nvml) else None
    except Exception:  # missing, cut short, of another version, edited: measure again
        return None
