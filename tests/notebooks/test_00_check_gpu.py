"""Notebook 00 on a machine without a GPU (and on one with its GPU hidden)."""

import papermill
import pytest


def outputs(notebook, cell_id: str) -> dict[str, str]:
    """What a cell shows, by MIME type; its printed text under "stream"."""
    (cell,) = (cell for cell in notebook.cells if cell.get("id") == cell_id)
    shown = {}
    for output in cell.outputs:
        shown |= output.get("data", {}) or {"stream": output.get("text", "")}
    return shown


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_it_runs_without_a_gpu_and_every_part_shows(run_notebook, tmp_path):
    notebook = run_notebook("00_check_gpu", folder=str(tmp_path))

    parts = ("check", "memory", "processes", "precision", "attention", "host", "versions", "summary")
    for part in parts:
        shown = outputs(notebook, part)
        assert shown["text/html"].startswith("<table>"), part
        assert "stream" not in shown, f"{part}: a lesson shows no noise"

    summary = outputs(notebook, "summary")["text/plain"]
    assert "none in use" in summary
    assert "fp32" in summary
    assert "The quickstart's tiny Llama trains on the CPU" in summary
    assert str(tmp_path) in outputs(notebook, "host")["text/plain"]
    attention = outputs(notebook, "attention")["text/plain"].splitlines()
    assert next(line for line in attention if line.startswith("math")).split() == ["math", "runs", "runs"]
    torch_row = next(r for r in outputs(notebook, "versions")["text/plain"].splitlines() if r.startswith("torch "))
    assert len(torch_row.split()) == 3, f"torch is loaded and not stale: {torch_row}"


@pytest.mark.slow
def test_a_precision_that_this_machine_lacks_is_explained(run_notebook):
    summary = outputs(run_notebook("00_check_gpu", precision="fp16"), "summary")["text/plain"]
    assert 'precision="fp16" without a GPU' in summary
    assert 'fix: Set precision="auto"' in summary


def test_a_precision_that_is_none_stops_with_what_why_and_fix(run_notebook):
    with pytest.raises(papermill.PapermillExecutionError, match="precision='int3'") as caught:
        run_notebook("00_check_gpu", precision="int3")
    assert "fix: One of: auto, fp32, fp16, bf16" in str(caught.value)
