"""nf4 with paged 8-bit AdamW and fp16's scaler on a GPU: a run that was cut off goes on within run-to-run noise.

python -m pytest tests/gpu/test_resume_gpu.py -s
"""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]
STEPS, CUT = 12, 5


def test_a_run_that_was_cut_off_goes_on_within_noise(mini, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"instruction": f"Say {n}.", "output": f"It is {n}."}) for n in range(40)))
    recipe = {"model": str(mini), "dataset": str(rows), "max_length": 128, "effective_batch_size": 4, "steps": STEPS}
    recipe |= {"rank": 1024, "learning_rate": 1e-3, "checkpoint_every_steps": 1, "dropout": 0.1, "eval_rows": 2}
    command = [sys.executable, "-m", "tests.gpu.resumed", json.dumps(recipe), str(tmp_path / "runs"), str(CUT)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    (line,) = [line for line in process.stdout.splitlines() if line.startswith("RESULT ")]
    print(f"\n{line}")
    found = json.loads(line.removeprefix("RESULT "))
    assert (found["optimizer"], found["dtype"]) == ("paged_adamw_8bit", "fp16")
    assert f"at step {CUT} of {STEPS}" in process.stdout
    noise = max(abs(one - other) for one, other in zip(found["whole"], found["again"], strict=True))
    pairs = zip(found["whole"], found["picked_up"], strict=True)
    assert max(abs(one - other) for one, other in pairs) <= max(3 * noise, 1e-4)
    assert found["scale"] == found["whole_scale"], "the scaler went on too"
    assert set(found["paged"]) == {found["paged"][0]}, "as many states are paged as before"
    assert found["paged"][0] > 0, "a rank of 1024 makes some large enough to be paged"
