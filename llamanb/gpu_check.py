"""What this GPU has, who holds its memory, what it can compute: the report of notebook 00.

    python -m llamanb.gpu_check

`check_gpu()` looks at everything once and raises for nothing that it finds wrong: a missing driver, a GPU that does not
answer and a torch without CUDA are findings, shown with what to do. Each part is a `Section` to show by itself.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from llamanb import card as cards
from llamanb import machine
from llamanb.card import Card
from llamanb.errors import GpuError, LlamanbError
from llamanb.html import Table, join, paragraph, visible
from llamanb.nvml import NvmlMemory, ask, gpu_processes, nvml_handle, nvml_handles, nvml_memory, start_nvml
from llamanb.precision import Precision, choose_precision, dotted
from llamanb.rates import seconds_per_call
from llamanb.setup.loaded import version
from llamanb.trials import DTYPES, Attention, in_words, working_attention


@dataclass(frozen=True)
class Section:
    """A table and what to make of it."""

    table: Table
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([str(self.table), *(visible(f"* {note}") for note in self.notes)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return join(self.table) + "".join(map(paragraph, self.notes))


@dataclass(frozen=True)
class GpuCheck:
    """Everything `check_gpu` found; each section shows by itself."""

    card: Card | None
    """The card plans start from; None when the GPU does not answer."""
    summary: Section
    memory: Section
    processes: Section
    precision: Section
    attention: Section
    host: Section
    versions: Section

    @property
    def sections(self) -> tuple[Section, ...]:
        return tuple(getattr(self, field.name) for field in fields(self) if field.name != "card")

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.sections))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return join(*self.sections)


def check_gpu(
    precision: str = "auto",
    folder: str | os.PathLike = ".",
    *,
    torch: Any = None,
    nvml: Any = None,
    try_attention: Callable[..., Attention] = working_attention,
    try_precision: Callable[..., dict] | None = None,
    proc: str = "/proc",
    environ: Mapping[str, str] = os.environ,
) -> GpuCheck:
    """Looks at this machine; a few seconds, most of it torch's import and the first CUDA context.

    Args:
        precision: what a recipe would ask for: "auto", "bf16", "fp16" or "fp32".
        folder: where runs will be kept; its disk is looked at.
        torch, nvml, try_attention, try_precision, proc, environ: stand-ins for the real ones.

    Raises:
        RecipeError: `precision` is no precision. One that this machine lacks is a finding too.
    """
    torch = torch or importlib.import_module("torch")
    places = machine.surroundings(environ, proc)
    started, no_nvml = start_nvml(nvml)
    index, handle, card, trouble = None, None, None, None
    try:
        index, why_no_gpu = cards.gpu_in_use(torch)
        if index is not None:
            with cards.answering():
                handle = nvml_handle(started, torch.cuda.get_device_properties(index))
        memory = memory_views(torch, index, started, handle, no_nvml, places)  # before the trials take their workspaces
        card = Card.present(torch=torch, nvml=nvml, try_attention=try_attention)
    except GpuError as error:
        trouble, index = error, None
        memory = memory_views(torch, None, started, None, no_nvml, places)

    capability = card.capability if card else None
    notes = []
    try:
        chosen = choose_precision(capability, precision)
    except GpuError as error:
        notes.append(one_line(error))
        chosen = choose_precision(capability)
    device = "cpu" if index is None else f"cuda:{index}"
    attention = try_attention(chosen.dtype, device)
    if trouble:
        notes.append(one_line(trouble))
    elif index is None:
        notes += without_gpu(why_no_gpu, gpus_nvml_sees(started), torch, places)
    else:
        notes += verdict(card, attention)
    notes += [WSL] if "WSL2" in places else []

    host = host_memory_and_disk(folder, environ)
    loaded = versions()
    driver = ask(getattr(started, "nvmlSystemGetDriverVersion", None))
    rows = [
        ["GPU", "does not answer" if trouble else "none in use"],
        ["driver, torch", f"{driver or 'driver not told'}, torch {torch.__version__}"],
        ["computes in", f"{chosen.dtype}: {chosen.reason}"],
        ["attention for Llama 3", ", ".join(attention.runs(gqa=True)) or "none runs"],
        *host.table.rows,
        ["runs on", ", ".join(places) or "Linux"],
    ]
    if index is not None:
        rows[0][1] = f"{card.name}, compute capability {dotted(capability)}"
        rows.insert(1, ["GPU memory", f"{card.free_gib:.1f} GiB free of {card.vram_gib:.1f} GiB"])
        if torch.cuda.device_count() > 1:
            rows[0][1] += f" (number {index} of the {torch.cuda.device_count()} that torch sees)"
    return GpuCheck(
        card=card,
        summary=Section(Table(["this machine", ""], rows), (*notes, *loaded.notes)),
        memory=memory,
        processes=memory_holders(started, handle, no_nvml, own_pid=None if index is None else os.getpid()),
        precision=precisions(capability, chosen, (try_precision or try_precisions)(device), device),
        attention=Section(kernels(attention), tuple(attention_notes(attention))),
        host=host,
        versions=loaded,
    )


def one_line(error: LlamanbError) -> str:
    """An error's three parts as a note."""
    return " ".join(str(error).split())


