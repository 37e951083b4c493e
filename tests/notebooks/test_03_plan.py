"""Notebook 03 without a GPU and without a network: what it says of known cards, with no torch in the process."""

import json
import re
import subprocess
import sys
from pathlib import Path

import papermill
import pytest

from llamanb import Recipe, plan
from llamanb.setup.loaded import SETUP_CELL
from tests.notebooks.shown import cell, noise, text

ROOT = Path(__file__).parents[2]
LLAMA_8B = "meta-llama/Llama-3.1-8B-Instruct"
SHOWN = ("plan", "bar", "others", "trainable", "too-much", "rehearse", "result")


@pytest.fixture(autouse=True)
def a_bare_machine(monkeypatch):
    """No GPU, no network."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there


def test_a_t4_and_8b_by_default(run_notebook):
    notebook = run_notebook("03_plan")
    wanted = plan(Recipe(model=LLAMA_8B), "T4")
    assert text(notebook, "plan") == str(wanted.table())
    assert text(notebook, "bar") == str(wanted.bar())
    assert text(notebook, "others") == str(wanted.others())
    for name in SHOWN:
        htmls = [output.data["text/html"] for output in cell(notebook, name).outputs if "data" in output]
        assert len(htmls) == 1, name

    # What the card can do: 8B in 4 bits, not in 16
    (row,) = (line for line in text(notebook, "trainable").splitlines() if line.startswith("Llama-3.1-8B"))
    assert re.fullmatch(r"Llama-3\.1-8B-Instruct +8\.03 B +\d+,\d+ +[\d,]+ +no +no", row)

    # Where it does not fit: the error's three lines, and changes that do
    said = text(notebook, "too-much")
    assert re.match(r"meta-llama/Llama-3\.1-8B-Instruct \(full\) needs [\d.]+ GiB at the least", said)
    assert "  why: " in said
    assert re.search(r"method = 'qlora-nf4' +[\d.]+ GiB", said)

    # No GPU: one line, and the plan as it was
    said, bar = text(notebook, "rehearse").split("\n", 1)
    assert said == "a plan for T4 cannot be rehearsed here: torch finds no GPU"
    assert bar.strip() == str(wanted.bar())

    rows = {re.split(r"\s{2,}", line)[0]: line for line in text(notebook, "result").splitlines()}
    assert f"{wanted.needs_gib:.1f} of 14.4 GiB" in rows["T4"]
    assert f"{wanted.step_s:.1f} s" in rows["T4"]
    assert all(rows[name].endswith(" min") for name in ("T4", "RTX 3060", "RTX 4090", "H100"))
    assert noise(notebook) == []
    assert cell(notebook, "setup").source == SETUP_CELL
    assert cell(notebook, "setup").outputs == []


@pytest.mark.slow
def test_another_card_and_recipe(run_notebook):
    wanted = {"method": "lora", "rank": 64, "max_length": 2048, "effective_batch_size": 8}
    notebook = run_notebook("03_plan", card="RTX 4090", **wanted)
    assert text(notebook, "plan") == str(plan(Recipe(model=LLAMA_8B, **wanted), "RTX 4090").table())
    assert "longest row in tokens on RTX 4090" in text(notebook, "trainable")
    (t4,) = (line for line in text(notebook, "result").splitlines() if line.startswith("T4 "))
    assert re.fullmatch(r"T4 +needs [\d.]+ of 14\.4 GiB +does not fit", t4)
    assert noise(notebook) == []


def test_this_machine_without_a_gpu_runs_to_the_end(run_notebook):
    notebook = run_notebook("03_plan", card=None)
    assert "on CPU" in text(notebook, "plan")
    assert "cannot" in text(notebook, "rehearse") or "nothing to rehearse" in text(notebook, "rehearse")
    assert "H100" in text(notebook, "result")


def test_a_recipe_that_does_not_fit_shows_in_the_form_and_stops_at_the_plan(run_notebook, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match=r"needs [\d.]+ GiB at the least") as caught:
        run_notebook("03_plan", model="meta-llama/Llama-3.3-70B-Instruct", method="qlora-int8")
    assert caught.value.ename == "DoesNotFitError"
    what, why, fix, *changes = caught.value.traceback
    assert "T4 has " in what
    assert why.lstrip().startswith("why: ")
    assert fix.lstrip().startswith("fix: ")
    assert any("Llama-3.1-8B" in line for line in changes), "the table of what would fit comes with the error"
    executed = json.loads((tmp_path / "03_plan.ipynb").read_text())
    (form,) = (cell for cell in executed["cells"] if cell.get("id") == "form")
    assert [output["output_type"] for output in form["outputs"]] == ["display_data"], (
        "the form shows and does not raise"
    )


@pytest.mark.parametrize("card", ["T4", "RTX 5090"])
def test_nothing_before_the_rehearsal_imports_torch(card):
    cells = json.loads((ROOT / "notebooks" / "03_plan.ipynb").read_text())["cells"]
    code = {cell["id"]: "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"}
    code.pop("setup")  # the ! of a notebook is not Python, and where llamanb is installed it does nothing
    before = [*list(code)[: list(code).index("rehearse")], *list(code)[list(code).index("rehearse") + 1 :]]
    program = "\n".join(code[name] for name in before).replace('card = "T4"', f"card = {card!r}")
    program += "\nimport sys; print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
