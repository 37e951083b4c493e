"""Rehearsals without a GPU: what trials found is made up, and how it is carried to the plan's depth is checked. (Real
trials on a CPU: test_trial.py.)"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from llamanb import Card, Recipe, plan, rehearsal
from llamanb.architecture import architecture
from llamanb.errors import GpuError, RecipeError
from llamanb.layout import GIB
from llamanb.memory import SEEN, predict
from llamanb.planner import MARGIN_REHEARSED, DoesNotFitError, search, workload_of
from llamanb.rehearsal import _Trial, rehearse
from llamanb.search import recomputed_steps, ways
from llamanb.tape import CHECKPOINTED, HALVED, OFFLOADED, STORED

EIGHT, ONE = "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"
CPU = Card("CPU", None)
MIB = 2**20
NOTHING = dict.fromkeys(SEEN, 0)


def planned(name=EIGHT, rows=4, card="T4", accumulation=4, force=False, **fields):
    """A plan for a card of the table, and its workload."""
    recipe = Recipe(
        model=name,
        dataset="rows.jsonl",
        micro_batch_size=rows,
        effective_batch_size=rows * accumulation,
        **{"max_length": 1024, **fields},
    )
    made = search(recipe, Card.known(card) if isinstance(card, str) else card, architecture(name), force=force)
    return made, work_of(made)


def work_of(made):
    return workload_of(made, architecture(made.recipe.model))


def trial(work, layers, *, constant=NOTHING, each=NOTHING, beyond=0, micro_s=0.1, optimizer_s=0.02):
    """What a run of `layers` would find if it took that much more than predicted: `constant` bytes by part, `each` by
    part and kind of layer (or as a number, whatever the kind), `beyond` of reserved memory; and its times."""
    small = predict(rehearsal._with_layers(work, layers).replace(accumulation=min(work.accumulation, 2)))
    peaks = {
        part: max(small.peaks.get(i, 0) for i in instants) + constant[part] + missed(each[part], layers)
        for part, instants in SEEN.items()
    }
    return _Trial(
        layers=layers,
        peaks=peaks,
        reserved=max(peaks.values()) + small.gaps + beyond,
        micro_batch_s=micro_s,
        optimizer_s=optimizer_s,
    )


def missed(each, layers):
    return sum((each[kind] if isinstance(each, dict) else each) for kind in layers)


def layouts(made, work):
    return rehearsal._small_layouts(made, work)


def counted(layers):
    return {kind: layers.count(kind) for kind in sorted(set(layers))}


KINDS = [({}, (CHECKPOINTED, HALVED, STORED)), ({"dropout": 0.1}, (CHECKPOINTED, STORED))]
"""Fields of a recipe, and the kinds of layers that its plan may have: fused layers can be halved."""


@pytest.mark.parametrize(("fields", "kinds"), KINDS)
def test_mixed_plans_are_tried_with_more_of_each_kind(fields, kinds):
    made, work = planned(**fields)
    assert len(set(made.layers)) == 2
    assert set(made.layers) < {*kinds, HALVED}
    base, *deeper = layouts(made, work)
    assert set(base) == set(kinds)
    assert len({base.count(kind) for kind in kinds}) == 1
    assert len(deeper) == len(kinds)
    for layers, kind in zip(deeper, kinds, strict=True):
        assert layers.count(kind) > base.count(kind)
        assert all(layers.count(other) == base.count(other) for other in kinds if other != kind)
    as_in_a_plan = [sorted(layers, key=kinds.index) for layers in (base, *deeper)]
    assert [list(layers) for layers in (base, *deeper)] == as_in_a_plan, "what is recomputed most comes first"


@pytest.mark.parametrize(("fields", "kinds"), KINDS)
def test_a_plan_that_keeps_every_layer_is_tried_with_recomputed_ones_too(fields, kinds):
    made, work = planned(ONE, rows=1, **fields)
    assert set(made.layers) == {STORED}
    assert all(set(layers) == set(kinds) for layers in layouts(made, work)), "some may have to be"


def test_a_plan_that_trials_show_not_to_fit_is_refused(gpu, monkeypatch):
    gpu()
    made, work = planned(ONE, rows=1)
    much = dict.fromkeys(SEEN, 16 * 1024 * MIB)
    monkeypatch.setattr(rehearsal, "_try", lambda plan, shape, layers, seconds: trial(work, layers, constant=much))
    with pytest.raises(DoesNotFitError, match="needs") as caught:
        rehearse(made)
    assert caught.value.plan.memory.reserved > 16 * 1024 * MIB
    assert "what would fit is predicted, not rehearsed" in caught.value.fix


@pytest.mark.parametrize(("wanted", "kind"), [("all", CHECKPOINTED), ("none", STORED), ("offloaded", OFFLOADED)])
def test_layers_as_asked_are_tried_alone(wanted, kind):
    made, work = planned(ONE, checkpointing=wanted)
    found = layouts(made, work)
    assert len(found) == 2
    assert all(set(layers) == {kind} for layers in found)
    assert len(found[1]) > len(found[0])


def test_automatic_plans_try_what_they_could_keep_too():
    made, _ = planned(ONE, rows=8)
    for kind in (CHECKPOINTED, HALVED):
        every = made.replace(layers=(kind,) * len(made.layers))
        assert set(layouts(every, work_of(every))[0]) == {CHECKPOINTED, HALVED, STORED}
    waiting = made.replace(layers=(OFFLOADED,) * len(made.layers))
    assert set(layouts(waiting, work_of(waiting))[0]) == {OFFLOADED}, "where nothing else fits"


@pytest.mark.parametrize("free_gib", [14.0, 8.0, 6.0, 5.0, 4.5, 4.0])
def test_trials_are_as_deep_as_fits(free_gib):
    made, work = planned(rows=4)
    small = replace(made.card, free_gib=free_gib)
    limit = free_gib * GIB * (1 - MARGIN_REHEARSED)
    found = layouts(made.replace(card=small, limit_gib=None), work)

    def needs(layers):
        model = replace(work.model, layers=len(layers))
        return predict(work.replace(model=model, layers=layers)).reserved

    base, *deeper = found
    if STORED in base:
        assert all(needs(layers) <= limit for layers in found)
    for layers in deeper:
        one_more = tuple(sorted([*layers, next(k for k in layers if layers.count(k) > base.count(k))]))
        assert len(layers) == len(base) + rehearsal.MORE or needs(one_more) > limit


def test_a_card_too_small_for_two_kinds_gets_the_smaller_one():
    made, work = planned(rows=4)
    tiny = made.replace(card=replace(made.card, free_gib=1.0), limit_gib=None)
    assert layouts(tiny, work) == [(CHECKPOINTED,), (CHECKPOINTED,) * 2]


def test_trials_as_predicted_change_nothing():
    made, work = planned(checkpointing="all")
    trials = [trial(work, layers) for layers in layouts(made, work)]
    again = rehearsal._corrected(made, work, trials)
    assert again.layers == made.layers
    assert again.memory == predict(work)
    assert "2 rehearsals" in again.basis
    assert again.recipe == made.recipe


@pytest.mark.parametrize("wanted", ["all", "none", "offloaded"])
def test_what_was_missed_is_carried_to_the_depth_of_the_plan(wanted):
    """A constant, and something of each layer, another for each part of the step."""
    made, work = planned(ONE, rows=2, checkpointing=wanted)
    constant = {"load": 0, "forward": 50 * MIB, "loss": 9 * MIB, "backward": -20 * MIB, "optimizer step": 3 * MIB}
    each = {"load": 0, "forward": 2 * MIB, "loss": 3 * MIB, "backward": 5 * MIB, "optimizer step": -MIB}
    trials = [trial(work, layers, constant=constant, each=each) for layers in layouts(made, work)]
    before, after = predict(work), rehearsal._corrected(made, work, trials).memory
    for part, instants in SEEN.items():
        for instant in instants:
            if part != "load" and instant in before.peaks:
                expected = constant[part] + len(work.layers) * each[part]
                assert after.peaks[instant] - before.peaks[instant] == pytest.approx(expected, abs=2), instant


def test_the_bar_adds_up_to_what_was_rehearsed():
    made, work = planned()
    more = {**dict.fromkeys(SEEN, 0), "backward": 300 * MIB}
    trials = [trial(work, layers, constant=more) for layers in layouts(made, work)]
    after = rehearsal._memory(work, trials)
    assert sum(after.buckets.values()) == after.allocated
    assert after.buckets["activations"] > predict(work).buckets["activations"]
    assert after.buckets["weights"] == predict(work).buckets["weights"]


@pytest.mark.parametrize("step", [10, 32, 50])
def test_each_kind_of_layer_is_carried_by_itself(step):
    made, work = planned()
    work = work.replace(layers=ways(len(work.layers), fused=True)[step])
    each = {part: {CHECKPOINTED: 3 * MIB, HALVED: 5 * MIB, STORED: 7 * MIB} for part in SEEN}
    trials = [trial(work, layers, constant=dict.fromkeys(SEEN, 11 * MIB), each=each) for layers in layouts(made, work)]
    before, after = predict(work), rehearsal._memory(work, trials)
    expected = 11 * MIB + missed(each["forward"], work.layers)
    assert expected > 11 * MIB + 3 * MIB * len(work.layers)
    for part, instants in SEEN.items():
        for instant in instants:
            if part != "load" and instant in before.peaks:
                assert after.peaks[instant] - before.peaks[instant] == pytest.approx(expected, abs=2), instant


def test_loading_is_not_corrected_since_random_weights_are_not_read():
    made, work = planned(checkpointing="all")
    trials = [trial(work, layers, constant={**NOTHING, "load": GIB}) for layers in layouts(made, work)]
    before, after = predict(work), rehearsal._corrected(made, work, trials).memory
    assert [after.peaks[i] for i in SEEN["load"]] == [before.peaks[i] for i in SEEN["load"]]


def test_what_is_reserved_beyond_the_prediction_counts_once():
    made, work = planned(checkpointing="all")
    few, more = layouts(made, work)
    before = predict(work)
    for beyond, expected in (((90 * MIB, 60 * MIB), 60 * MIB), ((-90 * MIB, 60 * MIB), 0)):
        trials = [trial(work, layers, beyond=size) for layers, size in zip((few, more), beyond, strict=True)]
        assert rehearsal._corrected(made, work, trials).memory.gaps - before.gaps == expected


def test_time_is_carried_linearly():
    made, work = planned(checkpointing="all")
    seconds = {CHECKPOINTED: 0.03}
    trials = [
        trial(work, one, micro_s=0.2 + missed(seconds, one), optimizer_s=0.05 + 0.001 * len(one))
        for one in layouts(made, work)
    ]
    again = rehearsal._corrected(made, work, trials)
    depth = len(work.layers)
    assert again.step_s == pytest.approx(made.accumulation * (0.2 + 0.03 * depth) + 0.05 + 0.001 * depth)


def test_time_knows_what_each_kind_costs():
    made, work = planned()
    seconds = {CHECKPOINTED: 0.04, HALVED: 0.035, STORED: 0.03}
    trials = [
        trial(work, one, micro_s=0.2 + missed(seconds, one), optimizer_s=0.05 + 0.001 * len(one))
        for one in layouts(made, work)
    ]
    again = rehearsal._corrected(made, work, trials)
    micro = 0.2 + missed(seconds, again.layers)
    assert again.step_s == pytest.approx(made.accumulation * micro + 0.05 + 0.001 * len(again.layers))


@pytest.mark.parametrize("fields", [{}, {"dropout": 0.1}, {"max_length": 3072}])
def test_more_is_kept_where_the_margin_allows_it(fields):
    made, work = planned(**fields)
    assert made.recomputed > 0
    again = rehearsal._corrected(made, work, [trial(work, layers) for layers in layouts(made, work)])
    limit = made.card.free_gib * (1 - MARGIN_REHEARSED)
    step = recomputed_steps(work_of(again))
    assert step < recomputed_steps(work)
    assert made.needs_gib < again.needs_gib <= limit
    one_less = ways(len(work.layers), fused=work.fused)[step - 1]
    assert predict(work.replace(layers=one_less)).reserved / GIB > limit


def test_what_was_missed_costs_kept_layers():
    made, work = planned()
    small = layouts(made, work)
    free = rehearsal._corrected(made, work, [trial(work, layers) for layers in small])
    constant = dict.fromkeys(SEEN, GIB)
    dear = rehearsal._corrected(made, work, [trial(work, layers, constant=constant) for layers in small])
    assert free.recomputed < dear.recomputed < len(made.layers)
    assert dear.needs_gib <= made.card.free_gib * (1 - MARGIN_REHEARSED)


@pytest.mark.parametrize("wanted", ["all", "none", "offloaded"])
def test_layers_as_asked_stay(wanted):
    made, work = planned(ONE, rows=2, checkpointing=wanted)
    for size in (-GIB, GIB):
        trials = [trial(work, one, constant=dict.fromkeys(SEEN, size)) for one in layouts(made, work)]
        assert rehearsal._corrected(made, work, trials).layers == made.layers


def test_a_single_trial_carries_its_constant():
    made, work = planned(checkpointing="all")
    again = rehearsal._corrected(made, work, [trial(work, (CHECKPOINTED,), constant=dict.fromkeys(SEEN, 10 * MIB))])
    assert again.memory.allocated - predict(work).allocated == 10 * MIB


@pytest.fixture
def gpu(monkeypatch):
    """`gpu(name, capability, gib)` is found by torch from then on."""

    def found(name="Tesla T4", capability=(7, 5), gib=14.56):
        properties = SimpleNamespace(
            name=name, major=capability[0], minor=capability[1], total_memory=round(gib * GIB), uuid=""
        )
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *args: properties)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: capability)

    return found


def test_rehearsing_tries_a_few_layers_and_corrects(gpu, monkeypatch):
    made, work = planned(ONE, rows=8, accumulation=2)
    gpu(gib=made.card.vram_gib)
    tried = []

    def fake(plan, shape, layers, seconds):
        tried.append((shape.name, layers))
        return trial(work, layers, constant=dict.fromkeys(SEEN, 64 * MIB))

    monkeypatch.setattr(rehearsal, "_try", fake)
    again = rehearse(made)
    assert tried == [(ONE, layers) for layers in layouts(made, work)]
    assert again.memory.allocated == pytest.approx(predict(work_of(again)).allocated + 64 * MIB, abs=2)
    assert again.time.measured_s > 0
    assert "on this GPU" in again.basis


def test_short_steps_are_tried_with_all_layers(gpu, monkeypatch):
    made, work = planned(ONE, rows=8, accumulation=2)
    gpu(gib=made.card.vram_gib)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    tried = []

    def fake(plan, shape, layers, seconds):
        tried.append((layers, seconds))
        more = 64 * MIB if len(layers) < shape.layers else 96 * MIB
        return replace(trial(work, layers, constant=dict.fromkeys(SEEN, more)), micro_batch_s=0.5, optimizer_s=0.25)

    monkeypatch.setattr(rehearsal, "_try", fake)
    assert rehearse(made).layers == made.layers
    assert all(len(layers) < 16 and seconds == rehearsal.ENOUGH_S for layers, seconds in tried), "a T4 takes longer"
    tried.clear()
    quick = made.replace(time=replace(made.time, measured_s=2 * rehearsal.SHORT_S))
    again = rehearse(quick)
    assert [seconds for _, seconds in tried] == [0.0] * (len(tried) - 1) + [rehearsal.ENOUGH_S]
    assert tried[-1][0] == again.layers
    assert len(again.layers) == 16
    assert again.memory.allocated == pytest.approx(predict(work_of(again)).allocated + 96 * MIB, abs=2)
    assert again.time.measured_s == 2 * 0.5 + 0.25
    assert "one with all 16" in again.basis


def test_without_a_gpu_it_says_where_to_rehearse(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made, _ = planned(ONE)
    with pytest.raises(GpuError, match="no GPU") as caught:
        rehearse(made)
    assert "T4" in caught.value.what
    assert "rehearse on the machine that will train" in caught.value.fix


def test_a_plan_for_a_cpu_is_not_rehearsed(mini):
    with pytest.raises(GpuError, match="plan is for a CPU") as caught:
        rehearse(plan(Recipe(model=str(mini), dataset="rows.jsonl"), CPU))
    assert caught.value.fix == "plan for a GPU"


@pytest.mark.parametrize(("name", "capability", "gib"), [("NVIDIA L4", (8, 9), 14.56), ("Tesla T4 32", (7, 5), 31.0)])
def test_another_gpu_than_the_plan_s_is_refused(gpu, name, capability, gib):
    gpu(name, capability, gib)
    made, _ = planned(ONE)
    with pytest.raises(GpuError) as caught:
        rehearse(made)
    assert "T4" in caught.value.what
    assert name in caught.value.why
    assert "pretend" in caught.value.fix


def test_a_plan_that_streams_is_tried_with_streamed_layers(gpu, monkeypatch):
    made, _ = planned(rows=1)
    made = made.replace(streamed=tuple(range(32)), time=replace(made.time, stall_s=1.5))
    work = work_of(made)
    gpu(gib=made.card.vram_gib)
    monkeypatch.setattr(rehearsal, "_try", lambda plan, shape, layers, seconds: trial(work, layers))
    again = rehearse(made)
    assert again.streamed == made.streamed
    assert again.time.stall_s == 1.5, "what goes into waiting is still predicted"
    assert again.memory == predict(work_of(again)), "nothing was missed"
    assert again.time.measured_s > 0
    with pytest.raises(RecipeError, match="streams some layers"):
        rehearse(made.replace(streamed=made.streamed[1:]))
    with pytest.raises(RecipeError, match="4 cards share its layers, and a trial runs on one"):
        rehearse(made.replace(shards=4, cards=4))


def test_a_pretended_card_is_rehearsed_on_whatever_is_there(gpu, monkeypatch):
    gpu("NVIDIA H200", (9, 0), 139.0)
    made, work = planned(ONE, checkpointing="all")
    monkeypatch.setattr(rehearsal, "_try", lambda plan, shape, layers, seconds: trial(work, layers))
    assert rehearse(made.replace(card=replace(made.card, computes_as=(9, 0)))).memory == predict(work)
