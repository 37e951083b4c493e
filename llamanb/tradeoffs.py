"""What each memory technique costs and saves here: every one switched alone, against the same baseline.

    python -m llamanb.tradeoffs '{"model": "FOLDER", "dataset": "rows.jsonl", "effective_batch_size": 4}' [RUNS [NAMES]]

Each variant trains a few steps in a process of its own, through plan() and train() like any run, so that nothing of one
is left for the next. What was seen is read back from the runs' folders: a variant that was measured is not run again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llamanb import __version__, hub
from llamanb.architecture import architecture
from llamanb.card import gpu_in_use
from llamanb.claims import BASELINE, CLAIMS, HALF, MUCH, NOISE, NOT_FUSED, PADDED, UNPADDED, mib
from llamanb.data import TrainingData, load_data
from llamanb.data.encode import IGNORE, Encoded
from llamanb.errors import LlamanbError, RecipeError
from llamanb.html import Table
from llamanb.layout import EXPANDED_ATTENTION
from llamanb.memory import SEEN
from llamanb.planner import plan
from llamanb.plots import Picture
from llamanb.precision import choose_precision
from llamanb.recipe import Recipe
from llamanb.run import FINISHED, Run
from llamanb.tape import CHECKPOINTED, STORED
from llamanb.tradeoffs_picture import tradeoffs_picture
from llamanb.training import CHECKPOINTS, LIBRARIES, train
from llamanb.trials import KERNELS

WITHOUT_GPU = {BASELINE, "nf4", "unquantized", "recompute all", "micro-batch 1", "micro-batch 4"}
"""What a CPU measures unless more is asked for: where there is something to see."""
STEPS = 12
LOAD, FORWARD, *_ = SEEN
NEEDS_GPU, NOT_MEASURED = "needs a GPU", "not measured"
OWN_KERNELS = ("memory-efficient", "math")


@dataclass(frozen=True)
class Variant:
    """A recipe, and what a recipe cannot say."""

    recipe: Recipe
    kernel: str = ""
    """Attention kernel that is forced; empty: the one that the plan takes."""
    half: bool = False
    """The first half of the layers is recomputed, the others are kept."""
    segments: bool = True
    """torch's expandable segments."""
    fused: bool = True
    """Fused layers, where the plan has them."""
    rows: bool = False
    """The rows as they are, instead of pieces of one length."""

    @property
    def needs_gpu(self) -> bool:
        """Whether it changes nothing without one."""
        asked = {self.recipe.optimizer[:5], self.recipe.checkpointing}
        no_effect = bool(self.kernel) or not self.segments or not self.fused
        return no_effect or not asked.isdisjoint({"paged", "offloaded"})


@dataclass(frozen=True)
class Row:
    """A variant with its run, or the reason why there is none."""

    variant: Variant
    run: Run | None = None
    failed: str = ""

    @property
    def lasting_gib(self) -> float:
        return sum(self.run.buckets_gib.values())

    @property
    def at(self) -> str:
        """The part of a training step in which the most is allocated; empty without a GPU."""
        peaks = {part: gib for part, gib in self.run.timeline.peaks_gib.items() if part in SEEN and part != LOAD}
        return max(peaks, key=peaks.get, default="")

    @property
    def peak_gib(self) -> float:
        """What is allocated then; on a CPU what lasts, because nothing else is counted there."""
        return self.run.timeline.peaks_gib[self.at] if self.at else self.lasting_gib

    @property
    def reserved_gib(self) -> float:
        return max((sample.reserved_gib or 0.0 for sample in self.run.timeline.samples), default=0.0)

    @property
    def activations_gib(self) -> float:
        """What the forward pass leaves for the backward pass: its peak, less what lasts."""
        return self.run.timeline.peaks_gib.get(FORWARD, 0.0) - self.lasting_gib

    @property
    def speed(self) -> float:
        """Tokens a second of the middle one of the steps, the first left out; 0 where there was no second."""
        steps = itertools.pairwise(self.run.timeline.steps)
        rates = [(step.tokens - last.tokens) / max(step.time_s - last.time_s, 1e-9) for last, step in steps]
        return statistics.median(rates) if rates else 0.0


