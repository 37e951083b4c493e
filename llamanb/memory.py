"""How much memory a training takes, predicted: by instant, by bucket, and with what the allocator adds.

A step's tape (tape/) says what is alive when. Deep models repeat the same layer, so each instant's peak grows by the
same amount with each layer of a kind: tapes of a few layers give the peaks of all. The instants are carried on one by
one, since the peak of a deep model and that of a shallow one lie in different instants. What lies between allocated and
reserved comes from replaying a tape of at most REPLAYED layers (allocator.py).
"""

from __future__ import annotations

import functools
import itertools
import os
from dataclasses import dataclass, replace

from llamanb.allocator import Allocator
from llamanb.tape import (
    ADAPT,
    BACKWARD,
    BUCKETS,
    CHECKPOINTED,
    EMPTIED,
    FORWARD,
    HEAD,
    HEAD_BACKWARD,
    LOAD,
    RECOMPUTED,
    STEP,
    Tape,
    Workload,
    record,
    record_load,
    record_steady,
)

SEEN = {
    "load": (LOAD, ADAPT),
    "forward": (FORWARD,),
    "loss": (HEAD,),
    "backward": (HEAD_BACKWARD, BACKWARD, RECOMPUTED),
    "optimizer step": (STEP,),
}
"""What can be told apart from outside, and the instants in it."""
REPLAYED = 32
"""Layers of the replay, to be done in 50 ms; deeper models have a few gaps more, GAPS_PER_LAYER."""
GAPS_PER_LAYER = 3 * 2**20
"""Bytes: 8B at 4 × 512 tokens leaves 130 MiB of gaps with 16 layers and 190 with 32."""


@dataclass(frozen=True)
class Memory:
    """A prediction, in bytes."""

    peaks: dict[str, int]
    """Most allocated at each instant (tape.INSTANTS)."""
    buckets: dict[str, int]
    """What is allocated at the highest peak (tape.BUCKETS)."""
    gaps: int
    """What the allocator reserves beyond that: free memory between tensors, and caches."""

    @property
    def instant(self) -> str:
        """When the peak occurs."""
        return max(self.peaks, key=self.peaks.get)

    @property
    def parts(self) -> dict[str, int]:
        """The peak of each part that can be told apart from outside (SEEN)."""
        return {part: max(self.peaks.get(instant, 0) for instant in instants) for part, instants in SEEN.items()}

    @property
    def allocated(self) -> int:
        return max(self.peaks.values())

    @property
    def reserved(self) -> int:
        """What torch takes from the card, the CUDA context aside."""
        return self.allocated + self.gaps


@dataclass(frozen=True)
class Outline:
    """What a workload's tape comes to, without the allocator."""

    peaks: dict[str, dict[str, int]]
    """Bytes by bucket at the peak of each instant."""
    written: int
    """Bytes that a micro-batch allocates in all: each is written once at least."""
    dequantized: int
    """Of these, weights of 4 bits that fused layers write in the step's dtype."""
    operations: int
    """Allocations of a micro-batch: as many operations, roughly, are launched."""

    @property
    def allocated(self) -> int:
        return max(sum(buckets.values()) for buckets in self.peaks.values())


def segments_grow() -> bool:
    """Whether torch's allocator will use expandable segments here: `import llamanb` asks for them, unless the user has
    a setting that says something else."""
    settings = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    return "expandable_segments:True" in settings


def predict(work: Workload, *, expandable: bool | None = None) -> Memory:
    """Memory of a workload; `expandable` as in allocator.Allocator, or None for what is set in this process."""
    found = outline(work)
    totals = {instant: sum(buckets.values()) for instant, buckets in found.peaks.items()}
    whole, gaps = replayed(work, expandable=expandable)
    totals = {instant: total + whole for instant, total in totals.items()}
    return Memory(totals, found.peaks[max(totals, key=totals.get)], gaps)


def outline(work: Workload) -> Outline:
    """The outline of a model of any depth, from tapes of at most two layers of each kind and one more."""
    return _streamed(work) if work.streamed else _deep(work)


@functools.lru_cache(maxsize=256)
def _deep(work: Workload) -> Outline:
    counts = {kind: work.layers.count(kind) for kind in dict.fromkeys(work.layers)}
    few = {kind: min(count, 2) for kind, count in counts.items()}
    base = _outline(_cut(work, _layers(few)))
    peaks = {instant: dict(buckets) for instant, buckets in base.peaks.items()}
    totals = {name: getattr(base, name) for name in ("written", "dequantized", "operations")}
    for kind, count in counts.items():
        more = count - few[kind]
        if more:
            one = _outline(_cut(work, _layers(few | {kind: few[kind] + 1})))
            for instant, buckets in peaks.items():
                for bucket in buckets:
                    buckets[bucket] += more * (one.peaks[instant][bucket] - base.peaks[instant][bucket])
            totals = {name: total + more * (getattr(one, name) - getattr(base, name)) for name, total in totals.items()}
    return Outline(peaks, **totals)


