"""Memory over time, sampled by a thread that training never waits for.

On a GPU the samples are NVML's (every process's memory, which is what runs out) beside torch's own; where NVML does
not answer, or stops to, the driver's through torch, and at last torch's own alone. Without a GPU they are this
process's memory on the host, and say so.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from llamanb.card import GIB, gpu_in_use
from llamanb.nvml import first_line, nvml_handle, nvml_memory, start_nvml
from llamanb.timeline import Sample, Timeline

INTERVAL_S, OFTEN_S = 0.1, 3600.0
"""Seconds between two samples, and for how long; from then on they grow with the run: a day takes 29 MB of host memory
and not 166."""
WRITE_S = 5.0
"""Seconds between two additions to the run's files."""


class Source(NamedTuple):
    """Something that knows how much memory is in use."""

    words: str
    read_gib: Callable[[], float]


class MemorySampler:
    """Samples memory into a timeline every INTERVAL_S seconds, later less often, between `start` and `stop`.

    Args:
        sources: of the memory in use, the best first. One that fails is left for the next, and the timeline says so.
        torch_gib: gives what torch has allocated and reserved; None without a GPU.
        limit_gib: what there is.
    """

    def __init__(self, sources: list[Source], torch_gib: Callable | None = None, limit_gib: float | None = None):
        self.timeline = Timeline(sources[0].words, limit_gib)
        self.folder: Path | None = None
        """Where the timeline is written as it grows, whatever the run does meanwhile."""
        self._sources, self._torch_gib = list(sources), torch_gib or (lambda: (None, None))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llamanb-memory", daemon=True)

    @classmethod
    def here(cls) -> MemorySampler:
        """For the GPU that torch would use, or the host's memory without one."""
        import psutil
        import torch

        process, why = psutil.Process(), "no GPU here"
        index, _ = gpu_in_use(torch)
        if index is not None:
            try:
                return cls._of_gpu(torch, index)
            except Exception as error:  # a GPU that does not answer
                why = f"{type(error).__name__}: {first_line(error)}"
        return cls([Source(f"host memory of this process ({why})", lambda: process.memory_info().rss / GIB)])

    @classmethod
    def _of_gpu(cls, torch: Any, index: int) -> MemorySampler:
        def torch_gib() -> tuple[float, float]:
            stats = torch.cuda.memory_stats_as_nested_dict(index)  # flattening it would take most of the time
            return tuple(stats[name]["all"]["current"] / GIB for name in ("allocated_bytes", "reserved_bytes"))

        def driver_gib() -> float:
            free, total = torch.cuda.mem_get_info(index)
            return (total - free) / GIB

        _, total = torch.cuda.mem_get_info(index)
        held = Source("VRAM that torch holds", lambda: torch_gib()[1])
        share = torch.cuda.get_per_process_memory_fraction(index)
        if share < 1:  # a pretend card: what the whole GPU holds says nothing
            return cls([held], torch_gib, share * total / GIB)
        sources = [Source("VRAM in use (driver)", driver_gib), held]
        nvml, _ = start_nvml()
        handle = nvml_handle(nvml, torch.cuda.get_device_properties(index)) if nvml else None
        known = nvml_memory(nvml, handle) if handle is not None else None
        if known and known.is_of(total):  # a slice of a GPU (MIG) may get the whole card's numbers

            def nvml_gib() -> float:
                memory = nvml_memory(nvml, handle)
                if memory is None:
                    raise RuntimeError("NVML no longer answers")
                return memory.used / GIB

            sources.insert(0, Source("VRAM in use (NVML)", nvml_gib))
        return cls(sources, torch_gib, total / GIB)

    def start(self) -> MemorySampler:
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ends the thread; safe to call twice."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2)

    def _run(self) -> None:
        timeline, written_s = self.timeline, 0.0
        while (self._sources or self.folder) and not self._stop.is_set():
            if self._sources:
                self._look()
            if self.folder and timeline.time_s - written_s >= WRITE_S:
                with contextlib.suppress(OSError):  # a full disk is told when the run is saved
                    timeline.write(self.folder)
                written_s = timeline.time_s
            self._stop.wait(INTERVAL_S * max(1.0, timeline.time_s / OFTEN_S))

    def _look(self) -> None:
        timeline = self.timeline
        try:
            sample = Sample(timeline.time_s, timeline.phase, self._sources[0].read_gib(), *self._torch_gib())
        except Exception as error:  # a driver that goes away must not end the training it watches
            lost = self._sources.pop(0)
            then = f"; from then on: {self._sources[0].words}" if self._sources else ", and nothing else does"
            why = f"{type(error).__name__}: {first_line(error)}"
            timeline.misses(f"{lost.words} stopped answering after {timeline.time_s:.0f} s ({why}){then}")
        else:
            timeline.add(sample)

    def __enter__(self) -> MemorySampler:
        return self.start()

    def __exit__(self, *exc) -> None:
        with contextlib.suppress(RuntimeError):
            self.stop()