@dataclass(frozen=True)
class Tradeoffs:
    """Variants by name, the baseline first, that were measured or were to be, on one device."""

    rows: dict[str, Row]

    @property
    def measured(self) -> dict[str, Row]:
        return {name: row for name, row in self.rows.items() if row.run and row.speed}

    @property
    def gpu(self) -> bool:
        return any(row.run.plan.card.is_gpu for row in self.measured.values())

    def ran(self, name: str) -> Row:
        """A row with figures. Raises LookupError that says why there are none."""
        if name not in self.measured:
            row = self.rows.get(name)
            raise LookupError(f"{name}: {(row and row.failed) or 'not run'}")
        return self.measured[name]

    def table(self) -> Table:
        """What each variant takes, and how fast it is."""
        rows, base = [], self.measured.get(BASELINE)
        memory = ["peak, MiB", "in the", "reserved, MiB"] if self.gpu else ["lasting host memory, MiB"]
        for name, row in self.rows.items():
            rows.append([name, *[""] * (len(memory) + 2), row.failed])
            if row.run:
                gpu = [row.at, mib(row.reserved_gib)] if self.gpu else []
                against = f"{row.speed / base.speed - 1:+.0%}" if base else ""
                rows[-1] = [name, mib(row.peak_gib), *gpu, f"{row.speed:,.0f}", against, f"{row.run.losses[-1]:.3f}"]
        return Table(["variant", *memory, "tokens/s", "to baseline", "last loss, or why none"], rows, self._words())

    def memory(self) -> Table:
        """By bucket what lasts, and on a GPU the peak of each part of a training, in MiB."""
        measured, parts = self.measured, list(SEEN) if self.gpu else []
        buckets = list(dict.fromkeys(bucket for row in measured.values() for bucket in row.run.buckets_gib))
        seen = {name: row.run.buckets_gib | row.run.timeline.peaks_gib for name, row in measured.items()}
        rows = [[name, *(mib(sizes.get(what, 0.0)) for what in (*buckets, *parts))] for name, sizes in seen.items()]
        where = "GPU memory, MiB: what lasts, and the peak of each part" if self.gpu else "host memory, MiB: what lasts"
        return Table(["variant", *buckets, *(f"{part}: peak" for part in parts)], rows, where)

    def picture(self) -> Picture:
        """Memory against speed."""
        first = {row.run.folder: name for name, row in reversed(self.measured.items())}
        shown = {name: row for name, row in self.measured.items() if first[row.run.folder] == name}
        points = {name: (1024 * row.peak_gib, row.speed) for name, row in shown.items()}
        return tradeoffs_picture(points, "MiB at the peak" if self.gpu else "MiB of host memory that last")

    def verdicts(self) -> Table:
        """What is often said, held against the figures."""
        rows = []
        for said, of_gpu, judge in CLAIMS:
            try:
                holds, figures = (None, "") if of_gpu and self.measured and not self.gpu else judge(self)
                rows.append([said, NEEDS_GPU if holds is None else "true here" if holds else "false here", figures])
            except LookupError as error:
                rows.append([said, NOT_MEASURED, error.args[0]])
        limits = f"a speed differs from {NOISE:.0%} on, much is {MUCH:.0%} of the peak"
        return Table(["often said", "measured", "figures"], rows, f"{self._words()}; {limits}")

    def _words(self) -> str:
        for row in self.measured.values():
            recipe, card = row.variant.recipe, row.run.plan.card
            shape = f"{recipe.effective_batch_size} × {recipe.max_length} tokens a step"
            return f"{recipe.model}, {shape}, {recipe.precision}, on {card.name}"
        return "nothing was measured"


