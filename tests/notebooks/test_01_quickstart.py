"""Notebook 01 on the tiny default, as `make quickstart` runs it: what it shows, and what it leaves on disk."""

import ast
import base64
import csv
import json
import re
import statistics
from pathlib import Path

import papermill
import pytest
from safetensors import safe_open

from llamanb import Recipe, show_run, tiny
from llamanb.setup.loaded import SETUP_CELL
from tests.notebooks.shown import cell, noise, text

ROWS, STEPS = Recipe().eval_rows, tiny.DEFAULTS["steps"]


def pictures(notebook, cell_id: str) -> list[bytes]:
    outputs = cell(notebook, cell_id).outputs
    return [base64.b64decode(o.data["image/png"]) for o in outputs if "image/png" in o.get("data", {})]


def columns(path: Path) -> dict[str, list[float]]:
    """A csv file's columns of numbers; empty fields are left out."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name] != ""] for name in rows[0] if name != "phase"}


@pytest.fixture(autouse=True)
def a_bare_machine(monkeypatch):
    """No GPU, no network, no token."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.mark.timeout(600)
def test_the_tiny_llama_learns_and_everything_is_shown_and_kept(run_notebook, tmp_path):
    notebook = run_notebook("01_quickstart")
    folder = tmp_path / "runs" / "quickstart"

    # Before and after, on rows that training never saw
    run = show_run(folder)
    scores = str(run.scores)
    before, after = (int(share) for share in re.search(r"exact match\s+(\d+)%\s+(\d+)%", scores).groups())
    assert before < 10
    assert after > 80
    assert f"{ROWS} rows that training never saw" in scores
    assert text(notebook, "result") == scores
    assert "<table" in cell(notebook, "result").outputs[0].data["text/html"]

    # The way there: every step and its loss, memory ten times a second, and when each part began
    metrics = columns(folder / "metrics.csv")
    assert metrics["step"] == list(range(1, STEPS + 1))
    assert statistics.mean(metrics["loss"][-10:]) < 0.1 * statistics.mean(metrics["loss"][:10])
    assert max(metrics["learning_rate"]) == tiny.DEFAULTS["learning_rate"]
    assert all(norm > 0 for norm in metrics["grad_norm"])
    memory = columns(folder / "memory.csv")
    assert memory["time_s"] == sorted(memory["time_s"])
    assert len(memory["time_s"]) > 20
    assert all(0.05 < used < 16 for used in memory["used_gib"])
    assert memory["allocated_gib"] == memory["reserved_gib"] == []  # there is no GPU

    # The pictures: the live one's last frame, the loss, the memory; each with its words
    for name, words in {"train": f"step {STEPS} of {STEPS}", "loss": "Loss: ", "memory": "GiB at most"}.items():
        (png,) = pictures(notebook, name)
        assert png.startswith(b"\x89PNG"), name
        assert words in text(notebook, name)
    assert pictures(notebook, "loss") == [run.loss_plot.png]
    assert pictures(notebook, "memory") == [run.memory_plot.png]
    assert "host memory of this process (no GPU here)" in text(notebook, "memory")

    # Log lines, and nothing that a library says
    lines = text(notebook, "train").splitlines()
    assert len([line for line in lines if re.match(r"step \d+ of \d+, loss \d+\.\d+, .* left$", line)]) >= 10
    assert f"scoring {ROWS} held-out rows before training" in lines
    assert noise(notebook) == []

    # Where it lies: every file that is named is there, and the adapter has learned in each layer
    files = text(notebook, "files")
    for name in ("adapter", "recipe.json", "plan.json", "metrics.csv", "memory.csv", "scores.json", "report.html"):
        assert name in files
        assert (folder / name).exists()
    assert str(folder) in files
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as tensors:
        learned = [bool(tensors.get_tensor(name).any()) for name in tensors.keys() if "lora_B" in name]  # noqa: SIM118
    assert len(learned) == 4 * 7
    assert all(learned)

    # Loaded again in the notebook, it answers as it did
    first_row = next(line for line in scores.splitlines() if line.startswith("Note: "))
    _question, _before, after, _reference = re.split(r"\s{2,}", first_row.strip())
    assert ast.literal_eval(text(notebook, "reload")) == after
    assert after.startswith("buyer: ")

    # The setup cell does nothing here, and no widget is needed: papermill runs no callback
    assert cell(notebook, "setup").source == SETUP_CELL
    assert cell(notebook, "setup").outputs == []


@pytest.mark.timeout(600)
def test_other_parameters_reach_the_run(run_notebook, tmp_path):
    wanted = {"method": "lora", "rank": 4, "steps": 5, "effective_batch_size": 8, "seed": 3, "name": "mine"}
    notebook = run_notebook("01_quickstart", **wanted)
    folder = tmp_path / "runs" / wanted.pop("name")
    recipe = json.loads((folder / "recipe.json").read_text())
    assert {name: recipe[name] for name in wanted} == wanted
    assert columns(folder / "metrics.csv")["step"] == [1, 2, 3, 4, 5]
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["r"] == 4
    assert "1 × 8 rows" in text(notebook, "plan")
    assert noise(notebook) == []


def test_own_rows_that_are_missing_stop_it_with_what_why_and_fix(run_notebook):
    with pytest.raises(papermill.PapermillExecutionError, match=r"my_rows\.jsonl") as caught:
        run_notebook("01_quickstart", dataset="my_rows.jsonl")
    assert caught.value.ename == "DataError"
    assert caught.value.traceback[1].lstrip().startswith("why: ")
    assert caught.value.traceback[2].lstrip().startswith("fix: ")
    assert len(caught.value.traceback) == 3
