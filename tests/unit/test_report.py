"""The page of a run: whole, in need of nothing beside it, and proof against what models and rows may say."""

import dataclasses
import json
import shlex
from html.parser import HTMLParser

import pytest

from llamanb import Card, Recipe, plan, train
from llamanb.layout import GIB
from llamanb.report import again, buckets_table, peaks_table, report, times_table, write_report
from llamanb.run import RUNNING, Run, show_run
from llamanb.tape import BUCKETS
from llamanb.timeline import Timeline
from tests.unit.fake_run import BUCKETS_GIB, PEAKS_GIB, run_on_a_t4

pytestmark = pytest.mark.whole

SECTIONS = ["Plan", "Planned and measured", "Memory over time", "Loss", "Before and after", "Recipe", "Versions"]
SECTIONS += ["The same again"]
HOSTILE = [
    "<script>alert(1)</script>",
    "'><img src=http://evil.example/x onerror=alert(1)>",
    '"></title></style><iframe src="//evil.example">',
    "$\\(\\href{javascript:alert(1)}{x}\\)$",
    "\x1b[31mred\u202etxet",
    "&lt;b&gt; & <!-- ]]>",
]


class Page(HTMLParser):
    """A page taken apart; every element must be closed in its place."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.headings, self.title, self.text = [], [], [], "", ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "h2":
            self.headings.append("")
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "h2" in self._open:
            self.headings[-1] += data
        elif "title" in self._open:
            self.title += data
        elif "style" not in self._open:
            self.text += data


def self_contained(page: Page) -> None:
    """Nothing is fetched, nothing runs, nothing leads away."""
    allowed = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "div", "span", "table", "caption"}
    assert set(page.tags) <= allowed | {"thead", "tbody", "tr", "th", "td", "img"}
    for tag, name, value in page.attributes:
        assert name in {"style", "title", "lang", "charset", "name", "content", "alt", "src", "role", "aria-label"}, tag
        if name == "src":
            assert value.startswith("data:image/png;base64,")
        if name == "style":
            assert "url(" not in value


@pytest.fixture
def run(tmp_path) -> Run:
    return run_on_a_t4(tmp_path)


def test_a_page_has_every_section_in_order(run):
    page = Page(report(run))
    assert page.headings == SECTIONS
    assert page.title == f"{run.folder.name}: meta-llama/Llama-3.2-1B-Instruct"
    self_contained(page)


def test_a_page_says_what_was_planned_measured_and_learned(run):
    page = Page(report(run))
    for words in ("5 steps in 2 s", "on T4", "loss per token", "exact match", "100%", "max_length", "2.11.0"):
        assert words in page.text, words
    alternatives = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert alternatives == [repr(run.peaks_plot), repr(run.memory_plot), repr(run.loss_plot)]


def test_the_file_is_utf8_and_says_so(run):
    path = write_report(run)
    assert path == run.folder / "report.html"
    text = path.read_bytes().decode("utf-8")
    assert text.startswith("<!doctype html>")
    assert "charset='utf-8'" in text
    assert "×" in text
    assert ("report.html", "all of this on one page") in [tuple(row) for row in run.files().rows]


def test_a_page_can_be_made_from_the_folder_alone(run):
    assert report(show_run(run.folder)) == report(run)


def test_parts_are_compared_one_by_one(run):
    rows = {name: values for name, *values in peaks_table(run).rows}
    assert set(rows) == {"load", "forward", "loss", "backward", "optimizer step"}, "no plan is made for scoring"
    planned = run.plan.memory.parts
    for part, (foreseen, measured, difference) in rows.items():
        assert foreseen == f"{planned[part] / GIB:.2f}"
        assert measured == f"{PEAKS_GIB[part]:.2f}"
        assert difference == f"{PEAKS_GIB[part] / (planned[part] / GIB) - 1:+.1%}"


def test_a_step_and_what_it_waits_for_are_compared(run):
    assert times_table(run).rows == [["a step", f"{run.plan.step_s:.3f}", "0.400"]]
    time = dataclasses.replace(run.plan.time, stall_s=0.5)
    run.timeline.steps[:] = [step._replace(stall_s=0.1 * step.step) for step in run.timeline.steps]
    streamed = run.replace(plan=run.plan.replace(streamed=(0, 1), time=time))
    assert times_table(streamed).rows[1] == ["of it, waiting for weights", "0.500", "0.350"]
    assert "of it, waiting for weights" in report(streamed)


def test_only_parts_that_were_seen_are_compared(run):
    seen = run.replace(timeline=Timeline("fake", peaks_gib={"load": 1.0}), buckets_gib={})
    assert [row[0] for row in peaks_table(seen).rows] == ["load"]
    assert "Planned and measured" in Page(report(seen)).headings


def test_buckets_add_up_to_the_highest_peak_of_a_step(run):
    *lasting, rest = buckets_table(run).rows
    assert [row[0] for row in lasting] == [*BUCKETS_GIB]
    assert rest[0] == ", ".join(name for name in BUCKETS if name not in BUCKETS_GIB)
    measured = sum(float(row[2]) for row in (*lasting, rest))
    assert measured == pytest.approx(max(PEAKS_GIB[part] for part in run.plan.memory.parts), abs=0.005)
    planned = sum(float(row[1]) for row in (*lasting, rest))
    assert planned == pytest.approx(run.plan.memory.allocated / GIB, abs=0.005)


def test_a_peak_outside_of_a_step_is_none_of_its_buckets(run):
    """Scoring can take more than training."""
    scored = run.replace(timeline=Timeline("fake", peaks_gib=PEAKS_GIB | {"score": 9.0, "save": 8.0}))
    assert buckets_table(scored).rows == buckets_table(run).rows


@pytest.mark.parametrize("text", HOSTILE)
def test_what_models_rows_and_answers_say_stays_text(tmp_path, text):
    folder = tmp_path / "run"
    folder.mkdir()
    name = "".join(c for c in text if c.isprintable())  # a recipe refuses the rest
    run = run_on_a_t4(folder, model=name, dataset=name, question=text, answer=text)
    page = Page(write_report(run).read_text(encoding="utf-8"))
    self_contained(page)
    assert page.headings == SECTIONS
    assert page.title == f"run: {name}"
    shown = text.replace("\x1b", "\ufffd").replace("\u202e", "\ufffd")
    assert page.text.count(shown) >= 4, "the question, and the answer three times"
    assert "\x1b" not in page.text
    assert "\u202e" not in page.text


def test_so_does_what_a_run_says_of_itself(run):
    for text in HOSTILE:
        timeline = Timeline(text, missing=text, peaks_gib=run.timeline.peaks_gib)
        hostile = run.replace(status=text, versions={text: text}, timeline=timeline)
        self_contained(Page(report(hostile)))


def test_the_command_is_one_a_shell_takes(tmp_path):
    folder = tmp_path / "my runs; $(touch x) 'quoted'"
    folder.mkdir()
    run = run_on_a_t4(folder)
    words = shlex.split(again(run).splitlines()[0])
    assert words[0] == "papermill"
    assert words[words.index("recipe_file") + 1] == str(folder / "recipe.json")


def test_a_run_that_did_not_end_has_a_page_of_what_there_is(run):
    there = run.replace(timeline=Timeline("fake"), scores=None, status=RUNNING, train_s=0.0, buckets_gib={})
    page = Page(report(there))
    assert page.headings == [name for name in SECTIONS if name not in ("Planned and measured", "Before and after")]
    assert "(running)" in page.text
    self_contained(page)


def test_training_leaves_a_page(mini, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"instruction": f"Say {n}.", "output": f"It is {n}."}) for n in range(8)))
    recipe = Recipe(model=str(mini), dataset=str(rows), max_length=64, effective_batch_size=4, steps=2, eval_rows=2)
    run = train(plan(recipe, Card("CPU", None)), name="mine", runs=tmp_path / "runs")
    page = Page((run.folder / "report.html").read_text(encoding="utf-8"))
    self_contained(page)
    assert page.headings == [name for name in SECTIONS if name != "Planned and measured"], "no memory is planned here"
    assert page.title == f"mine: {mini}"
    assert "2 steps in" in page.text
