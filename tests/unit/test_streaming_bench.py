"""The streaming benchmark, as far as it goes without a GPU: what it plans, and what it says."""

import dataclasses
import json

import pytest

from benchmarks.streaming import ROWS, plans, report
from llamanb import Card


@pytest.mark.parametrize("name", ROWS)
def test_each_row_streams_on_its_card_and_is_held_to_the_same_rows_resident(name):
    row = ROWS[name]
    made, kept = plans(row, Card.known(row["card"]), Card.known("H200"))
    assert made.fits
    assert made.streamed
    assert made.needs_gib <= row.get("free_gib", 99)
    assert (kept.streamed, kept.micro_batch_size, kept.kernel) == ((), made.micro_batch_size, made.kernel)
    assert set(kept.layers) == {"checkpointed"}
    assert kept.dtype == made.dtype


def test_a_slow_link_is_planned_for():
    usual, slow = (plans(ROWS[name], Card.known("T4"), Card.known("H200"))[0] for name in ("8b-8", "8b-slow"))
    assert (usual.time.stall_s, slow.card.host_link_gbs) == (0, ROWS["8b-slow"]["link"])
    link = dataclasses.replace(slow.card, host_link_gbs=0.02)
    assert plans({**ROWS["8b-slow"], "link": 0.02}, link, Card.known("H200"))[0].time.stall_s > 0


def test_a_host_that_is_too_small_has_some_of_them_on_disk():
    made, _ = plans(ROWS["8b-disk"], Card.known("T4"), Card.known("H200"))
    assert 0 < len(made.on_disk) < len(made.streamed) <= 32
    assert made.streamed_gib < ROWS["8b-disk"]["host_gib"]


def test_the_report_holds_one_against_the_other(tmp_path):
    line = {"row": "8b-8", "status": "ok", "micro_batch": 2, "layers": {"stored": 32}, "streamed": 21, "step_s": 2.0}
    line |= {"planned": {"reserved": 7.0, "step_s": 1.9}, "reserved": 6.9, "stall_s": 0.1, "tokens_s": 900.0}
    lines = [line | {"resident": False}, line | {"resident": True, "tokens_s": 1000.0, "stall_s": None}]
    lines.append({"row": "70b-24", "resident": False, "streamed": 80, "on_disk": 5, "status": "out of memory: x"})
    (tmp_path / "out").write_text("\n".join(map(json.dumps, lines)))
    text = report(tmp_path / "out").splitlines()
    assert "| 8b-8 | 21 streamed | 2 | 32 stored | 7.0 | 6.9 | 1.9 | 2.0 | 0.1 | 900.0 | 90% |" in text
    assert "| 8b-8 | resident | 2 | 32 stored | 7.0 | 6.9 | 1.9 | 2.0 |  | 1000.0 | 100% |" in text
    assert any("80 streamed, 5 from disk | out of memory" in row for row in text)
    assert {row.count("|") for row in text} == {12}