def _streamed(work: Workload) -> Outline:
    """The outline with some layers' weights in host memory: the same but for those, and for the buffers."""
    found, few = _deep(work.replace(streamed=0)), _cut(work, (CHECKPOINTED,) * 2)
    none, one, two = (_lasting(few.replace(streamed=n)) for n in range(3))
    more = {bucket: (work.streamed - 1) * (two[bucket] - size) + size - none[bucket] for bucket, size in one.items()}
    peaks = {at: {name: size + more[name] for name, size in buckets.items()} for at, buckets in found.peaks.items()}
    return replace(found, peaks=peaks)


def _lasting(work: Workload) -> dict[str, int]:
    """Bytes by bucket when adapters are made."""
    return _load_peaks(work.replace(rows=1, length=1))[ADAPT]


@functools.lru_cache(maxsize=16)
def _load_peaks(work: Workload) -> dict[str, dict[str, int]]:
    return tape_peaks(record_load(work))


def _layers(counts: dict[str, int]) -> tuple[str, ...]:
    return tuple(kind for kind, count in counts.items() for _ in range(count))


def _cut(work: Workload, layers: tuple[str, ...]) -> Workload:
    streamed = round(work.streamed * len(layers) / len(work.layers))
    return work.replace(model=replace(work.model, layers=len(layers)), layers=layers, streamed=streamed)


@functools.lru_cache(maxsize=256)
def _outline(work: Workload) -> Outline:
    tape = record_steady(work)
    begin = next(at for at, name in tape.marks if name == FORWARD)
    new = [tape.sizes[event - 1] for event in tape.events[begin:] if event > 0]
    return Outline(tape_peaks(tape), sum(new), tape.dequantized, len(new))


def tape_peaks(tape: Tape) -> dict[str, dict[str, int]]:
    """Bytes by bucket at each instant's peak of a tape, sizes rounded as the allocator does."""
    sizes = [max(512, -(-size // 512) * 512) for size in tape.sizes]
    deltas = [sizes[event - 1] if event > 0 else -sizes[-event - 1] for event in tape.events]
    live = [0, *itertools.accumulate(deltas)]  # after so many events
    peaks: dict[str, tuple[int, int]] = {}  # bytes, after how many events
    for (begin, name), (end, _) in itertools.pairwise([*tape.marks, (len(tape.events), "")]):
        part = live[begin : end + 1]  # with what is there when it begins, as torch's own counters have it
        highest = max(part)
        instant = ADAPT if name == EMPTIED else name
        if highest > peaks.get(instant, (-1, 0))[0]:
            peaks[instant] = (highest, begin + part.index(highest))
    found, buckets, done = {}, dict.fromkeys(BUCKETS, 0), 0
    for instant, (_, until) in sorted(peaks.items(), key=lambda item: item[1][1]):
        for event, delta in zip(tape.events[done:until], deltas[done:until], strict=True):
            buckets[tape.buckets[abs(event) - 1]] += delta
        found[instant], done = dict(buckets), until
    return found


def replayed(work: Workload, *, expandable: bool | None = None) -> tuple[int, int]:
    """What the allocator adds, in bytes: to what is allocated, where it gives larger blocks than it was asked for (only
    without expandable segments), and on top of that to what is reserved."""
    expandable = segments_grow() if expandable is None else expandable
    depth = len(work.layers)
    if depth <= REPLAYED:
        return _replayed(work, expandable)
    spread = [work.layers[i * depth // REPLAYED] for i in range(REPLAYED)]
    whole, gaps = _replayed(_cut(work, tuple(spread)), expandable)
    return round(whole * depth / REPLAYED), gaps + (depth - REPLAYED) * GAPS_PER_LAYER


@functools.lru_cache(maxsize=64)
def _replayed(work: Workload, expandable: bool) -> tuple[int, int]:
    allocator = replay(record(work), expandable=expandable)
    asked = 0 if expandable else allocator.peak_allocated - outline(work).allocated
    return max(0, asked), allocator.peak_reserved - allocator.peak_allocated


def replay(tape: Tape, *, expandable: bool = True) -> Allocator:
    """Runs a tape through torch's allocator and returns it as it is afterwards."""
    allocator = Allocator(expandable=expandable)
    emptied = next((at for at, name in tape.marks if name == EMPTIED), None)
    blocks, sizes, take, give = {}, tape.sizes, allocator.take, allocator.give
    for i, event in enumerate(tape.events):
        if i == emptied:
            allocator.empty_cache()
        if event > 0:
            blocks[event] = take(sizes[event - 1])
        else:
            give(blocks.pop(-event))
    return allocator