def variants(recipe: Recipe) -> dict[str, Variant]:
    """What is measured, by name: the recipe, and the recipe with one thing changed each time."""

    def change(
        kernel: str = "", half: bool = False, segments: bool = True, fused=True, rows=False, **fields
    ) -> Variant:
        return Variant(recipe.replace(**fields), kernel, half, segments, fused, rows)

    short = max(8, recipe.max_length // 2)
    kernels = {"micro_batch_size": 1, "fused": False}
    return {
        BASELINE: change(),
        "nf4": change(method="qlora-nf4", double_quant=True),
        "single quantization": change(method="qlora-nf4", double_quant=False),
        "fp4": change(method="qlora-fp4", double_quant=True),
        "int8": change(method="qlora-int8"),
        "unquantized": change(method="lora"),
        "keep all": change(checkpointing="none"),
        "recompute half": change(checkpointing="none", half=True),
        "recompute all": change(checkpointing="all"),
        "offload all": change(checkpointing="offloaded"),
        **{f"micro-batch {n}": change(micro_batch_size=n) for n in (1, 2, 4) if recipe.effective_batch_size % n == 0},
        NOT_FUSED: change(fused=False, method="qlora-nf4"),
        UNPADDED: change(rows=True),
        PADDED: change(rows=True, fused=False, method="qlora-nf4"),
        **{dtype: change(precision=dtype) for dtype in ("fp32", "fp16", "bf16")},
        "fused AdamW": change(optimizer="adamw_torch_fused"),
        "8-bit AdamW": change(optimizer="adamw_8bit"),
        "paged 8-bit AdamW": change(optimizer="paged_adamw_8bit"),
        "rank times 4": change(rank=min(1024, 4 * recipe.rank)),
        "attention only": change(targets="attention"),
        "fixed segments": change(segments=False),
        **{kernel: change(kernel, **kernels) for kernel in OWN_KERNELS},
        **{f"{kernel}{HALF}": change(kernel, max_length=short, **kernels) for kernel in OWN_KERNELS},
    }


def measure(recipe: Recipe, names: Iterable[str] | str | None = None, runs: str = "runs/tradeoffs") -> Tradeoffs:
    """Measures variants one after the other, each in a fresh process; one that fails is a row with its reason.

    Args:
        recipe: the baseline; what it leaves to the plan is settled first, alike for all.
        names: of `variants`, or as text with commas between; None: all of them, on a CPU those of WITHOUT_GPU.
        runs: folder of the runs. What was measured there before, on this device and with these libraries, counts.

    Raises RecipeError for a name that is no variant's.
    """
    device, capability = _device()
    found = variants(_settled(recipe, capability))
    asked = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
    asked = {BASELINE, *(asked or (found if capability else found.keys() & WITHOUT_GPU))}
    if unknown := sorted(asked - found.keys()):
        raise RecipeError(f"no variant is called {unknown[0]!r}", f"these are: {', '.join(found)}", "take one of those")
    rows: dict[str, Row] = {}
    for name in (name for name in found if name in asked):
        known = _finished(Path(runs), found[name], device)
        rows[name] = row = Row(found[name], known) if known else _run(name, found[name], Path(runs), device)
        words = f"{mib(row.peak_gib)} MiB{'' if row.at else ' of host memory'}" if row.run else row.failed
        words += f", {row.speed:,.0f} tokens/s{', as measured before' if known else ''}" if row.run else ""
        print(f"{len(rows)} of {len(asked)}  {name}: {words}", flush=True)
    return Tradeoffs(rows)


def _settled(recipe: Recipe, capability: tuple[int, int] | None) -> Recipe:
    """The recipe with each choice made that a plan would make otherwise for one variant than for another."""
    optimizer = "paged_adamw_8bit" if capability and recipe.adapters else "adamw_torch_fused"
    micro_batch_size = recipe.micro_batch_size or math.gcd(2, recipe.effective_batch_size)
    made = {"micro_batch_size": micro_batch_size, "steps": recipe.steps or STEPS, "eval_rows": 0}
    made |= {"optimizer": optimizer} if recipe.optimizer == "auto" else {}
    made |= {"checkpointing": "none"} if recipe.checkpointing == "auto" else {}
    return recipe.replace(**made, precision=choose_precision(capability, recipe.precision).dtype)


def _device() -> tuple[str, tuple[int, int] | None]:
    """Name and compute capability, without a CUDA context, whose memory the variants would miss."""
    import torch

    index, _ = gpu_in_use(torch)
    gpu = index is not None
    return (torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)) if gpu else ("CPU", None)


def _key(variant: Variant, device: str) -> str:
    versions = [__version__, *(importlib.metadata.version(name) for name in LIBRARIES)]
    versions += [f.stat().st_mtime_ns for f in (Path(variant.recipe.dataset),) if f.is_file()]
    return hashlib.sha256(json.dumps([dataclasses.asdict(variant), device, versions]).encode()).hexdigest()[:10]


