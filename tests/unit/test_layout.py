"""A plan as it is shown and kept; how it is chosen is tests/unit/test_planner.py's."""

import json
from dataclasses import replace

import pytest

from llamanb import Card, Recipe, plan, planner
from llamanb.layout import GIB, Plan, _duration

EIGHT = "meta-llama/Llama-3.1-8B-Instruct"


@pytest.fixture(autouse=True)
def measured_versions(monkeypatch):
    monkeypatch.setattr(planner, "_other_versions", lambda: ())


@pytest.fixture
def made():
    return plan(Recipe(model=EIGHT, steps=100, max_length=2048), "RTX 3060")


def test_a_plan_fits_where_it_needs_no_more_than_there_is_to_plan_with(made):
    assert made.fits
    assert made.replace(limit_gib=made.needs_gib).fits
    assert not made.replace(limit_gib=made.needs_gib - 0.01).fits
    assert made.replace(limit_gib=None).fits == (made.needs_gib <= made.card.free_gib)


def test_the_table_has_every_choice_with_its_reason(made):
    cells = {row[0]: row[1:] for row in made.table().rows}
    assert list(cells) == [
        "arithmetic",
        "optimizer step",
        "activations",
        "attention",
        "layers",
        "optimizer",
        "memory",
        "time",
        "predicted from",
    ]
    assert cells["optimizer step"][0] == f"{made.accumulation} × {made.micro_batch_size} rows of up to 2048 tokens"
    assert 0 < made.recomputed < 32
    assert f"{made.recomputed} layers kept but for the MLP's, which are recomputed" in cells["activations"][0]
    assert f"{32 - made.recomputed} layers kept for the backward pass" in cells["activations"][0]
    assert cells["layers"][0] == "fused"
    assert cells["memory"][0] == f"{made.needs_gib:.2f} of {made.limit_gib:.2f} GiB"
    assert made.memory.instant in cells["memory"][1]
    assert cells["time"][1].endswith("for 100 steps")
    assert all(why for name, (_, why) in cells.items() if name != "predicted from")


def test_the_bar_ends_where_the_plan_does(made):
    bar = made.bar()
    assert bar.total == pytest.approx(made.needs_gib + made.card.context_gib)
    assert made.limit_gib < made.card.free_gib
    assert bar.limit == pytest.approx(made.limit_gib + made.card.context_gib)
    assert f"{made.card.free_gib - made.limit_gib:.2f} GiB of the card are left" in bar.caption
    assert list(bar.parts)[-2:] == ["fragmentation", "CUDA context"]
    assert made.memory.instant in bar.caption


def test_a_card_of_unknown_context_has_none_in_the_bar(made):
    assert "CUDA context" not in str(made.replace(card=Card("x", (8, 6), 12.0)).bar())


def test_other_layouts_are_listed_with_why_they_were_not_taken(made):
    rows = made.others().rows
    assert [row[0] for row in rows] == [n for n in (16, 8, 4, 2, 1) if n != made.micro_batch_size]
    assert all("slower" in row[-1] or "GiB more" in row[-1] for row in rows)
    assert made.replace(alternatives=()).others() is None


def test_all_pieces_are_shown(made):
    for piece in (made.table(), made.bar(), made.others()):
        assert str(piece) in str(made)
        assert piece._repr_html_() in made._repr_html_()


def test_a_plan_for_a_cpu_has_no_predictions():
    made = plan(Recipe(max_length=512), Card("CPU", None))
    assert (made.memory, made.time, made.bar(), made.others()) == (None, None, None, None)
    assert (made.needs_gib, made.step_s, made.fits) == (None, None, True)
    assert made._repr_html_() == made.table()._repr_html_()
    assert "kept for the backward pass" in str(made)
    assert not made.fused
    assert "as transformers and peft have them" in str(made)


def test_time_is_counted_for_the_run_or_for_a_thousand_rows(made):
    def words(**changes):
        return made.replace(**changes)._run_time()

    assert words(steps=None).endswith("for 1,000 rows of 2048")
    assert "ends it at" not in words()
    short = replace(made.recipe, stop_after_min=2.0)
    share = 120 / (100 * made.step_s)
    assert words(recipe=short).endswith(f"stop_after_min = 2 ends it at about {share:.0%}")
    assert "ends it at" not in words(recipe=short, steps=1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "12 ms"),
        (1, "1.0 s"),
        (119, "119.0 s"),
        (120, "2 min"),
        (7199, "120 min"),
        (7200, "2.0 h"),
        (90000, "25.0 h"),
    ],
)
def test_durations_have_the_unit_a_person_would_use(seconds, text):
    assert _duration(seconds) == text


def test_hostile_names_show_as_text(made):
    hostile = "<script>alert(1)</script>"
    html = made.replace(card=replace(made.card, name=hostile), recipe=replace(made.recipe, model=hostile))._repr_html_()
    assert "<script" not in html


def test_json_is_plain_and_read_back_whole(made):
    text = made.to_json()
    assert json.loads(text)["memory"]["peaks"] == made.memory.peaks
    again = Plan.from_json(text)
    assert again == made
    assert again.needs_gib == made.memory.reserved / GIB
    assert str(again) == str(made)