# The GPU's memory


WSL = (
    "WSL2: when the GPU's memory is full, its Windows driver moves memory to the host's instead of failing. Training "
    "then goes on many times slower without an error: keep the planned peak below what is free, and take a step that "
    "suddenly lasts long for an out-of-memory."
)


def memory_views(
    torch: Any, index: int | None, nvml: Any, handle: Any, no_nvml: str, places: Sequence[str] = ()
) -> Section:
    """NVML's, the driver's and torch's view of the GPU's memory side by side, and why they differ."""

    def by_nvml(name: str, seen: NvmlMemory | None) -> list[str]:
        sizes = (seen.total, seen.used, seen.free) if seen else (None, None, None)
        return [name, *map(mib, sizes), "the whole card, every process"]

    table = Table(["who says", "total MiB", "used MiB", "free MiB", "what it counts"], [], "Memory of the GPU")
    if index is None:
        rows = [by_nvml(f"NVML: {name}", seen) for name, seen in gpus_nvml_sees(nvml)]
        table.rows = rows or [["nobody", "", "", "", no_nvml or "NVML sees no GPU"]]
        return Section(table, ("Torch uses no GPU here, so it has no view of one.",))

    notes = []
    seen = nvml_memory(nvml, handle) if handle is not None else None
    if seen:
        table.rows.append(by_nvml("NVML, as in nvidia-smi", seen))
    else:
        cause = no_nvml or ("it does not tell" if handle is not None else "it does not find the GPU that torch uses")
        notes.append(f"No view from NVML ({cause}): the driver's figures are used.")
    with cards.answering():
        free, total = torch.cuda.mem_get_info(index)
        reserved, allocated = torch.cuda.memory_reserved(index), torch.cuda.memory_allocated(index)
    table.rows += [
        ["driver, cudaMemGetInfo", mib(total), mib(total - free), mib(free), "what any process can be given"],
        ["torch, reserved", "", mib(reserved), "", "what this process's allocator took from the driver"],
        ["torch, in tensors", "", mib(allocated), mib(reserved - allocated), "the rest is its cache, for new tensors"],
    ]
    if seen and not seen.is_of(total):
        notes.append(
            "NVML speaks of the whole card, and this process has a slice of it (MIG or a virtual GPU): plans use the "
            "driver's figures."
        )
    elif seen and seen.total > total:
        notes.append(f"NVML's total is {mib(seen.total - total)} MiB larger: driver and firmware keep them.")
    notes.append(
        f"{mib(max(total - free - reserved, 0))} MiB are used beyond torch's: CUDA contexts (one is this process's), "
        "libraries, other processes. Torch's own counters never show them."
    )
    if "WSL2" in places:
        notes.append(WSL)
    return Section(table, tuple(notes))


def gpus_nvml_sees(nvml: Any) -> list[tuple[str, NvmlMemory | None]]:
    """(name, memory) of each GPU that NVML lists, whether torch can use it or not."""
    handles = (handle for handle in nvml_handles(nvml) if handle is not None)
    return [(str(ask(nvml.nvmlDeviceGetName, handle) or "a GPU"), nvml_memory(nvml, handle)) for handle in handles]


