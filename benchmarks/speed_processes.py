"""The processes of `benchmarks.speed`: started, spoken to in lines of JSON, given up on when they do not answer."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

REPOSITORY = Path(__file__).resolve().parent.parent
MOST_FAILURES = 3


class StackError(Exception):
    """A contestant's process says that it failed, or says nothing any more (`dead`)."""

    def __init__(self, why: str, *, out_of_memory: bool = False, dead: bool = False):
        super().__init__(why)
        self.out_of_memory, self.dead = out_of_memory, dead


def environment(site: str = "") -> dict[str, str]:
    """Of a contestant's process: this repository, after `site` where the stack has packages of its own; no network; and
    the allocator's settings left to each stack (importing llamanb here has set its own)."""
    found = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    paths = [site or found.get("PYTHONPATH", ""), str(REPOSITORY)]
    return {
        **found,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


class Worker:
    """One contestant's process."""

    def __init__(self, settings: dict, site: str, log: IO):
        self.settings, self.versions, self.session = settings, None, None
        self._folder = tempfile.TemporaryDirectory(prefix="speed-")  # some stacks write beside where they run
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.speed_worker", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=self._folder.name,
            env=environment(site),
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def send(self, **command: Any) -> None:
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise StackError("its process has ended; see the log", dead=True) from None

    def answer(self, kind: str, timeout_s: float) -> Any:
        """Waits for the answer called `kind`. Raises StackError."""
        try:
            line = self._answers.get(timeout=max(1.0, timeout_s))
        except queue.Empty:
            raise StackError(f"no answer within {timeout_s:.0f} s", dead=True) from None
        if line is None:
            self._process.wait()
            raise StackError(f"its process ended with code {self._process.returncode}; see the log", dead=True)
        found = json.loads(line)
        if "failed" in found:
            raise StackError(found["failed"], out_of_memory=found["oom"], dead=kind == "ready")
        return found[kind]

    def wait_ready(self, timeout_s: float) -> dict:
        """Its packages' versions, once it has imported them."""
        if self.versions is None:
            self.versions = self.answer("ready", timeout_s)
        return self.versions

    def end(self) -> None:
        with contextlib.suppress(Exception):
            self._process.kill()
            self._process.wait(timeout=20)
        with contextlib.suppress(Exception):
            self._folder.cleanup()


class Clock:
    """How much of the time given is left."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()


class Workers:
    """Processes by what they hold; `start` makes them. The first part of a key is the stack."""

    def __init__(self, start: Callable[[tuple], Worker], clock: Clock):
        self._start, self._clock, self._running = start, clock, {}
        self._failed: dict[str, int] = {}
        """Failures by stack that has never succeeded."""
        self._works: set[str] = set()

    def warm(self, keys: list[tuple]) -> None:
        """Starts processes, whose imports then run side by side."""
        for key in keys:
            if key not in self._running:
                self._running[key] = self._start(key)

    def keep_only(self, wanted: Callable[[tuple], bool]) -> None:
        for key in [key for key in self._running if not wanted(key)]:
            self.retire(key)

    def retire(self, key: tuple) -> None:
        worker = self._running.pop(key, None)
        if worker:
            worker.end()

    def turn(self, key: tuple, session: dict, block: dict, *, open_s: float = 240, block_s: float = 150) -> dict:
        """One contestant's turn: opens `session` unless it is open already, then times a block of it.

        Raises StackError; a process that no longer answers, or ran out of memory, is ended, and the next turn starts
        another. A stack that has failed MOST_FAILURES times and never succeeded is not tried again.
        """
        stack = key[0]
        if self._failed.get(stack, 0) >= MOST_FAILURES:
            raise StackError(f"not tried: {stack} has failed {MOST_FAILURES} times and never worked")
        try:
            result = self._turn(key, session, block, open_s, block_s)
        except StackError as error:
            if key in self._running:
                self._running[key].session = None
            if error.dead or error.out_of_memory:
                self.retire(key)
            if stack not in self._works and not error.out_of_memory:
                self._failed[stack] = self._failed.get(stack, 0) + 1
            raise
        self._works.add(stack)
        self._failed.pop(stack, None)
        return result

    def _turn(self, key: tuple, session: dict, block: dict, open_s: float, block_s: float) -> dict:
        self.warm([key])
        worker, opened = self._running[key], None
        worker.wait_ready(min(120, self._clock.left))
        if worker.session != session:
            worker.session = None
            worker.send(do="open", **session)
            opened = worker.answer("opened", min(open_s, self._clock.left))
            worker.session = session
        worker.send(do="block", **block)
        return {"opened": opened, **worker.answer("block", min(block_s, self._clock.left))}

    def versions(self, key: tuple) -> dict | None:
        return self._running[key].versions if key in self._running else None

    def end(self) -> None:
        self.keep_only(lambda key: False)
