"""The machine around the GPU: where this runs, host memory and disks. Needs no torch."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

GIB = 2**30
CGROUP_FILES = [("memory.max", "memory.current", "memory.stat")]
CGROUP_FILES += [("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat")]
"""What limits a container's memory, what it uses, and what that is: of cgroups version 2 and 1."""


def surroundings(environ: Mapping[str, str] = os.environ, proc: str = "/proc") -> tuple[str, ...]:
    """Which of "WSL2", "Colab" and "Kaggle" this is; empty on any other machine."""
    found = {
        "WSL2": "microsoft" in _read(Path(proc, "version")).lower(),
        "Colab": any(name.startswith("COLAB_") for name in environ),
        "Kaggle": "KAGGLE_KERNEL_RUN_TYPE" in environ,
    }
    return tuple(name for name, here in found.items() if here)


def host_memory(cgroup: str = "/sys/fs/cgroup") -> tuple[float, float, float]:
    """(total, available, limit) of host memory in GiB; the limit is a container's, or the total. What a container holds
    of files it has read counts as available, as the host's does (docs.kernel.org/admin-guide/cgroup-v2.html)."""
    import psutil

    memory = psutil.virtual_memory()
    available, limit = memory.available, memory.total
    for names in CGROUP_FILES:
        most, used, stat = (_read(Path(cgroup, name)).strip() for name in names)
        if most.isdigit() and int(most) < memory.total:
            sizes = dict(re.findall(r"^(\w+) (\d+)$", stat, re.MULTILINE))  # version 1 has child groups in its totals
            read = sum(int(sizes.get(f"total_{file}", sizes.get(file, 0))) for file in ("inactive_file", "active_file"))
            limit, available = min(limit, int(most)), min(available, int(most) - int(used or 0) + read)
    return memory.total / GIB, available / GIB, limit / GIB


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
