"""The machine around the GPU: where this runs, host memory, disks, and versions of packages. Needs no torch."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

GIB = 2**30

PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "trl": "trl",
    "peft": "peft",
    "datasets": "datasets",
    "pyarrow": "pyarrow",
    "accelerate": "accelerate",
    "bitsandbytes": "bitsandbytes",
    "numpy": "numpy",
    "ipywidgets": "ipywidgets",
    "nvidia-ml-py": "pynvml",
}
"""What a run rests on: the name to install, and the module it is imported as."""


def surroundings(environ: Mapping[str, str] = os.environ, proc: str = "/proc") -> tuple[str, ...]:
    """Which of "WSL2", "Colab" and "Kaggle" this is; empty on any other machine."""
    found = {
        "WSL2": "microsoft" in _read(Path(proc, "version")).lower(),
        "Colab": any(name.startswith("COLAB_") for name in environ),
        "Kaggle": "KAGGLE_KERNEL_RUN_TYPE" in environ,
    }
    return tuple(name for name, here in found.items() if here)


def host_memory(proc: str = "/proc", cgroup: str = "/sys/fs/cgroup") -> tuple[float, float, float] | None:
    """(total, available, limit) of host memory in GiB; the limit is a container's, or the total. None: not Linux."""
    lines = (line.split() for line in _read(Path(proc, "meminfo")).splitlines())
    kib = {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1}
    if not {"MemTotal", "MemAvailable"} <= kib.keys():
        return None
    total, available = kib["MemTotal"] / 2**20, kib["MemAvailable"] / 2**20
    limits = [_read(Path(cgroup, name)).strip() for name in ("memory.max", "memory/memory.limit_in_bytes")]
    return total, available, min([total, *(int(limit) / GIB for limit in limits if limit.isdigit())])


def hub_cache(environ: Mapping[str, str] = os.environ) -> Path:
    """Where huggingface_hub keeps what it downloads (its documented variables)."""
    cache = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(environ.get("HF_HUB_CACHE") or Path(environ.get("HF_HOME") or Path(cache, "huggingface"), "hub"))


def room(folder: str | os.PathLike) -> str:
    """Free and total room, in words, of the disk that `folder` is on or would be on once it is made."""
    path = Path(folder).expanduser().absolute()
    for place in (path, *path.parents):
        try:
            disk = shutil.disk_usage(place)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:  # no permission, a drive that went away
            return f"not known: {error.strerror} ({place})"
        return f"{disk.free / GIB:.1f} GiB free of {disk.total / GIB:.1f} GiB ({path})"
    return f"not known ({path})"


class Version(NamedTuple):
    """A package, in this process and on disk."""

    package: str
    loaded: str
    """Its version; "not yet", or "yes" where the module does not tell."""
    installed: str | None
    stale: bool
    """Another version was installed after the import: only a restart of the kernel loads it."""


def version(
    package: str,
    module: str,
    *,
    modules: Mapping[str, Any] = sys.modules,
    installed: Callable[[str], str] = importlib.metadata.version,
) -> Version:
    """The version of `package` that is loaded, and the one that is installed."""
    try:
        on_disk = installed(package)
    except importlib.metadata.PackageNotFoundError:
        on_disk = None
    told = getattr(modules.get(module), "__version__", None)
    loaded = str(told) if told else "yes" if modules.get(module) else "not yet"
    return Version(package, loaded, on_disk, bool(told and on_disk) and not _same_version(loaded, on_disk))


def _same_version(one: str, other: str) -> bool:
    """A local part (+cu130) counts only if both have one: a wheel may leave out what its module tells."""
    (a, _, local_a), (b, _, local_b) = one.partition("+"), other.partition("+")
    return a == b and (not local_a or not local_b or local_a == local_b)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
