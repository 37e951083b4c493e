"""Checkpoints that a dying process cannot spoil: written aside, hashed, flushed to disk, then renamed into place.

A checkpoint counts when its manifest holds: the files that it names are there and no others, each with that size and
that hash. All else, whatever left it, is never read, and is removed when the next checkpoint has been committed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from llamanb.errors import UNREADABLE

ASIDE, MANIFEST = "aside", "manifest.json"
KEPT = 2
"""Checkpoints that stay: should the newest be damaged on disk, there is the one before."""


def commit(made: Path, folder: Path, step: int) -> Path:
    """Makes the files in `made` the checkpoint of a step in `folder`, and only then removes all but the newest KEPT.

    Raises OSError, with all that was there as it was.
    """
    files = {path.name: facts(path) for path in sorted(made.iterdir())}
    (made / MANIFEST).write_text(json.dumps({"step": step, "files": files}), encoding="utf-8")
    return settle(made, folder, step)


def settle(made: Path, folder: Path, step: int) -> Path:
    """The rest of `commit`, for files that have their manifest."""
    for path in (*made.iterdir(), made):
        flush(path)
    target = folder / f"step-{step:08d}"
    if not holds(target):
        shutil.rmtree(target, ignore_errors=True)  # of that step, and damaged
        made.rename(target)
        flush(folder)
    # Not asked again whether it holds: a disk that cannot read for a moment would take the newest one along
    before = itertools.islice(filter(holds, (path for path in _by_step(folder) if path != target)), KEPT - 1)
    for path in {folder / ASIDE, *_by_step(folder)} - {target, *before}:
        shutil.rmtree(path, ignore_errors=True)
    return target


def newest(folder: Path) -> Path | None:
    """The checkpoint of the highest step whose manifest holds."""
    return next(filter(holds, _by_step(folder)), None)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def holds(checkpoint: Path) -> bool:
    """Whether a folder is what was committed there, bit for bit: no link, and no file more, less or other."""
    try:
        with open_file(checkpoint / MANIFEST) as file:
            manifest = json.load(file)
        return (
            not checkpoint.is_symlink()
            and checkpoint.name == f"step-{manifest['step']:08d}"
            and manifest["files"] == {path.name: facts(path) for path in checkpoint.iterdir() if path.name != MANIFEST}
        )
    except UNREADABLE:
        return False


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[bool]:
    """Gives whether this process has the folder to itself: until the block ends, or the process, however it does."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        free = True
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                free = False
        yield free
    finally:
        os.close(handle)


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():  # mounted drives know no such folders
            raise
    finally:
        os.close(handle)


def _by_step(folder: Path) -> list[Path]:
    """What is named like a checkpoint, the highest step first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if re.fullmatch(r"step-\d{8}", path.name)), reverse=True)


def facts(path: Path) -> dict[str, int | str]:
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        return {"bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def open_file(path: Path):
    """A file itself: no link to one, and nothing that would wait. Raises OSError."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise OSError(f"{path} is not a file")
    return path.open("rb")
