"""`merge`: a run's adapter and its base as one plain 16-bit checkpoint, made without ever holding the model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llamanb import __version__
from llamanb.errors import DiskFullError, HostMemoryError, ModelError, RecipeError
from llamanb.export.adapter import CONFIG, Parts
from llamanb.export.describe import write_small_files
from llamanb.export.read import read_rows
from llamanb.export.shards import Folder, free_bytes, layout, size_of
from llamanb.export.source import Source
from llamanb.export.stored import header
from llamanb.machine import GIB, host_memory
from llamanb.run import Run
from llamanb.training.checkpoints import lock

BASES = {
    "trained": "the weights that it was trained on",
    "original": "the checkpoint's own 16-bit weights",
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
ROUNDING = {"fp16": 2e-3, "bf16": 1.6e-2}
"""Largest difference from base + adapter, as a share of a weight's outputs, that 16 bits account for."""
SAMPLED, PROBES = 64, 4
"""Rows of each weight that are checked, and inputs that they are checked with."""
LIBRARIES_GIB, BYTES_A_WEIGHT = 1.0, 4
"""Host memory that a merge is allowed for: the libraries, and each weight of the largest layer that is merged."""


def merge(
    run: Run | str | Path,
    to: str | Path | None = None,
    *,
    base: str = "trained",
    dtype: str = "fp16",
    checkpoint: str | Path | None = None,
) -> Path:
    """Merges a run's adapter into 16-bit weights: a plain Llama that needs neither peft nor bitsandbytes.

    Which weights it is merged into:

    - `trained`: those that the adapter was trained on. QLoRA's base is in 4 bits; each weight is quantized as training
      had it and dequantized again, so the merged model is base + adapter but for the rounding to 16 bits: what was
      scored is what you get.
    - `original`: the checkpoint's own 16-bit weights. The adapter was not trained on them: part of what it learned
      makes up for what 4 bits lost, which is not lost here. Which of the two does better on held-out rows differs;
      measured: benchmarks/results/merge.md.

    Without quantization both are the same but for a rounding. Nothing is merged into 4 bits: most of what an adapter
    changes is smaller than their steps.

    One tensor at most is held. What can be refused is, before anything is written. A merge that was killed goes on with
    the shards it has when it is run again, to the same bytes. Each shard is read back before it counts: every weight is
    finite, and rows of each merged one give what base and adapter give.

    Args:
        run: a Run, its folder, or that of an adapter.
        to: the folder to make; left out, `merged` in the run's folder, or `merged-original`.
        base: one of BASES.
        dtype: fp16 or bf16.
        checkpoint: where the base lies now, when that is not where the recipe says; for base = "original", also the
            16-bit checkpoint that a 4-bit one was made from.

    Returns the folder.

    Raises:
        RecipeError: an argument cannot be what it is, the run has no adapter, or the folder is taken.
        WrongBaseError, WrongRevisionError, MissingShardError: the weights are not what was trained on, or not complete.
        DiskFullError, HostMemoryError: there is too little of either.
        ModelError: an adapter or base that cannot be merged, weights too large for fp16, or a failed check.
    """
    if base not in BASES or dtype not in DTYPES:
        raise RecipeError(
            f"base = {base!r}, dtype = {dtype!r}",
            "what is merged is 16 bits wide; 4 or 8 would lose what was learned",
            f"base: {' or '.join(BASES)}; dtype: {' or '.join(DTYPES)}",
        )
    source = Source.find(run, base, checkpoint)
    target = Path(to) if to else source.home / ("merged" if base == "trained" else f"merged-{base}")
    folder = Folder(target.expanduser().absolute(), _made_of(source, base, dtype))
    if folder.is_finished:
        print(f"{target} is merged already", flush=True)
        return folder.target
    if folder.target.exists():
        raise RecipeError(f"{target} is there already", "it is not this merge", "another folder: to=, or remove it")
    tied = {"lm_head.weight"} if source.shape.tied else set()
    weights = {name: shape for name, shape in source.base.weights.items() if name not in tied}
    job = _Job(source, dict(sorted(weights.items(), key=lambda item: _order(item[0]))), dtype)
    _require_memory(job)
    _require_disk(job, folder)
    folder.aside.mkdir(parents=True, exist_ok=True)
    with lock(folder.aside) as free:
        if not free:
            raise RecipeError(f"{target} is being merged by another process", f"it holds {folder.aside}", "wait for it")
        folder.take_up()
        job.write(folder, base)
    return folder.target


