"""Notebook 04 on the tiny default: what it shows, what lies in the run's folder, and the same run made again."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llamanb import show_run
from tests.notebooks.test_01_quickstart import cell, noise, pictures, text
from tests.unit.test_canary import CANARY, places

ROOT = Path(__file__).parents[2]
STEPS = 8
pytestmark = pytest.mark.usefixtures("bare_machine_with_a_token")


@pytest.mark.timeout(600)
def test_a_run_is_watched_reported_and_made_again_by_the_reports_own_command(run_notebook, tmp_path):
    notebook = run_notebook("04_train", steps=STEPS, second_home="home")
    assert noise(notebook) == []
    run = show_run(tmp_path / "runs" / "train")
    assert len(run.losses) == STEPS
    assert f"step {STEPS} of {STEPS}, loss {run.losses[-1]:.3f}" in text(notebook, "train")
    assert "tokens/s" in text(notebook, "train")
    assert len(pictures(notebook, "train")) == 1, "the last frame stays"
    assert pictures(notebook, "memory") == [run.memory_plot.png]
    assert pictures(notebook, "loss") == [run.loss_plot.png]
    assert "no GPU here" in text(notebook, "peaks")
    assert "report.html" in text(notebook, "report")
    assert "<img" in cell(notebook, "result").outputs[0].data["text/html"]

    copied = show_run(tmp_path / "home" / "train")
    assert (copied.losses, copied.status) == (run.losses, run.status)

    page = (run.folder / "report.html").read_text(encoding="utf-8")
    command = next(line for line in page.splitlines() if "papermill notebooks/04_train.ipynb" in line)
    command = shlex.split(command[command.index("papermill") :])
    assert Path(command[command.index("recipe_file") + 1]).read_bytes() == (run.folder / "recipe.json").read_bytes()
    command[1:3] = [str(ROOT / command[1]), "again.ipynb"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "-k", "python3"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    again = show_run(tmp_path / "runs" / "train-again")
    assert again.losses == run.losses
    assert again.plan.recipe == run.plan.recipe
    assert json.loads((again.folder / "scores.json").read_text()) == json.loads(
        (run.folder / "scores.json").read_text()
    )
    assert places(CANARY, tmp_path) == []
