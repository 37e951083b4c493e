"""An environment with Colab's versions, made once in .venv-colab; the tests change a copy of it."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from llamanb import REPOSITORY, __version__

ROOT = Path(__file__).parents[2]
FREEZE = Path(__file__).with_name("colab-freeze.txt")
DIFFERS = (
    "torch 2.13.0 for the CPU stands in for Colab's 2.11.0+cu128,"
    f" and Python {sysconfig.get_python_version()} for 3.12 or 3.13"
)


def pytest_report_header() -> str:
    return f"Colab lane: {DIFFERS}"


def run(*command: str | Path, timeout_s: float = 600, **options) -> subprocess.CompletedProcess:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=timeout_s, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


class Environment:
    """A Python environment and what is in it."""

    def __init__(self, folder: Path):
        self.folder, self.python = folder, folder / "bin" / "python"

    def versions(self) -> dict[str, str]:
        listed = json.loads(run(self.python, "-m", "pip", "list", "--format=json", cwd=self.folder).stdout)
        return {package["name"].lower(): package["version"] for package in listed}

    def declare(self, name: str, *requires: str) -> None:
        """Adds a package that is nothing but its metadata: it stands for one that the image brings."""
        home = run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
        info = Path(home, f"{name.replace('-', '_')}-1.0.dist-info")
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {r}" for r in requires)]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        (info / "RECORD").write_text("")
        (info / "INSTALLER").write_text("pip\n")


def make_colab(folder: Path) -> None:
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    pip_line = next(line for line in FREEZE.read_text().splitlines() if line.startswith("pip=="))
    run(python, "-m", "pip", "install", "-q", pip_line)
    torch = run(python, "-m", "llamanb.torch_build", cwd=ROOT, env=without_gpu()).stdout.split()
    run(python, "-m", "pip", "install", "-q", *torch, "-r", FREEZE, timeout_s=1200)


def without_gpu() -> dict[str, str]:
    return {**os.environ, "PATH": os.pathsep.join(["/usr/bin", "/bin"])}


@pytest.fixture(scope="session")
def pristine() -> Path:
    """Made once per content of colab-freeze.txt."""
    key = hashlib.sha256(FREEZE.read_bytes() + sysconfig.get_python_version().encode()).hexdigest()[:12]
    folder = ROOT / ".venv-colab" / key
    if not (folder / "complete").exists():
        shutil.rmtree(ROOT / ".venv-colab", ignore_errors=True)
        make_colab(folder)
        (folder / "complete").touch()
    return folder


@pytest.fixture(scope="module")
def colab(pristine, tmp_path_factory) -> Environment:
    """Colab as a user finds it. Files are hard links: pip replaces files, and never writes into one."""
    folder = pristine.with_name(f"run-{tmp_path_factory.mktemp('colab').name}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(pristine, folder, symlinks=True, copy_function=os.link)
    yield Environment(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def github(tmp_path_factory) -> dict[str, str]:
    """The working tree as a release: variables under which git takes the project's address to mean it."""
    released = tmp_path_factory.mktemp("github") / "llamanb"
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (released / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, released / name)
    person = ("-c", "user.name=lane", "-c", "user.email=lane@invalid")
    run("git", "init", "-q", cwd=released)
    run("git", "add", "-A", cwd=released)
    run("git", *person, "commit", "-q", "-m", "release", cwd=released)
    run("git", "tag", f"v{__version__}", cwd=released)
    return {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{released.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": REPOSITORY,
    }
