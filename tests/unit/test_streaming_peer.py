"""The streaming benchmark beside Soup, as far as it goes without Soup and a GPU."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks import streaming_peer
from benchmarks.streaming_peer import LLAMANB, TURNS, our_plan, report
from benchmarks.streaming_soup import GIB, LENGTH, OPTIONS, RANK, STEPS, VRAM_GIB, step_seconds, write_soup
from llamanb import Card


@pytest.mark.parametrize("name", OPTIONS)
def test_soup_gets_its_defaults_its_options_and_rows_that_fill_every_pass(tmp_path, name):
    write_soup(tmp_path, Path("/checkpoint"), name, 2)
    config = json.loads((tmp_path / "soup.yaml").read_text())
    training = config["training"]
    assert (config["base"], config["data"]["max_length"]) == ("/checkpoint", LENGTH)
    assert (training["stream_layers"], training["quantization"], training["lora"]["r"]) == (True, "4bit", RANK)
    assert (training["batch_size"], training["gradient_accumulation_steps"]) == (2, 1)
    assert OPTIONS[name].items() <= training.items()
    assert training.get("stream_vram_override") in (None, int(VRAM_GIB * GIB))
    rows = [json.loads(line) for line in (tmp_path / config["data"]["train"]).read_text().splitlines()]
    assert len(rows) == 2 * STEPS
    assert min(len(row["output"].split()) for row in rows) > LENGTH  # a word is a token at least


def test_llamanb_is_planned_for_the_same_memory_rows_and_adapters():
    for rows in (rows for name, rows in TURNS if name == LLAMANB):
        plan = our_plan(Card.known("H200"), rows)
        assert (plan.card.free_gib, plan.micro_batch_size, plan.accumulation) == (VRAM_GIB, rows, 1)
        assert (plan.length, plan.recipe.rank, plan.recipe.targets) == (LENGTH, RANK, "all-linear")
        assert 24 <= len(plan.streamed) <= 32
        assert plan.needs_gib < VRAM_GIB


def test_a_step_lasts_from_the_end_of_the_one_before_without_the_first_two():
    assert step_seconds([0.0, 9.0, 10.0, 12.0, 13.0]) == 1.0


def test_the_report_holds_each_against_the_best_of_soup(tmp_path):
    ok = {"status": "ok", "dtype": "bf16", "allocated": 2.5, "reserved": 3.0}
    lines = [
        {"contestant": "Soup", "rows": 1, "tokens": 512.0, "step_s": 2.0} | ok,
        {"contestant": "Soup, chunks", "rows": 4, "tokens": 2048.0, "step_s": 4.0} | ok,
        {"contestant": LLAMANB, "rows": 4, "tokens": 2048, "step_s": 0.5} | ok,
        {"contestant": LLAMANB, "rows": 8, "status": "out of memory: x | y", "step_s": None},
        {"contestant": "Soup", "rows": 2, "status": "out of memory"},
    ]
    (tmp_path / "out").write_text("\n".join(map(json.dumps, lines)))
    text = report(tmp_path / "out").splitlines()
    assert text[2] == "| llamanb | 4 | bf16 | 2.5 | 3.0 | 0.5 | 4096 | 8.00× |"
    assert "| Soup | 1 | bf16 | 2.5 | 3.0 | 2.0 | 256 | 0.50× |" in text
    assert "| Soup | 2 | out of memory |  |  |  |  |  |" in text
    assert text[-1] == "Best of each within 3.65 GiB: 4096 and 512 tokens/s, 8.0×."
    assert {row.count("|") for row in text[:-2]} == {9}


class Played(streaming_peer.Turn):
    """A turn without a process, which runs out of memory from four rows on."""

    def __init__(self, name, rows, work, checkpoint, soup_site):
        self.name, self.rows, self.folder = name, rows, Path(tempfile.mkdtemp(dir=work))
        (self.folder / "log").write_text("fine\n" if rows < 4 else "│ torch.OutOfMemoryError: CUDA out of memory. │\n")

    waits = True

    def take(self, limit_s):
        return {"status": self._why(True, limit_s), "wall_s": 0.0}

    def end(self):
        pass


def test_no_more_rows_are_tried_than_those_that_were_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming_peer, "Turn", Played)
    turns = [("Soup", 1), ("Soup", 4), ("Soup", 8), ("Soup", 2), ("Soup, chunks", 8)]
    streaming_peer.run(tmp_path / "out", tmp_path, "", 100.0, turns)
    said = [json.loads(line)["status"] for line in (tmp_path / "out").read_text().splitlines()]
    lack = "out of memory: torch.OutOfMemoryError: CUDA out of memory."
    assert said == ["fine", lack, "not run: 4 rows were too many", "fine", lack]
    streaming_peer.run(tmp_path / "out", tmp_path, "", 1.0, turns[:1])
    assert json.loads((tmp_path / "out").read_text().splitlines()[-1])["status"] == "not run: no time left"


def test_soups_process_imports_nothing_of_llamanb():
    code = "import sys, benchmarks.streaming_peer; print([name for name in sys.modules if name.startswith('llamanb')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
