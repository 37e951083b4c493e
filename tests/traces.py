"""Recordings of torch's allocator in real trainings, packed small: the truth that allocator and tape are held to.

    python -m tests.traces FOLDER [CASE ...]    # packs FOLDER/CASE.json.gz into tests/data/CASE.json.gz

A recording is JSON: `case` (what was trained: model, micro, length, recipe ...), `dtype`, `attention`, `optimizer`,
`expandable`, `gpu`, `torch`; `events` of torch.cuda.memory's history as [a|f|m|u, address, bytes, stream, tag] for
allocated, freed, mapped and unmapped; `marks`, names of the moments at which MARK bytes were allocated and freed again;
`states`, [allocated, its peak, reserved, its peak, used on the device] in bytes at these moments. A packed one keeps
what the tests need, and of the history its sizes and order: n > 0 where n units of 512 bytes were allocated, -k where
the k-th youngest of what was alive was freed, 0 where the cache was emptied. Gzip makes two kilobytes of that.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from llamanb.allocator import Allocator
from llamanb.architecture import Architecture
from llamanb.recipe import TARGETS
from llamanb.tape import CHECKPOINTED, OFFLOADED, STORED, Workload

DATA = Path(__file__).parent / "data"
UNIT = 512
MARK = UNIT * (7 + 13 * 1024)
LOADING, FORWARD, BACKWARD, STEP = "loading", "forward", "backward", "optimizer step"
RECORDED_WITH = {"transformers": "5.23.0", "trl": "1.16.0", "peft": "0.21.2", "bitsandbytes": "0.50.2"}
"""For recordings that name torch's version alone."""
SHAPES = {  # of the models recorded, "8b3" has three layers: hidden, heads, key and value heads, head size, MLP, tied
    "8b": (4096, 32, 8, 128, 14336, False),
    "3b": (3072, 24, 8, 128, 8192, True),
    "1b": (2048, 32, 8, 64, 8192, True),
}


@dataclass(frozen=True)
class Trace:
    """A packed recording; memory in bytes."""

    case: dict
    versions: dict[str, str]
    gpu: str
    expandable: bool
    work: Workload
    """What was trained, as the tape is asked for it."""
    peaks: dict[str, int]
    """Most allocated while LOADING, FORWARD, BACKWARD and in an optimizer STEP."""
    allocated: int
    reserved: int
    """Peaks that torch reported at the end."""
    events: list[int]
    """As above."""

    def replay(self) -> Allocator:
        """The allocator after all that was recorded."""
        allocator, living = Allocator(expandable=self.expandable), []
        for event in self.events:
            if event > 0:
                living.append(allocator.take(event * UNIT))
            elif event < 0:
                allocator.give(living.pop(event))
            else:
                allocator.empty_cache()
        return allocator


def read(case: str) -> Trace:
    with gzip.open(DATA / f"{case}.json.gz", "rt", encoding="utf-8") as file:
        fields = json.load(file)
    work = fields["work"]
    model = Architecture(**work["model"])
    lists = {"layers": tuple(work["layers"]), "targets": tuple(work["targets"])}
    return Trace(**{**fields, "work": Workload(**{**work, **lists, "model": model, "joined": False})})


def names() -> list[str]:
    """The cases that are here."""
    return sorted(path.name.removesuffix(".json.gz") for path in DATA.glob("*.json.gz"))


