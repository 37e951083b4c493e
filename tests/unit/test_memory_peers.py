"""The other estimators say what their sources say, by hand where a hand can compute it."""

import json

import pytest

from benchmarks import memory_peers
from benchmarks.memory_peers import (
    ACCELERATE_DTYPES,
    MIXED,
    OTHERS,
    SIXTEEN_BIT,
    accelerate_sizes,
    activation_bytes,
    adapter_parameters,
    config_fields,
    estimates,
    formula_bytes,
    summary,
    weights_and_a_fifth,
)
from llamanb.architecture import architecture, from_config
from llamanb.layout import GIB

ONE, EIGHT = "meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"
PARAMETERS = 1_235_814_400  # of the 1B, as its model card has them
ROW = {
    "id": "x-1",
    "model": "1b",
    "method": "qlora-nf4",
    "double_quant": True,
    "length": 512,
    "rows": 2,
    "rank": 8,
    "targets": "attention",
    "layout": {"checkpointed": 10, "stored": 6},
    "kernel": "flash",
    "optimizer": "paged_adamw_8bit",
    "dropout": 0.0,
    "accumulation": 2,
    "expandable": True,
    "predicted": {"reserved": 3.0},
}
BUFFERS = 1024
"""Bytes: accelerate counts the frequencies of the positions too."""


@pytest.mark.parametrize(("dtype", "each"), [("float32", 4), ("float16", 2), ("int8", 1), ("int4", 0.5)])
def test_accelerate_counts_parameters_times_bytes(dtype, each):
    total, training = accelerate_sizes(architecture(ONE), dtype)
    assert total == pytest.approx(each * PARAMETERS, abs=BUFFERS)
    if dtype.startswith("float"):  # four times fp32 weights, or the two moments of the mixed precision
        assert training == pytest.approx({"float32": 16, "float16": 8}[dtype] * PARAMETERS, abs=4 * BUFFERS)
    else:
        assert training is None


def test_accelerate_leaves_out_a_head_that_is_not_tied():
    model = architecture(EIGHT)
    total, _ = accelerate_sizes(model, "float16")
    assert total == pytest.approx(2 * (model.parameters - model.embedding_parameters), abs=BUFFERS)


def test_accelerate_asks_no_hub(monkeypatch):
    from accelerate.commands import estimate

    def asks(*args, **kwargs):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(estimate, "model_info", asks)
    accelerate_sizes.cache_clear()
    assert accelerate_sizes(architecture(ONE), "int4")[0] > 0
    assert estimate.verify_on_hub.__module__ == estimate.__name__, "it is itself again"


def test_the_config_describes_the_same_shape():
    for name in (ONE, EIGHT):
        assert from_config(config_fields(architecture(name)), name) == architecture(name)


def test_the_formula_by_hand():
    """The 1B: h = 2048, a = 32, keys and values 512 wide, 16 layers of which 6 are kept; b = 2, s = 512, r = 8."""
    adapters = 16 * 8 * ((2048 + 2048) + (2048 + 512) + (2048 + 512) + (2048 + 2048))
    assert adapter_parameters(ROW) == adapters == 1_703_936
    kept, recomputed, logits = 6 * 2 * 512 * 2048 * 34, 10 * 2 * 2 * 512 * 2048, 4 * 2 * 512 * 128256
    scores = 6 * 2 * 512 * 5 * 32 * 512  # 5·a·s/h times s·b·h
    assert activation_bytes(ROW, scores=False) == kept + recomputed + logits == 995_098_624
    assert activation_bytes(ROW, scores=True) == kept + recomputed + logits + scores
    assert activation_bytes(ROW, scores=True, logits=False) == kept + recomputed + scores
    without = PARAMETERS * 0.5 + adapters * 12 + kept + recomputed + logits
    assert formula_bytes(ROW, trained=SIXTEEN_BIT, scores=False) == without
    assert formula_bytes(ROW, trained=MIXED, scores=True) == without + 4 * adapters + scores


def test_layers_that_wait_in_host_memory_count_as_recomputed():
    made = [activation_bytes({**ROW, "layout": {kind: 16}}, scores=True) for kind in ("offloaded", "checkpointed")]
    assert made[0] == made[1] < activation_bytes(ROW, scores=False)


@pytest.mark.parametrize(("method", "each"), [("qlora-nf4", 0.5), ("qlora-int8", 1), ("lora", 2)])
def test_every_method_has_its_bytes(method, each):
    row = {**ROW, "method": method}
    assert weights_and_a_fifth(row) == pytest.approx(1.2 * PARAMETERS * each)
    assert accelerate_sizes(architecture(ONE), ACCELERATE_DTYPES[method])[0] * 1.2 == pytest.approx(
        weights_and_a_fifth(row), rel=1e-6
    )


def test_only_the_math_kernel_keeps_scores_in_the_kinder_formula():
    name = next(name for name in OTHERS if "math" in name)
    assert OTHERS[name](ROW) == formula_bytes(ROW, trained=MIXED, scores=False)
    assert OTHERS["the same, and no logits"](ROW) == OTHERS[name](ROW) - 4 * 2 * 512 * 128256
    assert OTHERS[name]({**ROW, "kernel": "math"}) == formula_bytes(ROW, trained=MIXED, scores=True)


def test_llamanb_is_asked_today_and_as_it_was():
    said = estimates(ROW, {"rehearsed": {"reserved": 2.5}})
    assert said["llamanb, closed form as the grid has it"] == 3.0
    assert said["llamanb, after a rehearsal"] == 2.5
    assert 1 < said["llamanb, closed form today"] < 4
    assert said["accelerate estimate-memory, training using Adam"] is None
    assert estimates(ROW, {})["llamanb, after a rehearsal"] is None


def test_the_table_counts_errors_and_rows_that_are_too_small(monkeypatch, tmp_path, capsys):
    sizes = {"x-1": 0.75 * GIB, "x-2": 2.2 * GIB, "x-3": None, "x-4": 1.0 * GIB}
    monkeypatch.setattr(memory_peers, "OTHERS", {"guess": lambda row: sizes[row["id"]]})
    grid = [{**ROW, "id": name} for name in sizes]
    measured = [{"id": name, "measured": {"reserved": 2.0 if name == "x-2" else 1.0}} for name in ("x-1", "x-2", "x-3")]
    measured.append({"id": "x-4", "status": "out of memory"})
    lines = summary(grid, measured).splitlines()
    assert lines[0].startswith("3 rows")
    assert "| guess | 2 | 17.5% | -25.0% | -7.5% | 1 | 1 |" in lines
    assert not any("after a rehearsal" in line for line in lines), "nothing was rehearsed"
    for name, rows in (("grid", grid), ("measured", measured)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("sys.argv", ["memory_peers", str(tmp_path / "grid"), str(tmp_path / "measured")])
    memory_peers.main()
    assert capsys.readouterr().out.strip() == "\n".join(lines)
