"""An environment with Colab's versions, and what the lane does with it."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
FREEZE = Path(__file__).with_name("colab-freeze.txt")
DIFFERS = (
    "torch 2.13.0 for the CPU stands in for Colab's 2.11.0+cu128,"
    f" and Python {sysconfig.get_python_version()} for 3.12 or 3.13"
)


def run(*command: str | Path, timeout_s: float = 600, **options) -> subprocess.CompletedProcess:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=timeout_s, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
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
    torch = run(python, "-m", "llamanb.setup.torch_build", cwd=ROOT, env=without_gpu()).stdout.split()
    run(python, "-m", "pip", "install", "-q", *torch, "-r", FREEZE, timeout_s=1200)


def without_gpu() -> dict[str, str]:
    return {**os.environ, "PATH": os.pathsep.join(["/usr/bin", "/bin"])}