def memory_holders(nvml: Any, handle: Any, no_nvml: str, own_pid: int | None) -> Section:
    """Which processes hold the GPU's memory. `own_pid`: of this process if it has a CUDA context, else None."""
    table = Table(["process", "pid", "MiB"], [], "Who holds the GPU's memory")
    found = gpu_processes(nvml, handle) if handle is not None else None
    if found is None:
        why = no_nvml or ("torch uses no GPU" if handle is None else "NVML does not list processes on this machine")
        table.rows.append(["not known", "", ""])
        return Section(table, (f"Who holds memory cannot be told: {why}.",))
    for process in found:
        name = os.path.basename(process.name) or "name not told"
        own = " (this process)" if process.pid == own_pid else ""
        table.rows.append([name + own, process.pid, mib(process.bytes)])
    notes = []
    seen = nvml_memory(nvml, handle)
    rest = seen.used - sum(process.bytes or 0 for process in found) if seen else 0
    if rest > 64 * 2**20:
        table.rows.append(["not on the list", "", mib(rest)])
    if own_pid is not None and own_pid not in [process.pid for process in found]:
        notes.append(
            "This process holds memory and is not on the list. In a container NVML shows processes under the host's "
            "numbers or not at all, and on WSL2 not at all: others may be hidden too."
        )
    if any("python" in process.name and process.pid != own_pid for process in found):
        notes.append("Another python is often another notebook: shut its kernel down to get its memory back.")
    notes.append("Plans start from what is free now; a desktop and a browser often take 0.5 to 1.5 GiB.")
    return Section(table, tuple(notes))


def mib(size: int | None) -> str:
    """Bytes as MiB."""
    return "not told" if size is None else f"{size / 2**20:,.0f}"


# What it computes


def try_precisions(device: str = "cuda", *, size: int | None = None) -> dict[str, float | str]:
    """TFLOP/s of one matrix product in each of `DTYPES`, or the error where it does not run.

    A hint, not a benchmark: the mean of four, on square matrices. It shows which precision has matrix units: a T4
    takes bf16 and computes it many times slower than fp16.

    Args:
        device: a torch device.
        size: rows of the matrices; 4096 on a GPU (0.2 GiB for a moment in fp32), 512 on a CPU.
    """
    torch = importlib.import_module("torch")
    size = size or (4096 if torch.device(device).type == "cuda" else 512)
    found: dict[str, float | str] = {}
    for name, dtype in DTYPES.items():
        try:
            matrix = torch.ones(size, size, device=device, dtype=getattr(torch, dtype))
            found[name] = 2 * size**3 / seconds_per_call(partial(torch.mm, matrix, matrix), device) / 1e12
        except Exception as error:  # the refusal is the answer, whatever its type
            found[name] = in_words(error)
        matrix = None
    torch.cuda.empty_cache()  # what the matrices took is for whoever comes next
    return found


def precisions(
    capability: tuple[int, int] | None, chosen: Precision, tried: Mapping[str, float | str], device: str
) -> Section:
    """What llamanb says to each precision, beside a matrix product tried in it."""
    rows = []
    for name, rate in tried.items():
        try:
            choose_precision(capability, name)
            answer = f"used: {chosen.reason}" if name == chosen.dtype else "possible"
        except GpuError as error:
            answer = f"refused: {error.why}"
        rows.append([name, rate if isinstance(rate, str) else speed(rate), answer])
    caption = f"Precision: a matrix product tried on {device}"
    note = "The speed is one product's: it shows which precisions have matrix units here, not how long a step takes."
    return Section(Table(["precision", "ran at", "for training"], rows, caption), (note,))


def speed(tflops: float) -> str:
    """A rate of arithmetic, given in TFLOP/s."""
    return f"{tflops:,.1f} TFLOP/s" if tflops >= 1 else f"{1000 * tflops:,.0f} GFLOP/s"


def kernels(tried: Attention) -> Table:
    """Which attention kernels ran, and why the others did not."""
    rows = [[kernel, tried.plain[kernel] or "runs", tried.grouped[kernel] or "runs"] for kernel in tried.plain]
    caption = f"Attention kernels tried on {tried.device} in {tried.dtype}, forward and backward"
    return Table(["kernel", "equal heads", "grouped heads (Llama 3)"], rows, caption)


