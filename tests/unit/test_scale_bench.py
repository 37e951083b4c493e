"""The page that `benchmarks.scale` makes of what was measured."""

import json

import pytest

from benchmarks.scale import STEPS, report, run


def test_speeds_are_told_in_times_of_one_card(tmp_path):
    one = {"row": "8b-2048", "cards": 1, "accumulation": 8, "micro_batch": 2, "tokens_s": 10_000, "step_s": 3.2}
    one |= {"planned": {"reserved": 7.5}, "ranks": [{"reserved": 7.48}], "adding_up_s": 0.0}
    two = one | {"cards": 2, "accumulation": 4, "tokens_s": 19_000, "step_s": 1.6, "shards": 2, "adding_up_s": 0.016}
    two["ranks"] = [{"reserved": 7.48}, {"reserved": 7.51}]
    failed = {"row": "8b-512", "cards": 2, "error": "a\nNCCL error"}
    path = tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (one, two, failed)))
    lines = report([path]).splitlines()
    assert lines[2] == "| 8b-2048 | 1 | copied | 8 × 2 | 10,000 | 1.00 |  | 7.50 | 7.48 |"
    assert lines[3] == "| 8b-2048 | 2 | shared | 4 × 2 | 19,000 | 1.90 | 1.0% | 7.50 | 7.48, 7.51 |"
    assert "NCCL error" in lines[4]


@pytest.mark.slow
def test_two_processes_are_measured_as_one_is(tmp_path):
    """On CPUs: that the script runs."""
    run(tmp_path / "out.jsonl", ["tiny"], [1, 2])
    one, two = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert (one.get("error"), two.get("error")) == (None, None)
    assert (one["accumulation"], two["accumulation"]) == (4, 2)
    assert len(two["ranks"]) == 2
    assert all(len(rank["loss"]) == STEPS for rank in (*one["ranks"], *two["ranks"]))
    assert two["ranks"][0]["loss"] == pytest.approx(one["ranks"][0]["loss"], rel=1e-4)
    assert two["adding_up_s"] > 0
