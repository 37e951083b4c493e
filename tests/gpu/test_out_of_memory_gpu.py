"""Running out of memory for seven causes, and what the error then names: pytest tests/gpu/test_out_of_memory_gpu.py"""

import json
import pickle
import subprocess
import sys

import pytest

from tests.checkpoints import make_checkpoint
from tests.conftest import ROOT
from tests.gpu.out_of_memory import CAUSES, EARLIER

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oom")
    for size in ("1b", "3b"):
        make_checkpoint(size, folder / size)
    for tokens in (64, 2048):
        rows = [json.dumps({"text": f"{i:06d}".ljust(tokens - 2, "x")}) for i in range(40)]
        (folder / f"{tokens}.jsonl").write_text("\n".join(rows))
    return folder


@pytest.mark.parametrize("cause", CAUSES)
def test_the_card_names_the_right_bucket(cause, places):
    runs = places / f"runs {cause}"
    command = [sys.executable, "-m", "tests.gpu.out_of_memory", cause, *[str(places)] * 2, str(runs)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    print("\n" + process.stdout)
    (line,) = [line for line in process.stdout.splitlines() if line.startswith("RESULT ")]
    result = json.loads(line.removeprefix("RESULT "))
    phase, bucket = CAUSES[cause]
    assert result["bucket"] == bucket
    assert phase is None or result["phase"] == phase
    assert result["changes"], "something would fit"
    assert result["left_gib"] < (8.2 if bucket == EARLIER else 0.2), "the model is let go"
    snapshot = pickle.loads((runs / "oom" / "memory_snapshot.pickle").read_bytes())
    assert snapshot["segments"] or result["phase"] == "load"