def attention_notes(attention: Attention) -> list[str]:
    """What the kernels that ran mean for training a Llama 3."""
    if not attention.runs():
        return ["No attention kernel runs: torch cannot compute on this device."]
    if set(attention.runs(gqa=True)) - {"math"}:
        return []
    fused = [kernel for kernel in attention.runs() if kernel != "math"]
    way_out = f" With keys and values repeated for every query head {', '.join(fused)} runs." if fused else ""
    return [
        "No fused kernel takes Llama 3's grouped heads here. Torch would use the math kernel without a word, whose "
        "memory grows with the square of the length." + way_out
    ]


def verdict(card: Card, attention: Attention) -> list[str]:
    """A GPU in words. What a recipe needs of it depends on model, length and layout: that is the planner's to say."""
    if not attention.runs():
        error = next(iter(attention.plain.values()))
        return [
            f"Torch sees the {card.name} but does not compute on it: {error}.",
            "Usually this torch has no code for so old a GPU (CUDA 13 builds begin at compute capability 7.5: no P100, "
            "no V100). Install a torch built for an older CUDA.",
        ]
    return [
        f"{card.free_gib:.1f} GiB of this {card.name} can be used now, computing in {attention.dtype}.",
        "llamanb.trainable() tells which Llamas it can train, and on how long rows; llamanb.plan(recipe) how it would.",
        *attention_notes(attention),
    ]


def without_gpu(why: str, seen: Sequence[tuple], torch: Any, places: Sequence[str]) -> list[str]:
    """No GPU in use, in words, and what to do about it. `seen`: what `gpus_nvml_sees`."""
    tiny = "The quickstart's tiny Llama trains on the CPU; a real Llama needs a GPU."
    if seen and torch.version.cuda is None:
        fix = (
            "In a clone of the project, `rm -r .venv && make quickstart` installs the build that fits the driver; "
            "elsewhere choose one with CUDA at https://pytorch.org/get-started/locally/ and restart the kernel."
        )
    elif seen and "CUDA_VISIBLE_DEVICES" in why:
        fix = "Unset CUDA_VISIBLE_DEVICES, or name a GPU in it, and restart the kernel."
    elif seen:
        fix = "Update the NVIDIA driver, or install a torch built for an older CUDA, and restart the kernel."
    elif "Colab" in places:
        fix = "Choose Runtime > Change runtime type > T4 GPU."
    elif "Kaggle" in places:
        fix = "Choose GPU T4 x2 as the session's accelerator."
    elif "WSL2" in places:
        fix = "If the machine has an NVIDIA GPU, install its driver in Windows, none inside WSL2, and restart WSL2."
    else:
        fix = "If the machine has an NVIDIA GPU, install its driver: `nvidia-smi` must list the GPU."
    there = f"NVML sees {', '.join(name for name, _ in seen)}, but torch uses no GPU" if seen else "No GPU"
    return [f"{there}: {why}.", fix, tiny]


# The machine around it


def host_memory_and_disk(folder: str | os.PathLike = ".", environ: Mapping[str, str] = os.environ) -> Section:
    """Host RAM, and room on the disks of runs and of downloaded models."""
    total, available, limit = machine.host_memory()
    note = f"A container's limit: its processes may hold {limit:.1f} GiB of the host's RAM together."
    rows = [
        ["host RAM", f"{available:.1f} GiB free of {total:.1f} GiB"],
        ["disk for runs", machine.room(folder)],
        ["disk for downloaded models", machine.room(machine.hub_cache(environ))],
    ]
    return Section(Table(["on the host", ""], rows), (note,) if limit < total else ())


PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "pyarrow", "accelerate", "bitsandbytes", "numpy")
PACKAGES += ("ipywidgets",)
"""What a run rests on, and is imported under the same name."""


def versions(packages: Sequence[str] = PACKAGES) -> Section:
    """Versions loaded in this process against those installed."""
    found = [*map(version, packages), version("nvidia-ml-py", "pynvml")]
    rows = [[v.package, v.loaded, v.installed or "not installed", "restart" if v.stale else ""] for v in found]
    stale = ", ".join(v.package for v in found if v.stale)
    notes = (f"Loaded is not what is installed: {stale}. Restart the kernel before you train.",) if stale else ()
    return Section(Table(["package", "loaded", "installed", ""], rows, "Versions"), notes)


if __name__ == "__main__":
    print(check_gpu())
