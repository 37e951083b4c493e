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

from pip._vendor.packaging.requirements import Requirement  # pip's own copy: a bare machine has no other
from pip._vendor.packaging.utils import canonicalize_name
from pip._vendor.packaging.version import Version

from llamanb.errors import LlamanbError
from llamanb.setup.torch_build import build_for_this_machine

ROOT = Path(__file__).resolve().parents[2]
STAYS = ("torch", "numpy")
"""Never moved: the image's torch fits its driver, and half the image is compiled against its numpy."""
OLDEST_TORCHAO = "0.16"
"""peft refuses to attach a LoRA while an older torchao is installed."""


Installed = dict[str, str]
"""Versions by canonical name."""


def read_requirements(path: Path) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


def read_installed() -> Installed:
    """What this Python would import; the checkout's own build leftovers do not count."""
    importlib.invalidate_caches()
    found = [one for one in metadata.distributions() if Path(one.locate_file("")).resolve() != ROOT]
    named = [(one.metadata["Name"], one.version) for one in reversed(found)]  # of two, the first one is imported
    return {canonicalize_name(name): version for name, version in named if name}


def unmet(requirements: Iterable[Requirement], installed: Installed) -> list[str]:
    """Names of the requirements that are missing or of a version outside their range."""
    return [
        name
        for requirement in requirements
        if (name := canonicalize_name(requirement.name)) not in installed
        or not requirement.specifier.contains(installed[name], prereleases=True)
    ]


def write_constraints(
    installed: Installed, kept: Iterable[str], free: Iterable[str], tested: Iterable[Requirement]
) -> list[str]:
    """pip's constraints: `kept` stays at its installed version; what is new, or in `free`, ends at the tested one."""
    kept, free = set(kept), set(free)
    bounded = [r for r in tested if (name := canonicalize_name(r.name)) in free or name not in installed]
    return sorted(
        [f"{name}=={installed[name]}" for name in kept]
        + [f"{r.name}{str(r.specifier).replace('==', '<=')}" for r in bounded]
    )


def own_copy_is_current() -> bool:
    """Whether the installed llamanb is this checkout, in place or file by file."""
    own = next(metadata.distributions(name="llamanb", path=[p for p in sys.path if Path(p).resolve() != ROOT]), None)
    if own is None:
        return False
    origin = json.loads(own.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        return origin["url"] == ROOT.as_uri()
    both = ROOT / "llamanb", Path(own.locate_file("llamanb"))
    paths = ((path, path.relative_to(folder)) for folder in both for path in folder.rglob("*"))
    files = {relative for path, relative in paths if path.is_file() and path.suffix != ".pyc"}
    _, different, missing = filecmp.cmpfiles(*both, files, shallow=False)
    return not (different or missing)


def run_pip(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def pip_install(*arguments: str) -> subprocess.CompletedProcess:
    return run_pip("install", "-q", "--no-warn-conflicts", "--root-user-action=ignore", *arguments)


def broken_wishes() -> set[str]:
    """What installed packages ask for and do not have, in pip's words."""
    done = run_pip("check")
    return set(done.stdout.splitlines()) if done.returncode else set()


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
    build = build_for_this_machine()
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
    before = read_installed()
    to_do = unmet(requirements, before)
    print(f"llamanb setup: {sys.prefix}", flush=True)
    if held := [name for name in to_do if name in STAYS and name in before]:
        raise LlamanbError(
            f"this environment's {' and '.join(f'{name} {before[name]}' for name in held)} is too old",
            "llamanb needs " + ", ".join(str(r) for r in requirements if r.name in held) + ", and leaves both alone:"
            " the rest of an image is built against them",
            "choose a newer image (Kaggle: Settings > Environment > latest), or a fresh environment:\n"
            f"       make -C {ROOT} install",
        )
    remove_torchao = "torchao" in before and Version(before["torchao"]) < Version(OLDEST_TORCHAO)
    if not to_do and not remove_torchao and own_copy_is_current():
        print(f"  nothing to do: all is there ({time.perf_counter() - start:.1f} s)")
        return

    broken_before = broken_wishes()
    if "torch" in to_do:
        install_torch()
    found = read_installed()
    if to_do := unmet(requirements, found):
        to_move = [name for name in to_do if name in found]
        print(f"  to move: {', '.join(to_move) or 'nothing'}")
        print(f"  to add: {', '.join(name for name in to_do if name not in found) or 'nothing'}")
        print("  installing ...", flush=True)
        move_packages(found, to_move)
    if remove_torchao:
        or_raise(run_pip("uninstall", "-y", "-q", "torchao"), "remove torchao")
    if not own_copy_is_current():
        shutil.rmtree(ROOT / "build", ignore_errors=True)  # an older build's modules would be installed along
        or_raise(pip_install("--no-deps", "--force-reinstall", str(ROOT)), "install llamanb")
        print(f"  llamanb: installed from {ROOT}")

    after = read_installed()
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old != new:
            print(f"  {name}: {old or 'new'} -> {new or 'removed'}")
    if remove_torchao:
        print(f"    (peft attaches no LoRA beside torchao < {OLDEST_TORCHAO}, and nothing here uses torchao)")
    if unchanged := [f"{name} {after[name]}" for name in STAYS if after[name] == before.get(name)]:
        print(f"  unchanged: {', '.join(unchanged)}")
    if affected := sorted(broken_wishes() - broken_before):
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
