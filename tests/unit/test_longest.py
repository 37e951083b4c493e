"""The benchmark of the longest row, as far as it goes without a GPU: which lengths it tries, and what it says."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import longest
from benchmarks.longest import MODEL, MOST, RANK, STEP, look, one_try, planned_longest, report
from benchmarks.speed_processes import Clock
from benchmarks.speed_rows import MODELS
from llamanb import Recipe, plan


@pytest.mark.parametrize("limit", [900, 1024, 30_000, 60_415, 60_416, 61_440, 100_000, 131_072])
@pytest.mark.parametrize("begin", [8192, 40_960, 60_416, 131_072])
def test_tries_end_with_the_longest_that_trains_beside_the_shortest_that_does_not(limit, begin):
    tried = {}

    def trains(length):
        assert length not in tried
        assert length % STEP == 0
        tried[length] = length <= limit
        return tried[length]

    look(begin, trains)
    good = max((length for length, outcome in tried.items() if outcome), default=0)
    bad = min((length for length, outcome in tried.items() if not outcome), default=MOST + STEP)
    assert good <= limit < bad
    assert bad - good == STEP
    assert len(tried) < 30


def test_tries_end_where_there_is_no_time():
    said = iter([True, None])
    look(1024, lambda length: next(said))
    assert next(said, "no more") == "no more"


def test_the_longest_planned_fits_and_the_next_does_not():
    recipe = Recipe(model=MODELS[MODEL], dataset="random", rank=RANK, effective_batch_size=1, eval_rows=0)
    recipe = recipe.replace(weights="resident")
    found = planned_longest(recipe, "T4")
    fits = [plan(recipe.replace(max_length=n), "T4", force=True).fits for n in (found, found + STEP)]
    assert fits == [True, False]


def test_what_the_plan_refuses_is_tried_shorter(tmp_path, monkeypatch):
    """The card that is there may have a little less than the table's."""
    tried = []

    def one_try(stack, length, *_):
        tried.append((stack, length))
        if stack == "unsloth":
            return {"status": "trains" if length <= 3 * STEP else "out of memory"}
        return {"status": "trains" if length <= 6 * STEP else longest.REFUSED}

    machine = SimpleNamespace(stdout='RESULT {"gpu": "a"}\n', returncode=0)
    monkeypatch.setattr(longest.subprocess, "run", lambda *_, **__: machine)
    monkeypatch.setattr(longest, "planned_longest", lambda *_: 8 * STEP)
    monkeypatch.setattr(longest, "one_try", one_try)
    longest.run(tmp_path / "out.jsonl", "", tmp_path, 1000.0)
    assert tried[:4] == [("llamanb", 8 * STEP), ("llamanb", 7 * STEP), ("llamanb", 6 * STEP), ("unsloth", 6 * STEP)]
    said = report(list(map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())))
    assert f"llamanb: {6 * STEP:,} train, {7 * STEP:,} do not." in said
    assert f"unsloth: {3 * STEP:,} train, {4 * STEP:,} do not." in said


@pytest.mark.slow
def test_a_try_takes_two_steps(tmp_path):
    """Of the tiny Llama, on a CPU."""
    with (tmp_path / "log").open("w") as log:
        found = one_try("llamanb", 64, tmp_path, "", log, Clock(120.0), "tiny", "cpu")
    assert found["status"] == "trains", found
    assert found["warm_s"] > 0
    assert (found["micro"], found["accumulation"]) == (1, 1)


def test_the_report_says_what_trains():
    memory = {"allocated_gib": 12.5, "reserved_gib": 13.0, "warm_s": 80.0}
    lines = [
        {"kind": "machine"},
        {"kind": "try", "stack": "llamanb", "length": 59392, "status": "trains", **memory},
        {"kind": "try", "stack": "unsloth", "length": 59392, "status": "out of memory", "why": "x"},
        {"kind": "try", "stack": "unsloth", "length": 51200, "status": "trains", **memory},
        {"kind": "try", "stack": "unsloth", "length": 55296, "status": "the time was over"},
    ]
    text = report(lines)
    assert "| llamanb | 59,392 | trains | 12.50 | 13.00 | 80.00 |" in text
    assert "llamanb: 59,392 train.\n" in text
    assert "unsloth: 51,200 train, 59,392 do not.\n" in text
