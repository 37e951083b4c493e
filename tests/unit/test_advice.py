"""What a card can train, and what would fit where a recipe does not."""

import pytest

from llamanb import Card, Recipe, planner
from llamanb.advice import STEP, TABLE_METHODS, changes_that_fit, fitting, trainable
from llamanb.architecture import architecture
from llamanb.planner import smallest_fits

EIGHT, ONE = "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"
CARDS = ("T4", "RTX 3060", "RTX 4090", "H200")


@pytest.fixture(autouse=True)
def measured_versions(monkeypatch):
    monkeypatch.setattr(planner, "_other_versions", lambda: ())


def reach(card: str) -> dict[str, dict[str, int]]:
    """Longest row by method and model, the smallest model first; 0 for none."""
    table = trainable(card)
    return {
        method: {row[0]: 0 if row[i] == "no" else int(row[i].replace(",", "")) for row in table.rows}
        for i, method in enumerate(table.headers[2:], 2)
    }


def test_what_a_t4_can_train():
    found = reach("T4")
    assert list(found) == list(TABLE_METHODS)
    assert found["qlora-nf4"]["Llama-3.1-8B-Instruct"] > 8192
    assert found["lora"]["Llama-3.1-8B-Instruct"] == 0
    assert found["full"]["Llama-3.2-1B-Instruct"] == 0
    assert not any(lengths["Llama-3.3-70B-Instruct"] for lengths in found.values())
    assert "14.40 GiB" in trainable("T4").caption


@pytest.mark.parametrize("card", CARDS)
def test_a_larger_model_has_no_longer_rows(card):
    for lengths in reach(card).values():
        assert list(lengths.values()) == sorted(lengths.values(), reverse=True)


def test_a_larger_card_has_no_shorter_rows():
    small, large = reach("T4"), reach("RTX 4090")
    assert all(large[method][model] >= small[method][model] for method in small for model in small[method])


@pytest.mark.parametrize(("method", "name"), [("qlora-nf4", EIGHT), ("lora", ONE)])
def test_the_row_fits_and_a_longer_one_does_not(method, name):
    card, model = Card.known("T4"), architecture(name)
    longest = reach("T4")[method][name.split("/")[1]]
    recipe = Recipe(model=name, method=method, effective_batch_size=1)
    assert smallest_fits(recipe.replace(max_length=longest), card, model)
    assert not smallest_fits(recipe.replace(max_length=longest + STEP), card, model)
    assert fitting(recipe.replace(max_length=longest), card, model)


def test_no_row_is_longer_than_the_models_positions():
    assert set(reach("H200")["qlora-nf4"].values()) <= {*range(0, 131072 + 1, STEP)}
    assert reach("H200")["qlora-nf4"]["Llama-3.1-8B-Instruct"] == 131072


def test_changes_are_listed_by_what_they_cost():
    recipe = Recipe(
        model=EIGHT,
        checkpointing="none",
        micro_batch_size=4,
        double_quant=False,
        rank=64,
        max_length=2048,
        method="lora",
    )
    changes = [row[0].split(" = ")[0] for row in changes_that_fit(recipe, Card.known("L4"), architecture(EIGHT)).rows]
    order = ["checkpointing", "micro_batch_size", "max_length", "rank", "targets", "method", "model"]
    *changes, card = changes
    assert list(dict.fromkeys(changes)) == [change for change in order if change in changes]
    assert len(changes) > 1
    assert card.startswith("a larger card: ")


def test_the_longest_row_that_fits_is_offered():
    recipe, card, model = Recipe(model=EIGHT, max_length=60_000), Card.known("RTX 3060"), architecture(EIGHT)
    [length] = [
        int(row[0].split(" = ")[1])
        for row in changes_that_fit(recipe, card, model).rows
        if row[0].startswith("max_length")
    ]
    assert fitting(recipe.replace(max_length=length), card, model)
    assert not fitting(recipe.replace(max_length=length + STEP), card, model)


def test_the_next_larger_card_is_offered():
    recipe = Recipe(model="meta-llama/Llama-3.3-70B-Instruct")
    model = architecture(recipe.model)
    change = changes_that_fit(recipe, Card.known("RTX 4090"), model).rows[-1][0]
    offered = Card.known(change.removeprefix("a larger card: "))
    assert offered.free_gib > Card.known("RTX 4090").free_gib
    assert fitting(recipe, offered, model)


def test_nothing_is_offered_where_nothing_helps():
    recipe = Recipe(model="meta-llama/Llama-3.1-405B", method="full", max_length=131072)
    assert changes_that_fit(recipe, Card.known("T4"), architecture(recipe.model)).rows == []
    with pytest.raises(planner.DoesNotFitError, match="no single change is enough"):
        planner.plan(recipe, "T4")


def test_a_cpu_has_no_table_and_is_told_so():
    table = trainable(Card("CPU", None))
    assert table.rows == []
    assert "a CPU" in table.caption
