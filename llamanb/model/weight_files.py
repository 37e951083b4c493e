"""Files of weights (safetensors) that layers are read from again and again while a model trains."""

from __future__ import annotations

import json
import os
import weakref
from pathlib import Path
from typing import NamedTuple

from llamanb import disk
from llamanb.errors import UNREADABLE, ModelError

LARGEST_HEADER = 100_000_000
"""Bytes, as safetensors itself has it."""


class WeightFile:
    """An open file. It stays the one that was opened, also when its name is deleted or given to another meanwhile; when
    its content changes, reading it is an error.

    Args:
        path: of the file.
        fix: what mends it, in words.

    Raises ModelError where it cannot be read.
    """

    def __init__(self, path: Path, fix: str):
        self.path, self._fix = path, fix
        try:
            self._fd = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._fd)
            disk.advise(self._fd, 0, 0, "POSIX_FADV_SEQUENTIAL")
            self._state = self._now()
            self._places, self._begin = self._header()
        except UNREADABLE as error:
            raise self._unreadable(f"{type(error).__name__}: {error}") from None

    def content(self) -> bytes:
        """All of it, as it lies on the disk."""
        with open(os.dup(self._fd), "rb", buffering=0) as file:
            file.seek(0)
            data = file.readall()
        disk.forget(self._fd)
        return data

    def span(self, name: str) -> Span:
        """Where a tensor lies."""
        kind, begin, end = self._places[name]
        return Span(self, self._begin + begin, end - begin, kind)

    def read_into(self, memory: memoryview, offset: int) -> None:
        """Fills `memory` from there on. Raises ModelError where the file is not what it was, or cannot be read."""
        try:
            count, now = disk.read_into(self._fd, memory, offset), self._now()
        except OSError as error:
            raise self._unreadable(f"{type(error).__name__}: {error}") from None
        if now != self._state or count < len(memory):
            short = f"it has {now[0]:,} bytes, and had {self._state[0]:,}" if now[0] != self._state[0] else ""
            raise self._unreadable(short or "it was written to since it was loaded")

    def forget(self) -> None:
        """Has the kernel let go of what it keeps of the file."""
        disk.forget(self._fd)

    def _now(self) -> tuple[int, int]:
        """What changes when the content does."""
        found = os.fstat(self._fd)
        return found.st_size, found.st_mtime_ns

    def _header(self) -> tuple[dict[str, tuple[str, int, int]], int]:
        """(dtype, begin and end of each tensor, where those are counted from)."""
        size = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        if size > LARGEST_HEADER:
            raise ValueError("no safetensors file")
        found = json.loads(os.pread(self._fd, size, 8))
        tensors = {name: one for name, one in found.items() if name != "__metadata__"}
        return {name: (str(one["dtype"]), *map(int, one["data_offsets"])) for name, one in tensors.items()}, 8 + size

    def _unreadable(self, why: str) -> ModelError:
        return ModelError("weights of a layer that waits on disk cannot be read", f"{self.path}: {why}", self._fix)


class Span(NamedTuple):
    """Where in which file a tensor lies."""

    file: WeightFile
    offset: int
    size: int
    dtype: str
    """As safetensors names it: U8, F32."""
