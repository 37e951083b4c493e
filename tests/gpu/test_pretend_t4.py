"""Llama 3's real shapes with random weights on a pretend T4 (see tests/gpu/pretend.py), through `train` itself.

python -m pytest tests/gpu/test_pretend_t4.py -s      # -s: prints the peaks
"""

import json
import math
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from tests.checkpoints import make_checkpoint, real_tokenizer
from tests.conftest import ROOT
from tests.gpu.pretend import ALLOCATOR_GIB

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def llama_8b(scratch):
    return make_checkpoint("8b", scratch / "8b")


def run(scratch, **recipe) -> dict:
    """Trains ten steps in a fresh process and checks what any run must show."""
    command = [sys.executable, "-m", "tests.gpu.pretend", json.dumps(recipe), str(scratch / "runs")]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    (line,) = [line for line in process.stdout.splitlines() if line.startswith("RESULT ")]
    result = json.loads(line.removeprefix("RESULT "))
    print(f"\n{line}")
    assert len(result["losses"]) == 10
    assert all(map(math.isfinite, result["losses"]))
    assert result["plan"]["dtype"] == "fp16"
    assert result["plan"]["attention"] == "llamanb_expanded"
    assert result["reserved_gib"] <= ALLOCATOR_GIB
    assert result["expandable_segments"]
    weights = load_file(f"{result['folder']}/adapter/adapter_model.safetensors")
    changed = [name for name, weight in weights.items() if "lora_B" in name and weight.any()]
    assert len(changed) == sum("lora_B" in name for name in weights)  # they start as zeros
    return result


def rows_of(scratch, tokens: int, count: int = 40):
    """Plain text rows of exactly so many tokens under the byte tokenizer: each begins and ends with a control token."""
    path = scratch / f"rows{tokens}.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{i:06d}".ljust(tokens - 2, "x")}) for i in range(count)))
    return str(path)


@pytest.mark.parametrize(("rows", "tokens"), [(4, 512), (2, 1024), (1, 2048)])
def test_8b_nf4_trains(scratch, llama_8b, rows, tokens):
    result = run(
        scratch,
        model=str(llama_8b),
        dataset=rows_of(scratch, tokens),
        rank=16,
        max_length=tokens,
        effective_batch_size=rows,
        micro_batch_size=rows,
        checkpointing="all",
        steps=10,
        eval_rows=0,
        warmup=0.0,
    )
    assert result["plan"]["optimizer"] == "paged_adamw_8bit"
    assert result["allocated_gib"] == pytest.approx(result["predicted_gib"], rel=0.01)


def test_8b_fills_the_card_and_takes_what_was_predicted(scratch, llama_8b):
    settings = {"rank": 16, "max_length": 4096, "effective_batch_size": 2, "micro_batch_size": 1, "steps": 10}
    rows = rows_of(scratch, 4096)
    result = run(scratch, model=str(llama_8b), dataset=rows, eval_rows=0, warmup=0.0, **settings)
    assert result["layers"]["stored"] > 0
    assert result["layers"]["mlp checkpointed"] > 0
    assert result["allocated_gib"] == pytest.approx(result["predicted_gib"], rel=0.01)
    assert result["reserved_gib"] > 0.85 * ALLOCATOR_GIB
    for part in ("forward", "loss", "backward", "optimizer step"):
        assert result["seen_gib"][part] == pytest.approx(result["parts_gib"][part], rel=0.01), part
    assert result["seen_gib"]["load"] == pytest.approx(result["parts_gib"]["load"], rel=0.03)


def test_1b_trains_on_squad_with_the_real_vocabulary(scratch, real_data, trl_template):
    tokenizer = real_tokenizer(real_data / "llama3_tokenizer.model", trl_template("llama3_2"))
    model = make_checkpoint("1b", scratch / "1b", tokenizer)
    result = run(
        scratch,
        model=str(model),
        dataset=str(real_data / "squad_flat_sample.json"),
        max_length=1024,
        effective_batch_size=8,
        steps=10,
        eval_rows=2,
        warmup=0.0,
    )
    assert "exact match" in result["scores"]


@pytest.mark.parametrize("method", ["qlora-fp4", "qlora-int8", "lora", "full"])
def test_every_method_trains_1b(scratch, method):
    if not (scratch / "1b-bytes").exists():
        make_checkpoint("1b", scratch / "1b-bytes")
    more = {"learning_rate": 1e-5, "optimizer": "paged_adamw_8bit"} if method == "full" else {}
    recipe = {"model": str(scratch / "1b-bytes"), "dataset": rows_of(scratch, 256), "max_length": 256, "steps": 10}
    recipe |= {"method": method, "effective_batch_size": 4, "eval_rows": 2, "warmup": 0.0, **more}
    if method != "full":
        run(scratch, **recipe)
    else:
        command = [sys.executable, "-m", "tests.gpu.pretend", json.dumps(recipe), str(scratch / "runs")]
        process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert process.returncode == 0, process.stderr[-4000:]
        print(process.stdout[process.stdout.index("RESULT ") :])
