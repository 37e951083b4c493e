"""The search for a layout: ways from everything kept to everything recomputed, and what is taken of them."""

import itertools
from dataclasses import replace

import pytest

from llamanb import Card, Recipe
from llamanb import search as module
from llamanb.architecture import architecture
from llamanb.layout import GIB
from llamanb.memory import outline, predict
from llamanb.planner import workload
from llamanb.search import MOST_TRIED, fastest, fewest_recomputed, recomputed_steps, smallest, ways
from llamanb.tape import CHECKPOINTED, HALVED, OFFLOADED, STORED

EIGHT, ONE = "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"
RECOMPUTED = {STORED: 0, HALVED: 1, CHECKPOINTED: 2}


def asked(model=ONE, **fields) -> Recipe:
    return Recipe(model=model, **{"max_length": 1024, "weights": "resident", **fields})


def base_of(recipe, card="T4", fused=True, **changes):
    card = Card.known(card) if isinstance(card, str) else card
    settings = {"dtype": "fp16", "kernel": "memory-efficient", "optimizer": "paged_adamw_8bit"}
    base = workload(recipe, card, architecture(recipe.model), length=recipe.max_length, fused=fused, **settings)
    return base.replace(**changes)


def searched(recipe, card="T4", *, limit_gib=None, fused=True):
    card = Card.known(card)
    limit = (limit_gib or card.free_gib) * GIB
    return *fastest(recipe, card, base_of(recipe, card, fused), limit), limit


@pytest.mark.parametrize("depth", [1, 2, 16, 33])
@pytest.mark.parametrize("fused", [False, True])
def test_ways_lead_from_all_kept_to_all_recomputed_layer_by_layer(depth, fused):
    found = ways(depth, fused=fused)
    assert found[0] == (STORED,) * depth
    assert found[-1] == (CHECKPOINTED,) * depth
    assert len(found) == len(set(found)) == (2 if fused else 1) * depth + 1
    assert {kind for layers in found for kind in layers} == {STORED, CHECKPOINTED, *([HALVED] if fused else [])}
    for before, after in itertools.pairwise(found):
        [changed] = [i for i in range(depth) if before[i] != after[i]]
        assert RECOMPUTED[after[changed]] > RECOMPUTED[before[changed]]
        assert list(after) == sorted(after, key=RECOMPUTED.get, reverse=True), "the first layers come first"


@pytest.mark.parametrize("fields", [{}, {"method": "lora"}, {"targets": "attention"}, {"rank": 128}])
@pytest.mark.parametrize(("rows", "length"), [(1, 512), (8, 512), (1, 8192)])
@pytest.mark.parametrize("fused", [False, True])
def test_each_way_takes_no_more_memory_than_the_one_before(fused, rows, length, fields):
    base = base_of(asked(**fields, max_length=length), fused=fused, rows=rows)
    needed = [outline(base.replace(layers=layers)).allocated for layers in ways(16, fused=fused)]
    assert needed == sorted(needed, reverse=True)
    assert needed[-1] < needed[0]


@pytest.mark.parametrize("fused", [False, True])
def test_the_fewest_that_fit_are_recomputed(fused):
    base = base_of(asked(), fused=fused)
    found = ways(16, fused=fused)
    for step, layers in enumerate(found):
        fits = {one: i >= step for i, one in enumerate(found)}
        made = fewest_recomputed(base, lambda work, fits=fits: fits[work.layers])
        assert made == base.replace(layers=layers)
        assert recomputed_steps(made) == step


@pytest.mark.parametrize("fused", [False, True])
def test_where_nothing_fits_all_are_recomputed(fused):
    assert set(fewest_recomputed(base_of(asked(), fused=fused), lambda work: False).layers) == {CHECKPOINTED}


@pytest.mark.parametrize("least", [0, 5, 20, 32])
def test_steps_that_are_known_not_to_fit_are_not_asked_again(least):
    tried = []
    made = fewest_recomputed(base_of(asked()), lambda work: tried.append(recomputed_steps(work)) or True, least)
    assert recomputed_steps(made) == least
    assert min(tried, default=32) >= least


@pytest.mark.parametrize(("effective", "rows"), [(16, [16, 8, 4, 2, 1]), (7, [7, 1]), (6, [6, 3, 2, 1]), (1, [1])])
def test_micro_batches_divide_the_effective_batch(effective, rows):
    recipe = asked(effective_batch_size=effective)
    assert module._micro_batches(recipe, base_of(recipe)) == rows


