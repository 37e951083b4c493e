"""Runs notebooks as a user's Run all does: from top to bottom, in a fresh kernel of this interpreter."""

import json
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

from tests.unit.test_canary import CANARY

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_notebook(tmp_path, monkeypatch):
    """`run_notebook(name, **parameters)`: the notebook `notebooks/<name>.ipynb`, executed in `tmp_path`.

    A cell that raises raises here (papermill's PapermillExecutionError holds the traceback), and so does a parameter
    that the notebook does not have. Environment variables set with monkeypatch reach the kernel.
    """
    # A kernel of this very interpreter, known to this test only: no kernel needs to be installed on the machine.
    kernel = tmp_path / "jupyter" / "kernels" / "this-python"
    kernel.mkdir(parents=True)
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "the interpreter of the tests",
        "language": "python",
        "env": {"PYTHONPATH": str(ROOT)},
    }
    (kernel / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))

    def run(name: str, /, **parameters) -> nbformat.NotebookNode:
        source, executed = ROOT / "notebooks" / f"{name}.ipynb", tmp_path / f"{name}.ipynb"
        unknown = parameters.keys() - papermill.inspect_notebook(str(source)).keys()
        assert not unknown, f"{source.name} has no parameter {sorted(unknown)}"
        papermill.execute_notebook(
            str(source), str(executed), parameters, kernel_name="this-python", cwd=str(tmp_path), progress_bar=False
        )
        return nbformat.read(executed, as_version=4)

    return run


@pytest.fixture
def bare_machine_with_a_token(monkeypatch):
    """No GPU, no network, and a token that nothing may show."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("HF_TOKEN", CANARY)
