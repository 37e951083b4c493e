"""The machine around the GPU: where this runs, host memory and disks. Needs no torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

GIB = 2**30


def surroundings(environ: Mapping[str, str] = os.environ, proc: str = "/proc") -> tuple[str, ...]:
    """Which of "WSL2", "Colab" and "Kaggle" this is; empty on any other machine."""
    found = {
        "WSL2": "microsoft" in _read(Path(proc, "version")).lower(),
        "Colab": any(name.startswith("COLAB_") for name in environ),
        "Kaggle": "KAGGLE_KERNEL_RUN_TYPE" in environ,
    }
    return tuple(name for name, here in found.items() if here)


def host_memory(cgroup: str = "/sys/fs/cgroup") -> tuple[float, float, float]:
    """(total, available, limit) of host memory in GiB; the limit is a container's, or the total."""
    import psutil

    memory = psutil.virtual_memory()
    limits = [_read(Path(cgroup, name)).strip() for name in ("memory.max", "memory/memory.limit_in_bytes")]
    limit = min([memory.total, *(int(limit) for limit in limits if limit.isdigit())])
    return memory.total / GIB, memory.available / GIB, limit / GIB


def hub_cache(environ: Mapping[str, str] = os.environ) -> Path:
    """Where huggingface_hub keeps what it downloads (its documented variables)."""
    cache = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(environ.get("HF_HUB_CACHE") or Path(environ.get("HF_HOME") or Path(cache, "huggingface"), "hub"))


def room(folder: str | os.PathLike) -> str:
    """Free and total room, in words, of the disk that `folder` is on or would be on once it is made."""
    path = Path(folder).expanduser().absolute()
    try:
        disk = shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists()))
    except OSError as error:  # no permission, a drive that went away
        return f"not known: {error.strerror} ({path})"
    return f"{disk.free / GIB:.1f} GiB free of {disk.total / GIB:.1f} GiB ({path})"


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