@dataclass
class _Job:
    source: Source
    weights: dict[str, tuple[int, ...]]
    """Shapes by name, in the order in which they are written."""
    dtype: str
    _wanted: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Of each merged weight of the shard at hand: row numbers, and what base + adapter give there."""

    @property
    def size(self) -> int:
        return sum(size_of(shape, DTYPES[self.dtype]) for shape in self.weights.values())

    def write(self, folder: Folder, base: str) -> None:
        wide = DTYPES[self.dtype]
        shards = layout(self.weights, wide)
        print(f"merging {self.source.saved} into {BASES[base]}: {self.size / 1e9:.3g} GB", flush=True)
        if folder.done:
            print(f"{len(folder.done)} of {len(shards)} shards are there already", flush=True)
        for name, group in shards.items():
            if name not in folder.done:
                shapes = {weight: self.weights[weight] for weight in group}
                folder.write(name, shapes, wide, self._rows, self._check)
                print(f"{len(folder.done)} of {len(shards)} shards", flush=True)
        write_small_files(folder.aside, self.source, base, self.dtype)
        folder.finish(shards, self.size)
        worst = max(facts["worst"] for facts in folder.done.values())
        print(f"merged, and checked against base + adapter: {worst:.0e} of a layer's outputs at most", flush=True)

    def _rows(self, name: str) -> Iterator[torch.Tensor]:
        """A merged weight's rows, in order."""
        parts = self.source.adapter.parts(name)
        outputs, chosen = [], _sample(self.weights[name])
        for first, rows in self.source.base.rows(name):
            if parts:
                last = first + len(rows)
                own = chosen[(chosen >= first) & (chosen < last)]
                merged = _merged(rows, parts, first)
                outputs.append(_expected(rows[own - first], parts, own))
                rows = merged
            narrow = rows.to(DTYPES[self.dtype])
            if not narrow.isfinite().all():
                raise ModelError(
                    f"{name} does not fit into {self.dtype}",
                    f"its largest weight is {rows.abs().max():.3g}",
                    "dtype = 'bf16', which reaches further"
                    if rows.isfinite().all()
                    else "train again: it is not finite",
                )
            yield narrow
        if parts:
            self._wanted[name] = chosen, torch.cat(outputs)

    def _check(self, path: Path) -> dict[str, float]:
        """Reads a shard back and compares. Raises ModelError where a row is not what it should be."""
        there, worst = header(path), 0.0
        for name, (chosen, wanted) in self._wanted.items():
            rows = torch.cat([read_rows(there[name], n, n + 1) for n in chosen.tolist()]).float()
            off = ((rows @ _inputs(rows.shape[1]) - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()
            worst = max(worst, off)
            if not off <= ROUNDING[self.dtype]:
                raise ModelError(
                    f"{name} came out wrong",
                    f"its outputs are {off:.1e} off base + adapter; rounding does {ROUNDING[self.dtype]} at most",
                    "the disk or the memory may be faulty, or the weights too small for fp16: try dtype = 'bf16'",
                )
        self._wanted.clear()
        return {"worst": float(f"{worst:.0e}")}


def _merged(rows: torch.Tensor, parts: Parts, first: int) -> torch.Tensor:
    """Rows of W + scale · B A; with DoRA each scaled to its magnitude (Liu et al. 2024)."""
    last = first + len(rows)
    summed = torch.addmm(rows, parts.up[first:last], parts.down, alpha=parts.scale)
    if parts.magnitude is not None:
        summed *= (parts.magnitude[first:last] / summed.norm(dim=1))[:, None]
    return summed


def _expected(rows: torch.Tensor, parts: Parts, numbers: torch.Tensor) -> torch.Tensor:
    """What base and adapter give for `_inputs` at these rows: as in training, x goes through A, then B."""
    x = _inputs(rows.shape[1])
    outputs = rows @ x + parts.scale * (parts.up[numbers] @ (parts.down @ x))
    if parts.magnitude is not None:
        norms = (rows + parts.scale * (parts.up[numbers] @ parts.down)).norm(dim=1)
        outputs *= (parts.magnitude[numbers] / norms)[:, None]
    return outputs


def _inputs(width: int) -> torch.Tensor:
    """(width, PROBES) random numbers, the same each time."""
    return torch.randn(width, PROBES, generator=torch.Generator().manual_seed(0))


def _sample(shape: tuple[int, ...]) -> torch.Tensor:
    """Row numbers: SAMPLED of them or all, spread evenly, the first and the last among them."""
    return torch.linspace(0, shape[0] - 1, min(SAMPLED, shape[0])).round().long()


def _order(name: str) -> tuple:
    """Embedding, layer by layer, final norm, head."""
    number = name.split(".")[2] if name.startswith("model.layers.") else ""
    place = -1 if name.startswith("model.embed") else int(number) if number.isdigit() else 10**6
    return place, name != "model.norm.weight", name


def _made_of(source: Source, base: str, dtype: str) -> dict:
    """All that decides what a merge makes."""
    digest = hashlib.sha256()
    for path in [*sorted(source.saved.glob("*.safetensors")), source.saved / CONFIG]:
        digest.update(path.read_bytes())
    facts = {"llamanb": __version__, "base": base, "dtype": dtype, "model": source.name, "revision": source.revision}
    plan = source.plan
    trained = (
        {"method": plan.recipe.method, "double_quant": plan.recipe.double_quant, "computed": plan.dtype} if plan else {}
    )
    return {**facts, **trained, "weights": source.fingerprint, "adapter": digest.hexdigest()}


def _require_memory(job: _Job) -> None:
    linear = [torch.Size(shape).numel() for name, shape in job.weights.items() if name in job.source.adapter.tensors]
    need = LIBRARIES_GIB + max(linear, default=0) * BYTES_A_WEIGHT / GIB
    _, available, limit = host_memory()
    if min(available, limit) < need:
        raise HostMemoryError(
            "there is too little host memory to merge",
            f"it takes {need:.1f} GiB, and {min(available, limit):.1f} are free",
            "end other programs, or restart the kernel, which may hold a model",
        )


def _require_disk(job: _Job, folder: Folder) -> None:
    there = sum(path.stat().st_size for path in folder.aside.glob("*.safetensors")) if folder.aside.is_dir() else 0
    need, free = job.size + 2**26 - there, free_bytes(folder.target)
    if free < need:
        raise DiskFullError(
            f"{folder.target} does not fit on its disk",
            f"it takes {need / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free",
            "free some room, or give a folder on another disk: to=",
        )
