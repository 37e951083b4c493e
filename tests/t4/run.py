"""Every notebook on a real GPU with a real checkpoint: enough optimizer steps, and the held-out loss falls.

    python -m tests.t4.run [--steps 60] [01_quickstart ...]

Executed notebooks go to artifacts/t4/. A notebook gets the parameters that its parameters cell has; one that leaves a
`run` behind is held to what that run measured, the others only have to run to their end.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import nbformat
import papermill

ROOT = Path(__file__).resolve().parents[2]
ARTIFACTS = ROOT / "artifacts" / "t4"
FEWEST_STEPS = 50
QUICK, MAIN = "unsloth/Llama-3.2-1B-Instruct", "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit"
"""Ungated copies of Meta's checkpoints; 8B is quantized already, a download of 5.5 GB."""
MODELS = {"03_plan": MAIN, "04_train": MAIN, "07_after_training": MAIN}
"""The notebooks that train 8B on a T4; the others take 1B."""
REPORT = """
import json, pathlib
if "run" in globals() and hasattr(run, "compare"):
    scores = run.compare()
    pathlib.Path({path!r}).write_text(json.dumps(
        {{"model": run.plan.recipe.model, "steps": len(run.timeline.steps), "peak_gib": run.peak_gib,
          "before": scores.before.loss, "after": scores.after.loss, "train_s": run.train_s}}))
"""


def execute(name: str, steps: int) -> dict:
    """Runs one notebook; what its training measured, or nothing but the seconds where it has none."""
    source, report = ROOT / "notebooks" / f"{name}.ipynb", ARTIFACTS / f"{name}.json"
    report.unlink(missing_ok=True)
    wanted = {"model": MODELS.get(name, QUICK), "dataset": "rajpurkar/squad", "steps": steps, "name": f"t4-{name}"}
    parameters = {key: value for key, value in wanted.items() if key in papermill.inspect_notebook(str(source))}

    notebook = nbformat.read(source, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(REPORT.format(path=str(report))))
    input_path = ARTIFACTS / f"{name}.input.ipynb"
    nbformat.write(notebook, input_path)
    start = time.perf_counter()
    papermill.execute_notebook(
        str(input_path),
        str(ARTIFACTS / f"{name}.ipynb"),
        parameters,
        kernel_name="python3",
        cwd=str(ARTIFACTS),
        log_output=True,
        progress_bar=False,
    )
    measured = json.loads(report.read_text()) if report.exists() else {}
    return {"notebook": name, "seconds": round(time.perf_counter() - start), **measured}


def complaints(result: dict) -> list[str]:
    if "steps" not in result:
        return []
    found = []
    if result["steps"] < FEWEST_STEPS:
        found.append(f"{result['steps']} optimizer steps, fewer than {FEWEST_STEPS}")
    if not result["after"] < result["before"]:  # also for NaN
        found.append(f"held-out loss {result['before']:.3f} -> {result['after']:.3f} does not fall")
    if result["model"] == "tiny":
        found.append("trained the tiny Llama, not a real checkpoint")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", help="names without .ipynb; all of them by default")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("error: no GPU\n  why: torch finds no CUDA device\n  fix: run this on a machine with an NVIDIA GPU")
        return 1
    major, minor = torch.cuda.get_device_capability()
    print(f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}, torch {torch.__version__}")
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    failed, trained = [], 0
    for name in options.notebooks or sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")):
        try:
            result = execute(name, options.steps)
            wrong = complaints(result)
        except papermill.PapermillExecutionError as error:
            result, wrong = {"notebook": name}, [f"{error.ename}: {error.evalue}"]
        trained += "steps" in result
        print(json.dumps(result), *(f"\n  FAILED: {what}" for what in wrong), flush=True)
        failed += [name] * bool(wrong)
    if not options.notebooks and not trained:
        failed.append("no notebook trained anything")
    print(f"failed: {', '.join(failed)}" if failed else "all notebooks passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
