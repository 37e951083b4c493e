"""The disk that layers wait on where host memory has no room for them: what is free of it, how fast it reads, and a
reading that leaves nothing in the page cache. Needs no torch."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from pathlib import Path

from llamanb.errors import UNREADABLE
from llamanb.machine import GIB, hub_cache

GBS = 0.5
"""GB/s (1e9 bytes) that a disk is taken to read where nothing was measured: about what SATA lets through. NVMe reads
several times that, and a cloud's disk may read less."""
PIECE = 32 * 2**20
"""Bytes that are asked for at once."""
LEAST, MOST = 64 * 2**20, 512 * 2**20
"""Bytes that a measurement takes, from a file that is in no cache."""
SPARE_GIB = 1.0
"""Of the disk, left free."""
KEPT = "disk.json"


def layers_folder() -> Path:
    """Where 4-bit layers are kept (model/quantized.py), a folder for each way to make them: beside the Hub's cache."""
    return hub_cache().parent / "llamanb-4bit"


def free_gib() -> float:
    """Room for such layers: what is free of the disk, and what those hold that are there. Infinite where the disk does
    not say."""
    home = layers_folder()
    try:
        free = shutil.disk_usage(next(place for place in (home, *home.parents) if place.exists())).free
        return (free + sum(path.stat().st_size for path in home.glob("*/*.safetensors"))) / GIB
    except OSError:
        return float("inf")


def read_into(fd: int, memory: memoryview, offset: int) -> int:
    """Fills `memory` with the bytes of an open file from `offset` on, and has the kernel let go of what it kept of
    them. Returns how many there were: fewer where the file ends. Raises OSError."""
    done = 0
    while done < len(memory):
        advise(fd, offset + done, min(2 * PIECE, len(memory) - done), "POSIX_FADV_WILLNEED")
        count = os.preadv(fd, [memory[done : done + PIECE]], offset + done)
        if not count:
            break
        done += count
        forget(fd, offset, done)
    return done


def forget(fd: int, offset: int = 0, size: int = 0) -> None:
    """Has the kernel let go of what it keeps of an open file, from `offset` on; what is not written yet stays."""
    advise(fd, offset, size, "POSIX_FADV_DONTNEED")


def advise(fd: int, offset: int, size: int, what: str) -> None:
    """Advice that the system may not know, or the file's disk not take."""
    with contextlib.suppress(OSError, AttributeError):
        os.posix_fadvise(fd, offset, size, getattr(os, what))


def measure(path: Path | None = None) -> float | None:
    """GB/s that the disk of kept layers and checkpoints reads past the page cache, noted for later plans; None where no
    file there is large enough to tell.

    Args:
        path: a file; None: the largest layer or shard that is kept.
    """
    try:
        kept = [path] if path else [*layers_folder().glob("*/*.safetensors"), *hub_cache().rglob("*.safetensors")]
        largest = max(kept, key=lambda one: one.stat().st_size, default=None)
        if largest is None or largest.stat().st_size < LEAST:
            return None
        gbs = _rate(largest)
        layers_folder().mkdir(parents=True, exist_ok=True)
        (layers_folder() / KEPT).write_text(json.dumps({"gbs": gbs}))
    except OSError:
        return None
    return gbs


def measured() -> float | None:
    """GB/s as `measure` noted them; None where it did not."""
    try:
        gbs = float(json.loads((layers_folder() / KEPT).read_text(encoding="utf-8"))["gbs"])
    except UNREADABLE:
        return None
    return gbs if 0 < gbs < float("inf") else None


def _rate(path: Path) -> float:
    memory, done = memoryview(bytearray(PIECE)), 0
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        forget(fd)
        begin = time.perf_counter()
        while done < MOST and (count := read_into(fd, memory, done)):
            done += count
        return done / 1e9 / max(time.perf_counter() - begin, 1e-9)
    finally:
        os.close(fd)
