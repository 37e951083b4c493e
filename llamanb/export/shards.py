"""Weights written as safetensors, a piece at a time, in shards that count only when they are whole.

All of it is made in a folder aside, which takes its name when nothing is missing any more. Until then `merge.json` in
it says what is being made and which shards are done; one is done when it has its name, and the hash that stands there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llamanb.export.read import NAMES
from llamanb.export.stored import INDEX
from llamanb.timeline import replace_text
from llamanb.training.checkpoints import flush

RECORD = "merge.json"
ASIDE = ".aside"
"""Ends the name of the folder while it is being made."""
SHARD_BYTES = 1_000_000_000
"""A shard is closed before it becomes larger; what is lost to a kill is one shard's work."""


def layout(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, list[str]]:
    """Which tensors go into which file, in their order: as many to a file as stay under SHARD_BYTES, one at least."""
    groups: list[list[str]] = []
    left = 0
    for name, shape in shapes.items():
        size = size_of(shape, dtype)
        if size > left:
            groups.append([])
            left = SHARD_BYTES
        groups[-1].append(name)
        left -= size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def size_of(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes."""
    return torch.Size(shape).numel() * dtype.itemsize


@dataclass
class Folder:
    """The folder that is being made.

    Args:
        target: where it comes to lie.
        made_of: all that decides what is in it; what was left half made counts where that is the same.
    """

    target: Path
    made_of: dict
    done: dict[str, dict] = field(default_factory=dict)
    """What is known of each finished shard, its sha256 among that."""

    @property
    def aside(self) -> Path:
        return self.target.with_name(self.target.name + ASIDE)

    @property
    def is_finished(self) -> bool:
        """Whether the target is there, of the same making."""
        return _record(self.target).get("made_of") == self.made_of

    def take_up(self) -> None:
        """Keeps the whole shards of an earlier try of the same making; everything else of it is removed."""
        record = _record(self.aside)
        done = record.get("done", {}) if record.get("made_of") == self.made_of else {}
        for name, facts in done.items():
            path = self.aside / name
            if path.is_file() and _sha256(path) == facts["sha256"]:
                self.done[name] = facts
        for path in self.aside.iterdir() if self.aside.is_dir() else ():
            if path.name not in self.done:
                path.unlink() if path.is_file() or path.is_symlink() else shutil.rmtree(path)
        self.aside.mkdir(parents=True, exist_ok=True)
        self._note()

    def write(self, name: str, shapes: dict[str, tuple[int, ...]], dtype, rows: Callable, check: Callable) -> None:
        """Writes one shard.

        Args:
            shapes: of its tensors, by name, in their order.
            rows: gives a tensor's rows by its name, in order, in the dtype.
            check: is given the file before it counts; returns what is to be noted of it.
        """
        new = self.aside / f"{name}.new"
        sha256 = write_safetensors(new, shapes, dtype, rows)
        facts = {"sha256": sha256, **check(new)}
        flush(new)
        new.rename(self.aside / name)
        flush(self.aside)
        self.done[name] = facts
        self._note()

    def finish(self, names: dict[str, list[str]], size: int) -> None:
        """Writes the index where there are several shards, and gives the folder its name."""
        if len(names) > 1:
            index = {
                "metadata": {"total_size": size},
                "weight_map": {t: n for n, group in names.items() for t in group},
            }
            (self.aside / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
        for path in (*self.aside.iterdir(), self.aside):
            flush(path)
        self.aside.rename(self.target)
        flush(self.target.parent)

    def _note(self) -> None:
        done = {name: self.done[name] for name in sorted(self.done)}
        replace_text(self.aside / RECORD, json.dumps({"made_of": self.made_of, "done": done}, indent=1))
        flush(self.aside / RECORD)


def write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, rows: Callable) -> str:
    """Writes the file, and returns its sha256. The header says where each tensor lies, so it can come first."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + size_of(shape, dtype)
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in _bytes(len(text).to_bytes(8, "little") + text, shapes, rows):
            digest.update(part)
            file.write(part)
    if path.stat().st_size != 8 + len(text) + end:
        raise OSError(f"{path} has not the size that its header says")
    return digest.hexdigest()


def _bytes(header: bytes, shapes, rows: Callable) -> Iterator[bytes | memoryview]:
    yield header
    for name in shapes:
        for part in rows(name):
            yield memoryview(part.contiguous().view(torch.uint8).numpy()).cast("B")


def _record(folder: Path) -> dict:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(folder: Path) -> int:
    """On the disk that the folder is on, or would be on once it is made."""
    place = folder.absolute()
    return shutil.disk_usage(next(p for p in (place, *place.parents) if os.path.exists(p))).free


def in_words(size: int) -> str:
    """Bytes in the unit a person would use."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size} bytes"
