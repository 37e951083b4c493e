"""20 real lacks of memory on a pretended card, all recovered from: pytest tests/gpu/test_recovery_gpu.py -s"""

import json
import subprocess
import sys

import pytest

from tests.checkpoints import make_checkpoint
from tests.conftest import ROOT
from tests.gpu.recovered import CASES, LATE, SCORING, STEPS, TAKEN

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]


def test_every_lack_of_memory_is_recovered_from(tmp_path):
    make_checkpoint("1b", tmp_path / "1b")
    command = [sys.executable, "-m", "tests.gpu.recovered", str(tmp_path / "1b"), str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    found = [json.loads(line[7:]) for line in process.stdout.splitlines() if line.startswith("RESULT ")]
    for one in found:
        print(json.dumps(one))
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    assert len(found) == len(CASES) == 20
    for one in found:
        recovered, fresh, words = one["recovered"], one["fresh"], f"{one['kind']}, {one['gib']} GiB"
        assert recovered["status"] == "finished", words
        assert len(recovered["losses"]) == STEPS, words
        assert bool(recovered["taken"]) == (one["kind"] != SCORING), words
        first = {LATE: STEPS, TAKEN: 3}.get(one["kind"], 1)
        assert all(step == first for step, _, _ in recovered["taken"]), words
        assert recovered["losses"] == pytest.approx(fresh["losses"], rel=1e-2), words
        assert recovered["score"] == (fresh["score"] and pytest.approx(fresh["score"], rel=1e-3)), words
        for name in ("allocated", "reserved"):
            assert recovered[name] == pytest.approx(fresh[name], rel=0.02), f"{words}: {name}"
        assert recovered["left"] < 0.1, words