def pack(recording: dict) -> Trace:
    before = recording["states"]["start"][0] // 2**20 * 2**20  # cuBLAS's two workspaces, where it had them already
    events, living, emptied = [], [], False
    if before:
        living += ["workspace"] * 2
        events += [before // 2 // UNIT] * 2 + [2 * 2**20 // UNIT, -1]
    for kind, address, size, *_ in recording["events"]:
        if kind == "a":
            living.append(address)
            events.append(_units(size))
        elif kind == "f" and address in living:
            at = len(living) - 1 - living[::-1].index(address)
            events.append(at - len(living))
            del living[at]
        elif kind == "u" and not emptied:  # one call unmaps many pages
            events.append(0)
        emptied = kind == "u" or (emptied and kind == "m")
    _, allocated, _, reserved, *_ = recording["states"]["trained"]
    return Trace(
        case={**recording["case"], "model": recording["case"]["model"].split("/")[-1]},
        versions=recording.get("versions") or {"torch": recording["torch"].split("+")[0], **RECORDED_WITH},
        gpu=recording["gpu"],
        expandable=recording["expandable"],
        work=workload(recording),
        peaks=_peaks(recording, before),
        allocated=allocated,
        reserved=reserved,
        events=events,
    )


def workload(recording: dict) -> Workload:
    case, recipe = recording["case"], recording["case"].get("recipe", {})
    name = case["model"].split("/")[-1]
    hidden, heads, kv_heads, head_size, intermediate, tied = SHAPES[name[:2]]
    model = Architecture(
        name=name,
        hidden=hidden,
        layers=int(name[2:]),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        intermediate=intermediate,
        vocabulary=128256,
        tied=tied,
        max_positions=131072,
    )
    method = recipe.get("method", "qlora-nf4")
    kind = CHECKPOINTED if recipe.get("checkpointing") == "all" else STORED
    kind = OFFLOADED if case.get("checkpoint") == "offload" else kind
    switched_off = case.get("off", ())
    expanded = recording["attention"] == "llamanb_expanded" or recording["dtype"] == "fp32"
    kernel = "math" if "flash" in switched_off else "flash" if "cudnn" in switched_off else "cudnn"
    return Workload(
        model=model,
        rows=case["micro"],
        length=case["length"],
        layers=(kind,) * model.layers,
        dtype=recording["dtype"],
        quantization=method.removeprefix("qlora-") if method.startswith("qlora-") else None,
        full=method == "full",
        double_quant=recipe.get("double_quant", True),
        rank=recipe.get("rank", 16),
        targets=TARGETS[recipe.get("targets", "all-linear")],
        dropout=bool(recipe.get("dropout")),
        optimizer=recording["optimizer"],
        kernel="memory-efficient" if expanded and not switched_off else kernel,
        padded=bool(case.get("padded")),
        accumulation=case.get("accum", 2),
        blas_workspace=2 * 32 * 2**20,  # an H200's
    )


def _peaks(recording: dict, before: int) -> dict[str, int]:
    """Most allocated in each part of the training; the marks themselves do not count."""
    marks, marking, live, total = iter(recording["marks"]), set(), {}, before
    part, peaks = LOADING, dict.fromkeys((LOADING, FORWARD, BACKWARD, STEP), 0)
    for kind, address, size, *_ in recording["events"]:
        if kind == "a" and size == MARK:
            part = _part(next(marks))
            marking.add(address)
        elif kind == "f" and address in marking:
            marking.discard(address)
        elif kind == "a":
            live[address] = _units(size) * UNIT
            total += live[address]
        elif kind == "f":
            total -= live.pop(address, 0)
        peaks[part] = max(peaks[part], total)
    return peaks


def _part(mark: str) -> str:
    """Which part of a training begins at a mark."""
    if mark.startswith("fwd"):
        return FORWARD if mark.endswith("begin") else BACKWARD
    return LOADING if mark in ("loaded", "adapters", "train_begin") else STEP


def _units(size: int) -> int:
    return max(1, -(-size // UNIT))


def main(folder: str, *cases: str) -> None:
    DATA.mkdir(exist_ok=True)
    for case in cases or names():
        with gzip.open(Path(folder) / f"{case}.json.gz", "rt", encoding="utf-8") as file:
            packed = json.dumps(dataclasses.asdict(pack(json.load(file))), separators=(",", ":"))
        path = DATA / f"{case}.json.gz"
        path.write_bytes(gzip.compress(packed.encode(), mtime=0))
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
