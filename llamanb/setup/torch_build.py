"""Picks the PyTorch build for this machine, before anything is installed.

    python3 -m llamanb.setup.torch_build      # pip's arguments on stdout, the reason on stderr

Needs the standard library only. `choose_build` is pure; the rest of the module finds out what it has to know. Drivers
and architectures: docs/decisions/0001-dependencies.md.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llamanb.errors import GpuError

VERSION = "2.13.0"
"""What `constraints.txt` pins too; a test holds the two together."""
WHEEL_INDEX = "https://download.pytorch.org/whl/"
DEFAULT_CUDA_DRIVER = (580,)
"""The oldest driver for CUDA 13.0, which the package registry's build brings."""
CU126_DRIVER = (525, 60, 13)
"""The oldest driver for any CUDA 12 build (minor-version compatibility)."""
DEFAULT_OLDEST_GPU = (7, 5)
CU126_OLDEST_GPU, CU126_NEWEST_GPU = (5, 0), (9, 0)
DOWNLOAD_GB = {"default": 2.7, "cpu": 0.2}
"""Wheels of torch and what it needs, x86-64; the default for Linux measured with `pip download torch==2.13.0`."""


@dataclass(frozen=True)
class Build:
    """Which PyTorch to install.

    Attributes:
        requirement: what pip is asked for.
        reason: one line for a person: what was found, and what follows.
        index_url: PyTorch's wheel index to look in as well; None for the package registry alone.
    """

    requirement: str
    reason: str
    index_url: str | None = None

    @property
    def pip_arguments(self) -> list[str]:
        # An extra index, not the only one: what torch needs besides stays at constraints.txt's versions. The local
        # version (+cpu) in the requirement keeps pip from taking the registry's build all the same.
        return [*(["--extra-index-url", self.index_url] if self.index_url else []), self.requirement]


def choose_build(
    driver: str | None, capabilities: Sequence[tuple[int, int]] = (), *, index_reachable: bool = True
) -> Build:
    """The build that runs on this machine.

    Args:
        driver: NVIDIA's driver version, like "535.183.01"; None without one.
        capabilities: compute capability of each GPU; empty when it is not known.
        index_reachable: whether PyTorch's own wheel index answers. The registry's build does not need it.

    Raises:
        GpuError: no build runs on this driver and these GPUs.
    """
    default = f"torch=={VERSION}"
    if driver is None:
        choice = f"PyTorch's CPU build, about {DOWNLOAD_GB['cpu']} GB"
        return _from_index("cpu", "no NVIDIA driver", choice, index_reachable)

    version = tuple(int(part) for part in re.findall(r"\d+", driver))
    oldest, newest = (min(capabilities), max(capabilities)) if capabilities else (None, None)
    has_blackwell = newest is not None and newest > CU126_NEWEST_GPU
    before_turing = oldest is not None and oldest < DEFAULT_OLDEST_GPU
    seen = f"NVIDIA driver {driver}"
    if capabilities:
        seen += f", compute capability {', '.join(sorted({f'{a}.{b}' for a, b in capabilities}))}"
    if oldest is not None and oldest < CU126_OLDEST_GPU:
        raise GpuError(
            f"no build of torch {VERSION} runs on a GPU of compute capability {oldest[0]}.{oldest[1]}",
            f"found {seen}; its oldest supported architecture is 5.0 (Maxwell)",
            "hide that GPU with CUDA_VISIBLE_DEVICES, or train on another machine; for the CPU alone, run\n"
            f"       pip install --extra-index-url {WHEEL_INDEX}cpu {default}+cpu",
        )
    if version < CU126_DRIVER or (has_blackwell and version < DEFAULT_CUDA_DRIVER):
        need = "580 or newer" if has_blackwell else "525.60.13 or newer; 580 serves every GPU since Turing"
        why = "a Blackwell GPU needs CUDA 12.8 or newer" if has_blackwell else "its oldest CUDA is 12.6"
        raise GpuError(
            f"the NVIDIA driver {driver} is too old for torch {VERSION}",
            f"found {seen}; {why}",
            f"update the driver to {need} (https://www.nvidia.com/drivers, or your distribution's package), restart,\n"
            "       and run this again",
        )
    if has_blackwell and before_turing:
        raise GpuError(
            f"no one build of torch {VERSION} runs on both GPUs of this machine",
            f"found {seen}; the CUDA 13 build begins at 7.5, the CUDA 12.6 build ends at 9.0",
            "train on one of them: install a build for it by hand and set CUDA_VISIBLE_DEVICES",
        )
    if version >= DEFAULT_CUDA_DRIVER and not before_turing:
        return Build(default, f"{seen}: the default build, CUDA 13.0, about {DOWNLOAD_GB['default']} GB")
    why, until = "the driver is older than CUDA 13 needs (580)", " before the driver is updated."
    if before_turing:
        why, until = "this GPU is older than CUDA 13 serves", "; install the CUDA 12.6 build when the index answers."
    drawback = f" It will not use the GPU{until}"
    return _from_index("cu126", f"{seen}: {why}", "the CUDA 12.6 build", index_reachable, drawback)


