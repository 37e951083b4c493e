"""What a card can train, and what would fit where a recipe does not."""

from dataclasses import replace

import pytest

from llamanb import Card, Recipe, planner
from llamanb.advice import CONTEXT_GIB, STEP, changes_that_fit, does_not_fit, fitting
from llamanb.architecture import architecture
from llamanb.memory import _replayed
from llamanb.planner import search, smallest_fits
from llamanb.reach import METHODS, trainable

EIGHT, ONE = "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"
SEVENTY = "meta-llama/Llama-3.3-70B-Instruct"
CARDS = ("T4", "RTX 3060", "RTX 4090", "H200")


@pytest.fixture(autouse=True)
def measured_versions(monkeypatch):
    monkeypatch.setattr(planner, "_other_versions", lambda: ())


def resident(model: str, **fields) -> Recipe:
    return Recipe(model=model, weights="resident", **fields)


def reach(card: str) -> dict[str, dict[str, int]]:
    """Longest row with all weights on the card, by method and model, the smallest model first; 0 for none."""
    table = trainable(card)
    return {
        method: {row[0]: int(row[i].replace(",", "")) if row[i].replace(",", "").isdigit() else 0 for row in table.rows}
        for i, method in enumerate(table.headers[2:], 2)
    }


def test_what_a_t4_can_train():
    found = reach("T4")
    assert list(found) == list(METHODS)
    assert found["qlora-nf4"]["Llama-3.1-8B-Instruct"] > 8192
    assert found["lora"]["Llama-3.1-8B-Instruct"] == 0
    assert found["full"]["Llama-3.2-1B-Instruct"] == 0
    assert not any(lengths["Llama-3.3-70B-Instruct"] for lengths in found.values())
    assert "14.40 GiB" in trainable("T4").caption


def test_what_a_card_can_train_with_weights_in_host_memory():
    (row,) = (row for row in trainable("T4").rows if "70B" in row[0])
    assert row[3:] == ["no"] * 3
    assert row[2].endswith(" streamed")
    longest = int(row[2].split()[0].replace(",", ""))
    recipe = Recipe(model=SEVENTY, max_length=longest, effective_batch_size=1)
    assert planner.plan(recipe, "T4").streamed
    assert "weights wait in host memory" in trainable("T4").caption
    assert "streamed" not in str(trainable("H200"))
    little = trainable(replace(Card.known("T4"), host_gib=12.0))
    assert "streamed" not in str(little)
    assert any(cell.endswith(" from disk") for row in little.rows for cell in row)
    assert "weights wait on disk as well, which is slow" in little.caption
    assert "from disk" not in str(trainable(replace(Card.known("T4"), host_gib=12.0, disk_gib=10.0)))


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
    recipe = resident(name, method=method, effective_batch_size=1, checkpointing="all")
    assert smallest_fits(recipe.replace(max_length=longest), card, model)
    assert not smallest_fits(recipe.replace(max_length=longest + STEP), card, model)
    assert fitting(recipe.replace(max_length=longest, checkpointing="auto"), card, model)


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
    recipe, card, model = resident(EIGHT, max_length=60_000), Card.known("RTX 3060"), architecture(EIGHT)
    [length] = [
        int(row[0].split(" = ")[1])
        for row in changes_that_fit(recipe, card, model).rows
        if row[0].startswith("max_length")
    ]
    assert length % STEP == 0
    assert fitting(recipe.replace(max_length=length), card, model)
    assert not fitting(recipe.replace(max_length=round(1.03 * length)), card, model)


def test_the_next_larger_card_is_offered():
    recipe = resident(SEVENTY)
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


def test_a_shorter_max_length_is_shorter_than_what_was_asked_for():
    """Also where trials showed what the prediction did not: else the same length would be offered again."""
    recipe, card, model = Recipe(model=EIGHT, max_length=1024), Card.known("T4"), architecture(EIGHT)
    made = search(recipe, card, model)
    error = does_not_fit(made.replace(limit_gib=1.0), model, rehearsed=True)
    offered = [row[0] for row in error.changes.rows if row[0].startswith("max_length")]
    assert offered == ["max_length = 896"]
    assert error.fix.startswith(error.changes.rows[0][0])
    assert "predicted, not rehearsed" in error.fix
    assert "rehearsed" not in does_not_fit(made.replace(limit_gib=1.0), model).fix


