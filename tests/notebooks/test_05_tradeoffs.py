"""Notebook 05 on the tiny default, without a GPU: real runs in fresh processes, measured once."""

import base64
import re

import papermill
import pytest

from llamanb import Run
from llamanb.setup.loaded import SETUP_CELL
from llamanb.tradeoffs import CLAIMS, WITHOUT_GPU
from tests.notebooks.shown import cell, noise, text

pytestmark = pytest.mark.slow
STEPS = 4
OF_SPEED = {"quantizing to 4 bits costs speed", "gradient accumulation costs speed"}


def lines(notebook, cell_id: str) -> dict[str, list[str]]:
    """A table's lines by their first column, the caption and the headers left out."""
    split = [re.split(r"\s{2,}", line) for line in text(notebook, cell_id).splitlines()[3:]]
    return {first: rest for first, *rest in split}


@pytest.fixture(autouse=True)
def a_bare_machine(monkeypatch):
    """No GPU, no network."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there


@pytest.mark.timeout(600)
def test_the_tiny_llama_measured_and_what_can_be_said_of_it(run_notebook, tmp_path):
    notebook = run_notebook("05_tradeoffs", steps=STEPS)
    folders = {path.name.rpartition("-")[0] for path in (tmp_path / "runs" / "tradeoffs").iterdir()}
    assert folders == {"baseline", "unquantized", "recompute-all", "micro-batch-1", "micro-batch-4"}
    for folder in (tmp_path / "runs" / "tradeoffs").iterdir():
        run = Run.open(folder)
        assert run.plan.recipe.eval_rows == 0
        assert [step.step for step in run.timeline.steps] == list(range(1, STEPS + 1))
        assert run.timeline.steps[-1].tokens == STEPS * 4 * 128  # no padding
    table = lines(notebook, "table")
    assert table.keys() == WITHOUT_GPU
    assert table["baseline"] == table["nf4"]
    assert float(table["unquantized"][0]) > 1.5 * float(table["baseline"][0])
    assert table["recompute all"][3] == table["baseline"][3]  # recomputing changes nothing that is learned
    assert table["micro-batch 1"][3][:3] == table["micro-batch 4"][3][:3]
    assert lines(notebook, "memory").keys() == WITHOUT_GPU
    assert "host memory" in text(notebook, "memory")

    verdicts = lines(notebook, "verdicts")
    assert verdicts.keys() == {said for said, _, _ in CLAIMS}
    for said, (verdict, *figures) in verdicts.items():
        assert verdict in (("true here", "false here") if said in OF_SPEED else ("needs a GPU",)), said
        assert bool(figures) == (said in OF_SPEED), said
    [shown] = cell(notebook, "picture").outputs
    assert base64.b64decode(shown.data["image/png"]).startswith(b"\x89PNG")
    assert shown.data["text/plain"].count("tokens/s") == 5
    assert text(notebook, "measure").splitlines()[1].endswith(", as measured before")
    assert noise(notebook) == []
    assert cell(notebook, "setup").source == SETUP_CELL
    assert cell(notebook, "setup").outputs == []

    # Once more, with one variant that cannot be measured here: nothing else is run
    again = run_notebook("05_tradeoffs", steps=STEPS, variants="unquantized, fp16, math")
    said = text(again, "measure").splitlines()
    assert [line.endswith("as measured before") for line in said] == [True, True, False, False]
    assert "GPU only" in lines(again, "table")["fp16"][-1]
    assert lines(again, "table")["math"] == ["needs a GPU"]
    assert lines(again, "verdicts")["gradient accumulation costs speed"] == ["not measured", "micro-batch 4: not run"]
    assert noise(again) == []


def test_a_name_that_is_no_variant_s_stops_before_anything_runs(run_notebook, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="no variant is called 'int9'"):
        run_notebook("05_tradeoffs", variants="int9")
    assert not (tmp_path / "runs").exists()
