"""From Colab's image to an executed quickstart, the way a user goes: Run all, one restart, Run all.

The tests build on each other, in the order of this file: each finds the environment as the one before has left it.
"""

import json
import os
import re
import time
from pathlib import Path

import pytest

from llamanb.setup.loaded import SETUP_CELL
from tests.colab.image import DIFFERS, FREEZE, ROOT, run

pytestmark = pytest.mark.slow

MOVED = {"datasets", "pyarrow"}
ADDED = {"trl", "bitsandbytes", "papermill", "tenacity", "torchmetrics", "lightning-utilities", "gguf", "llamanb"}
REMOVED = {"torchao"}
UNTOUCHED = ("torch", "numpy", "pandas", "transformers", "peft", "accelerate", "huggingface-hub", "tokenizers")
UNTOUCHED += ("ipywidgets", "ipython", "ipykernel", "traitlets", "matplotlib", "fsspec", "dill")


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> Path:
    """Colab's /content: the folder its notebooks run in."""
    return tmp_path_factory.mktemp("content")


def as_on_colab(github: dict[str, str]) -> dict[str, str]:
    """This environment, less what would let a kernel find the working tree's llamanb."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | github


def names_and_versions(colab) -> dict[str, str]:
    return {name.replace("_", "-"): version for name, version in colab.versions().items()}


@pytest.fixture(scope="module")
def first_session(colab, content, github):
    """A kernel that has pyarrow and torchao loaded, as Colab's may, runs the setup cell. Yields what came of it."""
    colab.declare("image-dataframes", "pyarrow<20", "numpy>=2")
    before = names_and_versions(colab)
    assert before["datasets"] == "4.0.0"
    assert before["ipywidgets"] == "7.7.1"
    cells = ["import pyarrow\nimport torchao\nprint(pyarrow.__version__)", SETUP_CELL, "print('not reached')"]
    (content / "cells.json").write_text(json.dumps(cells))
    start = time.perf_counter()
    # nbclient is in the image; papermill is not there yet.
    code = """
import json, nbclient, nbformat
cells = [nbformat.v4.new_code_cell(cell) for cell in json.load(open("cells.json"))]
notebook = nbformat.v4.new_notebook(cells=cells)
try:
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
except nbclient.exceptions.CellExecutionError:
    pass
print(json.dumps([cell.outputs for cell in notebook.cells]))
"""
    done = run(colab.python, "-c", code, cwd=content, env=as_on_colab(github))
    outputs = json.loads(done.stdout.splitlines()[-1])
    texts = ["".join(o.get("text", "") + "\n".join(o.get("traceback", [])) for o in cell) for cell in outputs]
    print(f"\nsetup cell: {time.perf_counter() - start:.0f} s, {DIFFERS}\n{texts[1]}")
    return before, names_and_versions(colab), texts


def test_what_moved_and_what_did_not(first_session):
    before, after, _ = first_session
    assert {name for name in before.keys() & after.keys() if before[name] != after[name]} == MOVED
    assert after.keys() - before.keys() == ADDED
    assert before.keys() - after.keys() == REMOVED
    for name in UNTOUCHED:
        assert before[name] == after[name], name
    assert tuple(map(int, after["datasets"].split(".")[:2])) >= (4, 7)
    assert int(after["pyarrow"].split(".")[0]) >= 21
    assert after["trl"] == "1.16.0"


def test_versions_before_are_colabs(first_session):
    before, _, _ = first_session
    wanted = dict(re.findall(r"^([\w.-]+)==(\S+)$", FREEZE.read_text(), re.MULTILINE))
    assert {name: before[name.lower().replace("_", "-")] for name in wanted} == wanted
    assert before["torch"].startswith("2.13.0")


def test_setup_cell_says_what_it_did_and_who_is_affected(first_session):
    _, after, (loaded, said, _) = first_session
    assert loaded.splitlines()[-1] == "18.1.0"
    assert f"pyarrow: 18.1.0 -> {after['pyarrow']}" in said
    assert "torchao: 0.10.0 -> removed" in said
    assert f"image-dataframes 1.0 has requirement pyarrow<20, but you have pyarrow {after['pyarrow']}" in said
    assert f"unchanged: torch {after['torch']}, numpy 2.1.3" in said


def test_setup_cell_asks_for_one_restart_and_stops_there(first_session):
    _, after, (_, said, next_cell) = first_session
    assert "restart this kernel once" in said
    assert f"pyarrow 18.1.0 (now {after['pyarrow']})" in said
    assert "torchao 0.10.0 (now removed)" in said
    assert "Runtime > Restart session" in said
    assert next_cell == ""


def test_second_run_changes_nothing_and_is_quick(first_session, colab, content, github):
    _, before, _ = first_session
    (checkout,) = content.glob("llamanb-v*")
    start = time.perf_counter()
    done = run("bash", checkout / "colab_setup.sh", colab.python, cwd=content, env=as_on_colab(github))
    assert "nothing to do" in done.stdout
    assert time.perf_counter() - start < 10
    assert names_and_versions(colab) == before


def test_quickstart_runs_after_the_restart(first_session, colab, content, github):
    (checkout,) = content.glob("llamanb-v*")
    notebook = checkout / "notebooks" / "01_quickstart.ipynb"
    start = time.perf_counter()
    env = as_on_colab(github)
    run(colab.python, "-m", "papermill", "-k", "python3", notebook, content / "run.ipynb", cwd=content, env=env)
    print(f"\nquickstart: {time.perf_counter() - start:.0f} s, {DIFFERS}")
    cells = json.loads((content / "run.ipynb").read_text())["cells"]
    assert not [output for cell in cells for output in cell.get("outputs", []) if output["output_type"] == "error"]
    where = "import llamanb; print(llamanb.__file__)"
    assert str(colab.folder) in run(colab.python, "-c", where, cwd=content, env=env).stdout
    assert str(ROOT / "llamanb") not in run(colab.python, "-c", where, cwd=content, env=env).stdout
