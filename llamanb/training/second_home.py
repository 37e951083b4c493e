"""A second home of runs: a folder that outlives this machine, such as one on Google Drive. It gets verified copies of a
run while that trains, and the run goes on from there on a machine that has nothing of it.

Losing it stops no training. A name there may be another run's, so each run has an id.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import threading
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from llamanb.errors import UNREADABLE, LlamanbError
from llamanb.layout import Plan
from llamanb.nvml import first_line
from llamanb.run import NAME, new_folder, newest_folder, numbered
from llamanb.timeline import FACTS, replace_text
from llamanb.training.checkpoints import ASIDE, flush, holds, newest, open_file, settle, step_of
from llamanb.training.resume import CHECKPOINTS, pick_up

ID, STATUS = "id.json", "run.json"
TELL, OWN = (".json", ".csv", ".html"), (STATUS, NAME)
"""Endings of files that tell of a run; and those of them that are copied at last, or are the folder's own."""
LOOK_S = 1.0
"""Between two looks for a new checkpoint."""
WAIT_S = 600.0
"""For the last copy, at most, when training is over."""


@contextlib.contextmanager
def copied_to(home: Path, name: str, folder: Path) -> Iterator[None]:
    """Copies a run in a thread: when it has begun, after each checkpoint, and once more when the block ends.

    Args:
        home: made where its parent is there.
        name: of the run.
        folder: of the run, on this machine.
    """
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(home, name, folder, over), name="second home", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        if isinstance(sys.exc_info()[1], Exception | None):  # else it was asked to end at once
            with contextlib.suppress(KeyboardInterrupt):
                thread.join(LOOK_S)
                if thread.is_alive():
                    print(f"waiting up to {WAIT_S:g} s for the last copy to {home}; an interrupt ends it", flush=True)
                    thread.join(WAIT_S)
            if thread.is_alive():
                print(f"copying to {home} goes on while this process lives", flush=True)


def _watch(home: Path, name: str, folder: Path, over: threading.Event) -> None:
    copied, failed, last = None, False, False
    while not last:
        last, steps = over.wait(LOOK_S), sorted(folder.glob(f"{CHECKPOINTS}/step-*"))
        if last or (steps[-1:] != copied and (folder / STATUS).exists()):
            copied = steps[-1:]
            try:
                _copy(home, name, folder)
                failed = False
            except Exception as error:  # whatever a mounted drive may raise
                if last or not failed:  # else it has been said
                    then = "" if last else "; training goes on, and it is tried again at the next checkpoint"
                    print(f"no copy in {home} ({type(error).__name__}: {first_line(error)}){then}", flush=True)
                failed = True


def _copy(home: Path, name: str, folder: Path) -> None:
    if not (folder / ID).exists():
        replace_text(folder / ID, f'"{uuid.uuid4()}"')
    home.mkdir(exist_ok=True)  # not its parents: made here, they would be on this disk, and in the way of mounting
    places, mine = numbered(home, name).values(), (folder / ID).read_bytes()
    own = [place for place in places if (place / ID).exists() and (place / ID).read_bytes() == mine]
    copy_run(folder, own[0] if own else new_folder(home, name))


def bring_back(home: Path, plan: Plan, runs: Path, name: str, resume: bool | None) -> None:
    """Fetches a run from its second home where there is none here to go on with, so that `pick_up` finds it.

    Raises RecipeError like `pick_up`, and LlamanbError where the home cannot be read: what is there may be wanted.
    """
    here = newest_folder(runs, name)
    if resume is False or (here and newest(here / CHECKPOINTS)):
        return
    try:
        with contextlib.ExitStack() as held:
            home.mkdir(exist_ok=True)
            there = newest_folder(home, name)
            if there and pick_up(plan, home, name, resume, held):
                print(f"fetching {there}", flush=True)
                _fetch(there, runs, name)
    except OSError as error:
        fix = "make it readable (is the drive mounted?), or resume=False to begin without what is there"
        raise LlamanbError(f"the second home {home} cannot be read", first_line(error), fix) from None


def _fetch(there: Path, runs: Path, name: str) -> None:
    try:
        copy_run(there, new_folder(runs, name))
    except OSError as error:
        fix = f"free some room for {runs.absolute()}, or see whether the drive is still mounted; what is there is safe"
        raise LlamanbError(f"{there} cannot be fetched", first_line(error), fix) from None


def copy_run(source: Path, target: Path) -> None:
    """Copies a run's newest checkpoint, its trained weights and what tells of it. When that is cut off, what was in
    `target` counts as before. Raises OSError."""
    with contextlib.ExitStack() as opened:
        status = [opened.enter_context(open_file(path)) for path in source.glob(STATUS)]  # as it is before all else
        tells = (path for path in source.iterdir() if path.suffix in TELL and path.name not in OWN)
        _copy_files(tells, target)
        checkpoint = newest(source / CHECKPOINTS)
        if checkpoint and not holds(target / CHECKPOINTS / checkpoint.name):
            made = target / CHECKPOINTS / ASIDE / checkpoint.name
            shutil.rmtree(made.parent, ignore_errors=True)
            for folder in (made.parents[1], made.parent):
                _copy_files((), folder)
            _copy_files(checkpoint.iterdir(), made)
            if not holds(made):
                raise OSError(f"{made} is not what was written")
            settle(made, target / CHECKPOINTS, step_of(checkpoint))
        if checkpoint:
            _remove_undone(source, target, step_of(checkpoint))
        for trained in (path for path in source.iterdir() if path.name in ("adapter", "model")):
            _copy_files(trained.iterdir(), target / trained.name)
        for file in status:  # so `finished` is there only when all else is
            _write(file, target / STATUS)


def _remove_undone(source: Path, target: Path, newest_step: int) -> None:
    """Removes checkpoints of steps that the run went back over, and has not come to again."""
    with contextlib.suppress(*UNREADABLE):
        for began, end in json.loads((source / FACTS).read_text(encoding="utf-8"))["returns"]:
            for path in (target / CHECKPOINTS).glob("step-*"):
                if max(end, newest_step) < step_of(path) <= began:
                    shutil.rmtree(path)


def _copy_files(files: Iterable[Path], folder: Path) -> None:
    """Makes the folder and copies files into it; what is open may be removed meanwhile. Raises OSError, also for links,
    which lead elsewhere."""
    folder.mkdir(exist_ok=True)
    if folder.is_symlink():
        raise OSError(f"{folder} is a link")
    with contextlib.ExitStack() as opened:
        for path, file in [(path, opened.enter_context(open_file(path))) for path in files]:
            _write(file, folder / path.name)


def _write(file: BinaryIO, path: Path) -> None:
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    with new.open("xb") as written:
        shutil.copyfileobj(file, written)
    flush(new)
    new.replace(path)
