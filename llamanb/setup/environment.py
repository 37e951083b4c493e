"""Brings an environment that already holds packages up to what llamanb needs, and moves as little as it can.

    bash colab_setup.sh      # finds the Python, then runs `python -m llamanb.setup.environment` from the checkout

Colab, Kaggle and rented GPU machines come with torch, CUDA libraries and hundreds of packages that fit together. What
satisfies requirements.txt stays as it is; what does not moves, never past the version in constraints.txt, which CI ran.
Needs the standard library and pip. Why so: docs/decisions/0002-colab.md.
"""

from __future__ import annotations

import filecmp
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

try:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version
except ImportError:  # a bare machine: pip brings its own copy
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name
    from pip._vendor.packaging.version import Version

from llamanb.errors import LlamanbError
from llamanb.setup.torch_build import answers, choose_build, read_gpus

ROOT = Path(__file__).resolve().parents[2]
STAYS = ("torch", "numpy")
"""Never moved: the image's torch fits its driver, and half the image is compiled against its numpy."""
OLDEST_TORCHAO = "0.16"
"""peft refuses to attach a LoRA while an older torchao is installed."""


class Package(NamedTuple):
    """What an installed package says of itself, read at once: its metadata goes when pip replaces it."""

    name: str
    version: str
    requires: list[str]


Installed = dict[str, Package]
"""By canonical name."""


def read_requirements(path: Path) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


def read_installed() -> Installed:
    """What this Python would import; the checkout's own build leftovers do not count."""
    importlib.invalidate_caches()
    found: Installed = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name and Path(distribution.locate_file("")).resolve() != ROOT:
            package = Package(name, distribution.version, distribution.requires or [])
            found.setdefault(canonicalize_name(name), package)
    return found


def unmet(requirements: Iterable[Requirement], installed: Installed) -> list[str]:
    """Names of the requirements that are missing or of a version outside their range."""
    return [
        name
        for requirement in requirements
        if (name := canonicalize_name(requirement.name)) not in installed
        or not requirement.specifier.contains(installed[name].version, prereleases=True)
    ]


def write_constraints(
    installed: Installed, kept: Iterable[str], free: Iterable[str], tested: Iterable[Requirement]
) -> list[str]:
    """pip's constraints: `kept` stays at its installed version; what is new, or in `free`, ends at the tested one."""
    kept, free = set(kept), set(free)
    bounded = [r for r in tested if (name := canonicalize_name(r.name)) in free or name not in installed]
    return sorted(
        [f"{name}=={installed[name].version}" for name in kept]
        + [f"{r.name}{str(r.specifier).replace('==', '<=')}" for r in bounded]
    )


def broken_wishes(installed: Installed) -> set[str]:
    """Requirements, declared by installed packages, that the installed versions do not meet."""
    broken = set()
    for package in installed.values():
        for line in package.requires:
            try:
                wish = Requirement(line)
            except ValueError:  # metadata older than the format
                continue
            name = canonicalize_name(wish.name)
            if wish.marker is not None and not wish.marker.evaluate({"extra": ""}):
                continue
            found = installed[name].version if name in installed else None
            if found is None or not wish.specifier.contains(found, prereleases=True):
                broken.add(
                    f"{package.name} {package.version} asks for {wish.name}{wish.specifier},"
                    f" now {found or 'not installed'}"
                )
    return broken


