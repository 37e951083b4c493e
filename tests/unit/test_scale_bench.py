"""The page that `benchmarks.scale` makes of what was measured."""

import json

import pytest

from benchmarks.scale import STEPS, counts_of, run
from benchmarks.scale_report import fitted, lines, pays, report, split


def test_speeds_are_told_in_times_of_one_card(tmp_path):
    one = {"row": "8b-2048", "cards": 1, "accumulation": 8, "micro_batch": 2, "tokens_s": 10_000, "step_s": 3.2}
    one |= {"planned": {"reserved": 7.5}, "ranks": [{"reserved": 7.48}], "adding_up_s": 0.0}
    two = one | {"cards": 2, "accumulation": 4, "tokens_s": 19_000, "step_s": 1.6, "shards": 2, "adding_up_s": 0.016}
    two["ranks"] = [{"reserved": 7.48}, {"reserved": 7.51}]
    failed = {"row": "8b-512", "cards": 2, "error": "a\nNCCL error"}
    path = tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (one, two, failed)))
    told = report(lines([path])).splitlines()
    path.write_text(path.read_text() + json.dumps({"row": "collectives", "cards": 2, "sums_s": {"1": 0.1}}) + "\n")
    assert report(lines([path])).splitlines() == told
    assert told[2] == "| 8b-2048 | 1 | copied | 8 × 2 | 10,000 | 1.00 |  | 7.50 | 7.48 |"
    assert told[3] == "| 8b-2048 | 2 | shared | 4 × 2 | 19,000 | 1.90 | 1.0% | 7.50 | 7.48, 7.51 |"
    assert "NCCL error" in told[4]


def test_a_step_is_split_into_what_tokens_take_and_what_comes_once():
    """A card of 50 µs a token and 90 ms a step; gradients in 10 ms, of which 4 are not the link's."""
    tokens, each, once = 32_768, 50e-6, 0.09
    one = {"row": "8b-2048", "cards": 1, "step_s": tokens * each + once}
    one["tokens_s"] = tokens / one["step_s"]
    two = one | {"cards": 2, "step_s": tokens / 2 * each + once + 0.01, "adding_up_s": 0.01}
    assert split(one, two, tokens) == pytest.approx((each, once))
    seconds = {str(mib): 1e-3 + mib / 1e4 for mib in (1, 16, 64, 256)}
    assert fitted(seconds) == pytest.approx((1e-3, 1e-4))
    near, far = ({"row": "collectives", "cards": 2, "p2p": p2p} for p2p in (True, False))
    near |= {"sums_s": {mib: s / 4 for mib, s in seconds.items()}, "gathers_s": seconds}
    far |= {"sums_s": seconds, "gathers_s": {mib: 2 * s for mib, s in seconds.items()}}
    said = pays([one, two, near, far])
    with pytest.raises(ValueError, match="measured twice"):
        pays([one, two, one, near, far])
    assert "50.0 µs a token and 90 ms once a step" in said
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("| ")]
    near, far = (row for row in rows if row[0].startswith("gradients"))
    assert (near[3], float(far[3])) == ("10.0", pytest.approx(10 + 17 * 3 / 4, abs=0.1))
    at = float(near[4].replace(",", ""))
    assert 2 * at * each + once == pytest.approx(1.85 * (at * each + once + 0.01), rel=1e-3)
    hidden = {(row[0], row[1]): float(row[4].replace(",", "")) for row in rows if row[0] in ("8b", "70b")}
    assert hidden["8b", "through host memory"] == pytest.approx(2 * hidden["8b", "between the cards"], rel=1e-2)


def test_rows_run_with_as_many_processes_as_they_are_for():
    assert counts_of("8b-2048", [1, 2]) == [1, 2]
    assert counts_of("collectives", [1, 2]) == [2]
    assert counts_of("70b-4x24", [1, 2, 4]) == [1, 4]


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


@pytest.mark.slow
def test_a_rank_is_measured_without_the_others(tmp_path):
    run(tmp_path / "out.jsonl", ["tiny-4"], [1, 2])
    line = json.loads((tmp_path / "out.jsonl").read_text())
    assert (line.get("error"), line.get("cards"), line.get("shards"), line["alone"]) == (None, 4, 4, True)
    assert line["accumulation"] * line["micro_batch"] == 1
    assert len(line["ranks"][0]["loss"]) == STEPS
