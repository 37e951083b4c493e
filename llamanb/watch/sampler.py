"""Memory over time, sampled by a thread that training never waits for.

On a GPU the samples are NVML's (every process's memory, which is what runs out) beside torch's own; where NVML does
not answer, the driver's through torch. Without a GPU they are this process's memory on the host, and say so.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from llamanb.card import GIB, gpu_in_use
from llamanb.nvml import nvml_handle, nvml_memory, start_nvml

INTERVAL_S = 0.1


class Sample(NamedTuple):
    """One look at the memory."""

    time_s: float
    """Since the sampler started."""
    used_gib: float
    torch_gib: float | None
    """What torch's allocator has reserved on the GPU; None without one."""


class Phase(NamedTuple):
    """From `start_s` on, until the next one, the run did this."""

    start_s: float
    name: str


@dataclass
class MemorySampler:
    """Samples `read` every INTERVAL_S seconds between `start` and `stop`."""

    read: Callable[[], tuple[float, float | None]]
    """Returns used GiB and what torch has reserved of it (None without a GPU)."""
    source: str
    """What is measured, in words for a plot's axis."""
    limit_gib: float | None = None
    """What there is; None where it does not matter."""
    samples: list[Sample] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    missing: str = ""
    """Why samples stopped before the end, in words; empty when they did not."""

    def __post_init__(self):
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llamanb-memory", daemon=True)
        self._start_s = 0.0

    @classmethod
    def here(cls) -> MemorySampler:
        """For the GPU that torch would use, or the host's memory without one."""
        import torch

        index, _ = gpu_in_use(torch)
        if index is None:
            import psutil

            process = psutil.Process()
            return cls(lambda: (process.memory_info().rss / GIB, None), "host memory of this process (no GPU here)")
        properties = torch.cuda.get_device_properties(index)
        _, total = torch.cuda.mem_get_info(index)
        nvml, _ = start_nvml()
        handle = nvml_handle(nvml, properties) if nvml else None
        known = nvml_memory(nvml, handle) if handle is not None else None
        if known and known.is_of(total):

            def read():
                memory = nvml_memory(nvml, handle)
                if memory is None:
                    raise RuntimeError("NVML no longer answers")
                return memory.used / GIB, torch.cuda.memory_reserved(index) / GIB

            return cls(read, "VRAM in use (NVML)", known.total / GIB)

        def read():
            free, total = torch.cuda.mem_get_info(index)
            return (total - free) / GIB, torch.cuda.memory_reserved(index) / GIB

        return cls(read, "VRAM in use (driver)", total / GIB)

    @property
    def time_s(self) -> float:
        """Seconds since `start`."""
        return time.monotonic() - self._start_s

    @property
    def peak_gib(self) -> float:
        return max((sample.used_gib for sample in list(self.samples)), default=0.0)

    def start(self) -> MemorySampler:
        self._start_s = time.monotonic()
        self._thread.start()
        return self

    def phase(self, name: str) -> None:
        """Marks what the run does from now on."""
        self.phases.append(Phase(self.time_s, name))

    def stop(self) -> None:
        """Ends the thread; safe to call twice."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.samples.append(Sample(self.time_s, *self.read()))
            except Exception as error:  # a driver that goes away must not end the training it watches
                self.missing = f"no more samples after {self.time_s:.0f} s: {type(error).__name__}: {error}"
                return
            self._stop.wait(INTERVAL_S)

    def __enter__(self) -> MemorySampler:
        return self.start()

    def __exit__(self, *exc) -> None:
        with contextlib.suppress(RuntimeError):
            self.stop()
