"""papermill whose kernel is killed: it says so soon, and the same command goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from llamanb import show_run, starter_recipe
from llamanb.run import FINISHED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("LLAMANB_KILLS", "10")) // 25 + 1
STEPS = 24


@pytest.fixture
def command(tmp_path, monkeypatch) -> list[str]:
    """The full run as a person starts it, without a GPU, a checkpoint at every other step."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    recipe = starter_recipe(model="tiny", dataset="tiny").replace(steps=STEPS, checkpoint_every_steps=2, eval_rows=4)
    recipe.save(tmp_path / "recipe.json")
    notebook = str(ROOT / "notebooks" / "04_train.ipynb")
    asked = ["-k", "python3", "-p", "recipe_file", "recipe.json"]
    return [sys.executable, "-m", "papermill", notebook, "out.ipynb", *asked]


def test_a_kernel_that_is_killed_ends_the_command_and_the_same_one_goes_on(command, tmp_path):
    for number in range(1, KILLS + 1):
        name = f"run{number}"
        run = [*command, "-p", "name", name]
        folder = tmp_path / "runs" / name / "checkpoints"
        process = subprocess.Popen(run, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        limit_s = time.monotonic() + 300
        while not list(folder.glob("step-*/manifest.json")):
            assert process.poll() is None, process.stderr.read()[-3000:]
            assert time.monotonic() < limit_s
            time.sleep(0.02)
        (kernel,) = [p for p in psutil.Process(process.pid).children() if "ipykernel_launcher" in " ".join(p.cmdline())]
        kernel.send_signal(signal.SIGKILL)
        begin_s = time.monotonic()
        assert process.wait(60) != 0
        assert time.monotonic() - begin_s < 60
        assert show_run(folder.parent).status != FINISHED

        done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"picking up runs/{name} at step" in (tmp_path / "out.ipynb").read_text(encoding="utf-8")
        after = show_run(folder.parent)
        assert (after.status, [step.step for step in after.timeline.steps]) == (FINISHED, list(range(1, STEPS + 1)))