def test_of_many_micro_batches_a_few_are_tried_and_none_beyond_what_a_card_takes():
    recipe = asked(effective_batch_size=720)
    tried = module._micro_batches(recipe, base_of(recipe))
    assert len(tried) == MOST_TRIED
    assert tried == sorted(tried, reverse=True)
    assert tried[-1] == 1
    assert tried[0] * 1024 <= module.MOST_TOKENS
    assert all(720 % rows == 0 for rows in tried)
    assert module._micro_batches(recipe.replace(micro_batch_size=5), base_of(recipe)) == [5]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("model", "length", "limit_gib"), [(EIGHT, 1024, 12), (EIGHT, 2048, 9.5), (ONE, 4096, 6)])
def test_what_is_taken_fits_and_nothing_that_fits_is_estimated_faster(model, length, limit_gib, fused):
    best, others, limit = searched(asked(model, max_length=length), limit_gib=limit_gib, fused=fused)
    assert best.memory == predict(best.work), "replayed"
    assert best.memory.reserved <= limit
    assert best.time.step_s == min(one.time.step_s for one in [best, *others] if one.memory.reserved <= limit)
    assert {one.work.rows * one.work.accumulation for one in [best, *others]} == {16}
    assert len({one.work.rows for one in [best, *others]}) == len([best, *others]) == 5


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("length", [512, 1024, 2048, 4096, 8192])
def test_one_step_less_would_not_fit_as_far_as_gaps_are_guessed(length, fused):
    best, _, limit = searched(asked(EIGHT, max_length=length), "RTX 3060", fused=fused)
    if step := recomputed_steps(best.work) if best.memory.reserved <= limit else 0:
        less = best.work.replace(layers=ways(32, fused=fused)[step - 1])
        assert module._guess(less).reserved > limit


def test_halved_layers_are_taken_before_whole_ones_are_recomputed():
    for limit_gib in (7.5, 8, 9, 10, 11, 12, 13):
        best, *_ = searched(asked(EIGHT, micro_batch_size=2), limit_gib=limit_gib)
        kinds = set(best.work.layers)
        assert not {STORED, CHECKPOINTED} <= kinds
        assert (best.steps == 0) == (kinds == {STORED})
        assert best.recomputed == sum(kind != STORED for kind in best.work.layers)


@pytest.mark.parametrize(("checkpointing", "kind"), [("none", STORED), ("all", CHECKPOINTED), ("offloaded", OFFLOADED)])
@pytest.mark.parametrize("limit_gib", [5, 12])
def test_layers_are_laid_out_as_asked_whether_they_fit_or_not(checkpointing, kind, limit_gib):
    recipe = asked(EIGHT, checkpointing=checkpointing, micro_batch_size=4)
    best, _, limit = searched(recipe, limit_gib=limit_gib)
    assert set(best.work.layers) == {kind}
    assert best.memory == predict(best.work)
    assert (best.memory.reserved <= limit) == (limit_gib == 12 and checkpointing != "none")


def test_where_nothing_fits_the_smallest_is_told_with_all_that_was_tried():
    best, others, limit = searched(asked(EIGHT), limit_gib=5)
    assert best.memory.reserved > limit
    assert best.work == smallest(asked(EIGHT), base_of(asked(EIGHT)), Card.known("T4"))
    assert (best.work.rows, set(best.work.layers)) == (1, {OFFLOADED})
    assert [one.work.rows for one in others] == [16, 8, 4, 2, 1]


def test_gaps_that_were_guessed_too_small_are_made_up_for(monkeypatch):
    """The replay finds 1 GiB more than was guessed: more is recomputed, until that fits too."""
    recipe = asked(EIGHT, micro_batch_size=2)
    before, _, limit = searched(recipe, limit_gib=11)

    def gaping(work):
        found = predict(work)
        return replace(found, gaps=found.gaps + GIB)

    monkeypatch.setattr(module, "predict", gaping)
    after, _, _ = searched(recipe, limit_gib=11)
    assert after.steps > before.steps
    assert after.memory.reserved <= limit
    assert after.memory == gaping(after.work)


def test_gaps_that_were_guessed_too_large_refuse_nothing(monkeypatch):
    recipe = asked(EIGHT, checkpointing="all", micro_batch_size=1)
    needed = predict(smallest(recipe, base_of(recipe), Card.known("T4")))
    limit_gib = (needed.reserved + 1) / GIB
    monkeypatch.setattr(module, "GAPS_LEAST", GIB)
    best, _, limit = searched(recipe, limit_gib=limit_gib)
    assert module._guess(best.work).reserved > limit >= best.memory.reserved


def test_without_a_speed_the_fewest_recomputed_win_and_then_the_fewest_micro_batches():
    unknown = replace(Card.known("T4"), tflops=None)
    recipe = asked(ONE, max_length=512)
    best, others = fastest(recipe, unknown, base_of(recipe), 14 * GIB)
    assert best.time is None
    assert best.recomputed == 0
    kept = [one.work.rows for one in others if one.memory.reserved <= 14 * GIB and not one.recomputed]
    assert best.work.rows > max(kept)