def own_copy_is_current() -> bool:
    """Whether the installed llamanb is this checkout, in place or file by file."""
    own = next(metadata.distributions(name="llamanb", path=[p for p in sys.path if Path(p).resolve() != ROOT]), None)
    if own is None:
        return False
    origin = json.loads(own.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        return origin["url"] == ROOT.as_uri()
    copy, source = Path(own.locate_file("llamanb")), ROOT / "llamanb"
    files = {path.relative_to(source) for path in source.rglob("*.py")}
    files |= {path.relative_to(copy) for path in copy.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    return all(
        (source / path).is_file() and (copy / path).is_file() and filecmp.cmp(source / path, copy / path, shallow=False)
        for path in files
    )


def run_pip(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def pip_install(*arguments: str) -> subprocess.CompletedProcess:
    return run_pip("install", "-q", "--no-warn-conflicts", "--root-user-action=ignore", *arguments)


def or_raise(done: subprocess.CompletedProcess, what: str) -> None:
    if done.returncode == 0:
        return
    said = done.stderr.strip().splitlines()
    raise LlamanbError(
        f"pip could not {what}",
        "\n       ".join([line for line in said if line.startswith("ERROR")] or said[-5:] or ["it gave no reason"]),
        "without a network, connect (Kaggle: Settings > Internet > On) and run this again; where versions conflict,\n"
        f"       use a fresh environment: make -C {ROOT} install",
    )


def install_torch() -> None:
    """On a machine without torch: the build that fits its driver and GPU."""
    gpus = read_gpus()
    build = choose_build(*gpus)
    if build.index_url and not answers(f"{build.index_url}/torch/"):
        build = choose_build(*gpus, index_reachable=False)
    print(f"  torch: {build.reason}", flush=True)
    or_raise(pip_install(*build.pip_arguments, "-c", str(ROOT / "constraints.txt")), "install torch")


def move_packages(installed: Installed, free: list[str]) -> None:
    """Installs what is missing and moves `free`; where that alone cannot be done, lets pip move whatever is in the way
    but for torch and numpy."""
    tested = read_requirements(ROOT / "constraints.txt")
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        for kept in (installed.keys() - set(free), installed.keys() & set(STAYS)):
            constraints.write_text("\n".join(write_constraints(installed, kept, free, tested)), encoding="utf-8")
            done = pip_install("-r", str(ROOT / "requirements.txt"), "-c", str(constraints))
            if "ResolutionImpossible" not in done.stderr:
                break
            print("  other packages stand in the way: they move too, torch and numpy do not", flush=True)
    or_raise(done, "bring this environment up to requirements.txt")


def setup() -> None:
    """Prints what it finds, does and leaves undone. A second run finds nothing to do.

    Raises:
        LlamanbError: the image's torch or numpy is too old, or pip failed.
    """
    start = time.perf_counter()
    requirements = read_requirements(ROOT / "requirements.txt")
    first = before = read_installed()
    broken_before = broken_wishes(before)
    print(f"llamanb setup: {sys.prefix}", flush=True)
    if "torch" not in before:
        install_torch()
        before = read_installed()
    to_do = unmet(requirements, before)
    if held := [name for name in to_do if name in STAYS and name in before]:
        raise LlamanbError(
            f"this environment's {' and '.join(f'{name} {before[name].version}' for name in held)} is too old",
            "llamanb needs " + ", ".join(str(r) for r in requirements if r.name in held) + ", and leaves both alone:"
            " the rest of an image is built against them",
            "choose a newer image (Kaggle: Settings > Environment > latest), or a fresh environment:\n"
            f"       make -C {ROOT} install",
        )
    torchao = before.get("torchao")
    remove_torchao = torchao is not None and Version(torchao.version) < Version(OLDEST_TORCHAO)
    if not to_do and not remove_torchao and own_copy_is_current() and before is first:
        print(f"  nothing to do: all is there ({time.perf_counter() - start:.1f} s)")
        return

    if to_do:
        print(f"  to move: {', '.join(n for n in to_do if n in before) or 'nothing'}")
        print(f"  to add: {', '.join(n for n in to_do if n not in before) or 'nothing'}")
        print("  installing ...", flush=True)
        move_packages(before, [name for name in to_do if name in before])
    if remove_torchao:
        or_raise(run_pip("uninstall", "-y", "-q", "torchao"), "remove torchao")
    if not own_copy_is_current():
        shutil.rmtree(ROOT / "build", ignore_errors=True)  # an older build's modules would be installed along
        or_raise(pip_install("--no-deps", "--force-reinstall", str(ROOT)), "install llamanb")
        print(f"  llamanb: installed from {ROOT}")

    after = read_installed()
    for name in sorted(first.keys() | after.keys()):
        old, new = (packages[name].version if name in packages else None for packages in (first, after))
        if old != new:
            print(f"  {name}: {old or 'new'} -> {new or 'removed'}")
    if remove_torchao:
        print(f"    (peft attaches no LoRA beside torchao < {OLDEST_TORCHAO}, and nothing here uses torchao)")
    if first is before:  # torch was there
        print("  unchanged: " + ", ".join(f"{name} {first[name].version}" for name in STAYS if name in first))
    if affected := sorted(broken_wishes(after) - broken_before):
        print("  also affected, until this session ends or they are updated:")
        print(*(f"    {line}" for line in affected), sep="\n")
    print(f"  done in {time.perf_counter() - start:.0f} s; a kernel that had loaded any of these needs one restart")


def main() -> int:
    try:
        setup()
    except LlamanbError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
