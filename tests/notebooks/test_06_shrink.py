"""Notebook 06 on the tiny default, without a GPU: written, scored, recovered, and one chosen."""

import base64
import re

import papermill
import pytest
import torch
from transformers import AutoModelForCausalLM

from llamanb.setup.loaded import SETUP_CELL
from llamanb.shrink.accounting import GRID, parse_grid
from llamanb.shrink.write import facts_of
from tests.notebooks.shown import cell, noise, text

pytestmark = pytest.mark.slow


def lines(notebook, cell_id: str) -> dict[str, list[str]]:
    """A table's lines by their first column, the caption and the headers left out."""
    split = [re.split(r"\s{2,}", line) for line in text(notebook, cell_id).splitlines()[3:]]
    return {first: rest for first, *rest in split}


@pytest.fixture(autouse=True)
def a_bare_machine(monkeypatch):
    """No GPU, no network."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there


@pytest.mark.timeout(900)
def test_the_tiny_llama_made_smaller_and_recovered(run_notebook, tmp_path):
    notebook = run_notebook("06_shrink")
    table = lines(notebook, "table")
    names = ["dense", *(f"{name} {share:.0%}" for name, shares in parse_grid(GRID).items() for share in shares)]
    assert list(table) == names
    disk, loaded, planned, here, _, perplexity, match, again, _, recovered, _, note = table["dense"]
    assert (disk, again, note) == ("3.546", "3.546", "as it was")
    assert float(loaded) == pytest.approx(2 * float(disk), rel=0.01)  # fp16 on disk, fp32 on a CPU
    assert 30 < float(planned) < 80
    assert 7 < float(here) < 12
    assert float(perplexity) < 1.15 > float(recovered)
    assert int(match.rstrip("%")) > 75
    for name, row in table.items():
        if name.startswith(("layers", "channels", "heads", "whitened")):
            assert float(row[0]) < 0.9 * float(disk), name  # less on disk
            assert float(row[1]) < 0.9 * float(loaded), name  # less in memory
            assert float(row[9]) < float(row[5]), name  # recovery gains
        if name.startswith(("magnitude", "wanda")):
            assert row[:3] == ["3.547", loaded, planned], name
            assert "no memory is saved by themselves" in row[-1]
            assert float(row[7]) > float(row[0]), "the adapter lies beside it"

    [shown] = cell(notebook, "picture").outputs
    assert base64.b64decode(shown.data["image/png"]).startswith(b"\x89PNG")
    assert "channels, recovered: 1.0" in shown.data["text/plain"]
    folder = tmp_path / "runs" / "shrunken"
    assert str(folder) in text(notebook, "apply")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    assert model.config.intermediate_size == 256
    assert sum(weight.nbytes for weight in model.parameters()) / 1e6 == pytest.approx(
        float(table["channels 50%"][0]), rel=0.01
    )
    assert facts_of(tmp_path / "runs" / "shrink" / "channels-50" / "model")["sparsity"] == 0.5
    assert len(text(notebook, "measure").splitlines()) == len(names)
    assert noise(notebook) == []
    assert cell(notebook, "setup").source == SETUP_CELL
    assert cell(notebook, "setup").outputs == []

    # Once more, choosing another: what was measured before is there, and only the folder is taken
    again = run_notebook("06_shrink", methods="whitened SVD 0.5", chosen="whitened SVD 50%", write_to="runs/factored")
    assert lines(again, "table")["whitened SVD 50%"] == table["whitened SVD 50%"]
    assert (tmp_path / "runs" / "factored" / "shrink.json").is_file()
    with pytest.raises(papermill.PapermillExecutionError, match="is there already"):
        run_notebook("06_shrink", methods="whitened SVD 0.5", chosen="dense")


def test_a_method_that_is_none_stops_before_anything_is_measured(run_notebook, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match=r"'random 0\.5' cannot be measured"):
        run_notebook("06_shrink", methods="random 0.5")
    assert [path.name for path in (tmp_path / "runs" / "shrink").iterdir()] == ["chats.jsonl"]