def _from_index(local: str, found: str, choice: str, reachable: bool, drawback: str = "") -> Build:
    """The `choice` of PyTorch's own index, or, where that is out of reach, the registry's build with its drawback."""
    index, default = f"{WHEEL_INDEX}{local}", f"torch=={VERSION}"
    if reachable:
        return Build(f"{default}+{local}", f"{found}, so {choice}", index)
    size = f"about {DOWNLOAD_GB['default']:g} GB of wheels (less where pip knows a smaller one)"
    registry = f"the package registry's build, which brings CUDA 13 along, {size}.{drawback}"
    return Build(default, f"{found}, and {index} is out of reach: {registry}")


def read_gpus() -> tuple[str | None, list[tuple[int, int]]]:
    """Driver version and each GPU's compute capability: (None, []) without a working driver."""
    driver, capabilities = _query_smi("driver_version"), _query_smi("compute_cap")
    if driver:
        return driver[0], [(int(major), int(minor)) for major, _, minor in (c.partition(".") for c in capabilities)]
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None, []
    return parse_proc_version(text), []


def parse_proc_version(text: str) -> str | None:
    """The version in /proc/driver/nvidia/version, of the closed and of the open kernel module."""
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", text)
    return found[1] if found else None


def _query_smi(field: str) -> list[str]:
    """One value a GPU; empty when nvidia-smi is missing, fails, or is too old to know the field."""
    smi = shutil.which("nvidia-smi") or shutil.which("/usr/lib/wsl/lib/nvidia-smi")  # WSL2 keeps it off PATH
    command = [smi or "nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = [line.strip() for line in run.stdout.splitlines()] if run.returncode == 0 else []
    return [line for line in lines if re.fullmatch(r"\d+(\.\d+)+", line)]


def answers(url: str, timeout_s: float = 3) -> bool:
    """Whether `url` can be fetched, through the environment's proxy settings, within `timeout_s`.

    A name look-up knows no timeout of its own, so the question is asked on a thread that may be left behind.
    """
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(OSError, ValueError):  # no route, no name, a refusal, a broken proxy setting
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout_s).close()
            answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return answered.is_set()


def build_for_this_machine() -> Build:
    """`choose_build` for the driver, the GPUs and the network that are here."""
    gpus = read_gpus()
    build = choose_build(*gpus)
    if build.index_url and not answers(f"{build.index_url}/torch/"):
        build = choose_build(*gpus, index_reachable=False)
    return build


def main() -> int:
    try:
        build = build_for_this_machine()
    except GpuError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"torch: {build.reason}", file=sys.stderr)
    print(*build.pip_arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