def _finished(runs: Path, variant: Variant, device: str) -> Run | None:
    for folder in runs.glob(f"*-{_key(variant, device)}*"):
        with contextlib.suppress(RecipeError):
            if (run := Run.open(folder)).status == FINISHED:
                return run


def _run(name: str, variant: Variant, runs: Path, device: str) -> Row:
    """Trains a variant in a process of its own."""
    if device == "CPU" and variant.needs_gpu:
        return Row(variant, failed=NEEDS_GPU)
    env = {name: value for name, value in os.environ.items() if name != "PYTORCH_CUDA_ALLOC_CONF"}
    env |= hub.token_of_children() | {"PYTORCH_ALLOC_CONF": f"expandable_segments:{variant.segments}"}
    folder = f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{_key(variant, device)}"
    command = [sys.executable, "-m", "llamanb.tradeoffs", json.dumps(dataclasses.asdict(variant)), str(runs), folder]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if run := _finished(runs, variant, device):
        return Row(variant, run)
    said = [line for line in done.stderr.splitlines() if "Error: " in line and done.returncode > 0]
    return Row(variant, failed=said[-1].strip()[:300] if said else f"its process ended with {done.returncode}")


def train_variant(variant: Variant, runs: str, name: str) -> None:
    """Trains a variant in this process, its attention kernels switched for good; its weights are not kept."""
    recipe = variant.recipe
    data = load_data(recipe.replace(long_rows="truncate")) if variant.rows else _pieces(recipe)
    made = plan(recipe.replace(weights="resident"), None, data, force=True)
    if made.fused and not variant.fused:
        made = made.replace(fused=False, memory=None, time=None)
    if variant.half:
        half, odd = divmod(architecture(recipe.model, recipe.revision).layers, 2)
        made = made.replace(layers=(CHECKPOINTED,) * half + (STORED,) * (half + odd), memory=None, time=None)
    if variant.kernel:
        import torch

        attention = EXPANDED_ATTENTION if variant.kernel == "memory-efficient" else "sdpa"
        made = made.replace(kernel=variant.kernel, attention=attention, memory=None, time=None)
        for kernel, (_, switch) in KERNELS.items():
            getattr(torch.backends.cuda, f"enable_{switch}_sdp")(kernel in (variant.kernel, "math"))
    run = train(made, data, name=name, runs=runs, resume=False)
    shutil.rmtree(run.saved)
    shutil.rmtree(run.folder / CHECKPOINTS)


def _pieces(recipe: Recipe) -> TrainingData:
    """The rows glued together and cut into pieces of max_length tokens, as many as the steps take: every micro-batch
    then has the same shape."""
    data = load_data(recipe.replace(max_length=131072, long_rows="skip"))  # no row is too long to be cut
    tokens = itertools.cycle([pair for row in data.train for pair in zip(row.input_ids, row.labels, strict=True)])
    pieces: list[Encoded] = []
    while len(pieces) < recipe.steps * recipe.effective_batch_size:
        ids, labels = map(list, zip(*itertools.islice(tokens, recipe.max_length), strict=True))
        if any(label != IGNORE for label in labels[1:]):
            pieces.append(Encoded(ids, labels))
    return dataclasses.replace(data, train=pieces)


def main(asked: str, runs: str = "runs/tradeoffs", names: str | None = None) -> None:
    fields = json.loads(asked)
    if "recipe" in fields:  # one variant, asked for by `measure`
        try:
            return train_variant(Variant(Recipe.from_dict(fields.pop("recipe")), **fields), runs, names)
        except LlamanbError as error:
            sys.exit(f"{type(error).__name__}: {error.what}: {error.why}".replace("\n", " "))
    found = measure(Recipe.from_dict(fields), names, runs=runs)
    text = "\n\n".join(map(str, (found.table(), found.memory(), found.verdicts())))
    Path(runs).mkdir(parents=True, exist_ok=True)  # not there where nothing could be run
    (Path(runs) / "tradeoffs.txt").write_text(f"{text}\n", encoding="utf-8")
    found.picture().save(Path(runs) / "tradeoffs.png")
    print("", text, sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