def test_bf16_is_offered_no_card_without_it():
    recipe = Recipe(model=EIGHT, precision="bf16", method="lora")
    rows = changes_that_fit(recipe, Card.known("RTX 3080 10"), architecture(EIGHT)).rows
    assert Card.known(rows[-1][0].removeprefix("a larger card: ")).dtype == "bf16"


def refusal(recipe: Recipe, card: Card) -> planner.DoesNotFitError:
    with pytest.raises(planner.DoesNotFitError) as caught:
        planner.plan(recipe, card)
    return caught.value


def test_memory_that_is_taken_is_told_and_offered_where_it_would_be_enough():
    whole = Card.known("T4")
    taken = replace(whole, free_gib=whole.free_gib - 10)
    found = refusal(resident(EIGHT, max_length=2048), taken)
    assert "10.00 of the card's 14.56 GiB were taken before" in found.why
    assert found.fix == found.changes.rows[0][0]
    assert found.fix.startswith("free the 10.00 GiB that other processes hold")
    assert found.changes.rows[0][1] == f"{planner.plan(Recipe(model=EIGHT, max_length=2048), whole).needs_gib:.2f} GiB"
    never = refusal(resident(SEVENTY), taken)
    assert "were taken before" in never.why
    assert not any("free the" in row[0] for row in never.changes.rows)


@pytest.mark.parametrize("card", [Card.known("T4"), Card("T4", (7, 5), 14.56, 14.56 - CONTEXT_GIB - 0.7)])
def test_a_context_and_a_little_more_is_nobodys_fault(card):
    found = refusal(resident(SEVENTY), card)
    assert "taken" not in found.why


def offered(recipe: Recipe, card: str, host_gib: float | None = None) -> dict[str, list]:
    """The rest of each row by its change, where there is no disk."""
    machine = replace(Card.known(card), host_gib=host_gib, disk_gib=0.0)
    return {row[0]: row[1:] for row in refusal(recipe, machine).changes.rows}


def test_streaming_is_offered_with_its_numbers():
    made = planner.plan(Recipe(model=SEVENTY), "RTX 4090")
    costs = "time, where copies do not hide; 34.8 GiB of weights wait in host memory"
    assert offered(resident(SEVENTY), "RTX 4090")["weights = 'streamed'"] == [f"{made.needs_gib:.2f} GiB", costs]


@pytest.mark.parametrize("fields", [{"dropout": 0.1}, {"dora": True}])
def test_what_keeps_weights_from_streaming_is_named(fields):
    first, *_ = offered(Recipe(model=SEVENTY, **fields), "RTX 4090")
    assert first == "dropout = 0, dora = False"


def test_streaming_is_not_offered_to_what_cannot_stream():
    assert not any("streamed" in change for change in offered(Recipe(model=SEVENTY, method="lora"), "RTX 4090"))
    assert not any("streamed" in change for change in offered(resident(SEVENTY, dropout=0.1), "RTX 4090"))


def test_host_memory_that_would_be_enough_is_offered():
    found = offered(Recipe(model=SEVENTY, rank=8, max_length=2048), "T4", 12.7)
    assert found["37 GiB of free host memory"][0].endswith(" GiB")
    assert planner.plan(Recipe(model=SEVENTY, rank=8, max_length=2048), "T4", host_gib=37).fits
    assert not any("host memory" in change for change in offered(resident(SEVENTY), "T4", 12.7))


def test_a_refusal_replays_few_tapes():
    _replayed.cache_clear()
    refusal(Recipe(model=EIGHT, max_length=131072), Card.known("T4"))
    assert _replayed.cache_info().misses < 8, "each takes 60 ms: there were 34"


def test_a_cpu_has_no_table_and_is_told_so():
    table = trainable(Card("CPU", None))
    assert table.rows == []
    assert "a CPU" in table.caption
