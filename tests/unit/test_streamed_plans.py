"""Plans whose weights wait in host memory: what the card then holds, how long copies take, and how many layers wait."""

import dataclasses
import itertools
import json
import re

import pytest

from llamanb import Card, Recipe, plan
from llamanb.architecture import architecture
from llamanb.errors import HostMemoryError
from llamanb.layout import GIB
from llamanb.memory import outline, predict, tape_peaks
from llamanb.planner import DoesNotFitError, workload, workload_of
from llamanb.speed import step_time
from llamanb.streaming import HOST_GIB, TOKENS, WORTH, tokens_that_hide
from llamanb.tape import CHECKPOINTED, FORWARD, HALVED, LOAD, OFFLOADED, STORED, record_steady, spread, streamed_bytes
from llamanb.tape.workload import BUFFERS, EMBEDDINGS
from llamanb.training import train
from llamanb.training.recovery import smaller

EIGHT, SEVENTY = "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.3-70B-Instruct"


def streamed(model=SEVENTY, **more):
    return Recipe(**{"model": model, "max_length": 2048, "weights": "streamed", **more})


def work(depth=6, layers=None, length=512, **more):
    shape = dataclasses.replace(architecture(EIGHT), layers=depth)
    recipe, card = streamed(EIGHT), Card.known("RTX 4090")
    settings = {"dtype": "bf16", "kernel": "flash", "optimizer": "adamw_8bit", "length": length, "fused": True}
    made = workload(recipe, card, shape, **settings)
    return made.replace(layers=layers or (CHECKPOINTED,) * depth, **more)


@pytest.mark.parametrize("layers", [None, (STORED,) * 6, (HALVED, HALVED, CHECKPOINTED, STORED, STORED, STORED)])
@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_an_outline_is_what_a_whole_tape_comes_to(layers, count):
    """Carried on from two layers, without the load's: which is a little less than what is told."""
    one = work(layers=layers, streamed=count)
    found, whole = outline(one).peaks, tape_peaks(record_steady(one))
    assert found.keys() == whole.keys()
    for instant in whole:
        if instant == LOAD:
            assert sum(found[LOAD].values()) == pytest.approx(sum(whole[LOAD].values()), rel=0.15)
        else:
            assert found[instant] == whole[instant], instant


def test_each_streamed_layer_takes_its_weights_off_the_card():
    sizes = [outline(work(streamed=count)).allocated for count in range(7)]
    layer, buffers = sizes[1] - sizes[2], BUFFERS * streamed_bytes(work())
    assert layer == pytest.approx(streamed_bytes(work()), rel=0.001)
    embedding = 2 * 128_256 * 4096
    assert sizes[1] - sizes[0] == pytest.approx(buffers - layer - embedding, rel=0.001)
    assert [a - b for a, b in itertools.pairwise(sizes[1:])] == [layer] * 5


def test_a_tied_embedding_stays_since_the_head_is_the_same():
    one = architecture("meta-llama/Llama-3.2-1B-Instruct")
    kept = {n: on_card(work(model=dataclasses.replace(one, layers=6), streamed=n)) for n in (0, 3)}
    assert kept[0] == kept[3] == 2 * 128_256 * 2048
    away = {n: on_card(work(streamed=n)) for n in (0, 3)}
    assert (away[0], away[3]) == (2 * 2 * 128_256 * 4096, 2 * 128_256 * 4096)


def on_card(one) -> int:
    """Bytes of embedding and head on the card."""
    return outline(one).peaks[FORWARD][EMBEDDINGS]


def test_a_layer_of_8b_is_what_bitsandbytes_makes_of_it():
    """218 million weights at half a byte, a constant byte for 64 of them, four bytes for 256 of those."""
    weights = architecture(EIGHT).layer_linear_parameters
    assert streamed_bytes(work()) == pytest.approx(weights * (1 / 2 + 1 / 64 + 4 / 64 / 256), rel=1e-4)


def test_copies_that_take_longer_than_the_layers_are_waited_for():
    card = dataclasses.replace(Card.known("RTX 4090"), host_link_gbs=25.0)
    one, free = work(32, streamed=32), work(32)
    fast, slow = (dataclasses.replace(card, host_link_gbs=link) for link in (1000.0, 2.5))
    assert step_time(one, fast, 1).stall_s == 0
    resident, waits = step_time(free, slow, 1), step_time(one, slow, 1)
    copies = 2 * (32 - BUFFERS) * streamed_bytes(one) / 2.5e9
    assert waits.stall_s == pytest.approx(copies - (resident.step_s - resident.update_s), rel=0.01), (
        "both ways are all copies"
    )
    assert waits.step_s - waits.update_s == pytest.approx(copies, rel=0.01)
    tokens = [
        step_time(work(32, streamed=32, rows=rows), dataclasses.replace(card, host_link_gbs=8.0), 1).stall_s
        for rows in (1, 4, 16)
    ]
    assert tokens[0] > tokens[1] > tokens[2] == 0, "more tokens hide more"


@pytest.mark.parametrize(
    ("card", "host_gib", "least"), [("RTX 4090", 64, 60), ("T4", 32, 60), ("T4", 64, 70), ("RTX 3060", 64, 70)]
)
def test_70b_on_one_card(card, host_gib, least):
    made = plan(streamed(rank=8), card, host_gib=host_gib)
    assert made.fits
    assert len(made.streamed) >= least
    embedding = 2 * 128_256 * 8192 / GIB
    assert made.streamed_gib == pytest.approx(len(made.streamed) * 0.411 + embedding, rel=0.001)
    assert made.streamed_gib <= host_gib - HOST_GIB
    assert made.streamed == spread(len(made.streamed), 80)
    assert workload_of(made, architecture(SEVENTY)).streamed == len(made.streamed)


def test_nothing_is_streamed_that_fits_unless_it_is_faster():
    assert plan(streamed(EIGHT), "H200").streamed == ()
    assert plan(Recipe(model=EIGHT, max_length=2048), "T4").streamed == ()


def test_streaming_more_can_keep_more_activations():
    """A 12 GB card recomputes where all weights stay, and does not where some wait."""
    recipe = streamed(EIGHT)
    resident, made = (plan(recipe.replace(weights=weights), "RTX 3060") for weights in ("resident", "streamed"))
    assert made.recomputed < resident.recomputed
    assert made.step_s < resident.step_s


def why(recipe, card, **more) -> str:
    return plan(recipe, card, **more).reasons["weights"]


def test_what_binds_a_step_is_named():
    slow = dataclasses.replace(Card.known("T4"), host_link_gbs=0.5)
    assert re.search(r"bound by copies, \d\d% of a step$", why(streamed(rank=8), slow))
    assert why(streamed(rank=8), "T4", host_gib=64).endswith("bound by arithmetic")
    assert why(streamed(rank=8), "T4", host_gib=32).endswith("bound by arithmetic and host memory")
    idle = dataclasses.replace(Card.known("RTX 4090"), launch_us=1000.0, host_gib=64.0)
    assert why(streamed(rank=8), idle).endswith("copies hide behind any layer, here 8,192; bound by launches")
    unknown = dataclasses.replace(idle, tflops=None)
    assert why(streamed(rank=8), unknown) == "they are brought to the card layer by layer"


@pytest.mark.parametrize("link", [4.0, 10.0, 25.0])
def test_the_fewest_tokens_that_hide_copies_are_where_stalls_end(link):
    card = dataclasses.replace(Card.known("RTX 4090"), host_link_gbs=link, launch_us=0.1)
    free = tokens_that_hide(work(32, streamed=32, length=TOKENS, rows=16), card)
    stalls = {
        rows: step_time(work(32, streamed=32, length=TOKENS, rows=rows), card, 1).stall_s
        for rows in (int(0.94 * free / TOKENS), round(1.06 * free / TOKENS) + 1)
    }
    assert free % TOKENS == 0
    assert [stall > 0 for stall in stalls.values()] == [True, False]


# left to the plan


def test_what_fits_stays_on_the_card():
    """Though more would be kept, and the step be faster, as predicted, with some of the weights in host memory."""
    recipe = Recipe(model=EIGHT, max_length=2048)
    for card in ("T4", "RTX 3060", "RTX 4090"):
        made = plan(recipe, card)
        same = {"recipe": recipe, "reasons": {}}
        assert made.replace(**same) == plan(recipe.replace(weights="resident"), card).replace(**same)
        assert (made.streamed, made.reasons["weights"]) == ((), "")


@pytest.mark.parametrize(("card", "host_gib"), [("RTX 4090", 64), ("T4", 64), ("T4", 32)])
def test_where_nothing_fits_otherwise_weights_are_streamed_and_that_is_said(card, host_gib):
    recipe = streamed(rank=8)
    made = plan(recipe.replace(weights="auto"), card, host_gib=host_gib)
    assert made.streamed
    assert "nothing fits with all of them on the card" in made.reasons["weights"]
    wanted = plan(recipe, card, host_gib=host_gib)
    same = {"recipe": recipe, "reasons": {}}
    assert made.replace(**same) == wanted.replace(**same)
    assert "layers in host memory" in str(made)


def test_host_memory_that_nobody_spoke_of_is_spoken_of():
    recipe = streamed().replace(weights="auto")
    assert "host_gib=" in why(recipe, "RTX 4090")
    assert "host_gib=" not in why(recipe, "RTX 4090", host_gib=64)


@pytest.mark.parametrize("more", [{"method": "qlora-int8"}, {"method": "lora"}, {"dropout": 0.1}, {"dora": True}])
def test_what_cannot_be_streamed_does_not_fit(more):
    recipe = Recipe(model=SEVENTY, **more)
    assert plan(recipe, "RTX 4090", force=True).streamed == ()
    with pytest.raises(DoesNotFitError):
        plan(recipe, "RTX 4090")


def test_when_memory_runs_out_weights_stay_where_they_are():
    """Also where the search would have them wait by now: they are loaded."""
    made = plan(Recipe(model=EIGHT, max_length=2048), "RTX 3060")
    chain = [made]
    while (less := smaller(chain[-1])) is not None:
        chain.append(less)
        assert len(chain) < 40
    assert len(chain) > 2
    assert plan(made.recipe, dataclasses.replace(made.card, free_gib=5.5)).streamed, "the test is of such a case"
    for one in chain:
        assert one.streamed == ()
        assert one.memory == made.memory or one.memory == predict(workload_of(one, architecture(EIGHT)))
    there = plan(streamed(rank=8).replace(weights="auto"), "T4", host_gib=64)
    assert smaller(there).streamed == there.streamed


@pytest.mark.parametrize("weights", ["resident", "streamed"])
def test_a_recipe_of_before_still_loads(weights):
    fields = json.loads(Recipe(model=EIGHT).to_json()) | {"weights": weights}
    assert Recipe.from_json(json.dumps(fields)).weights == weights
    del fields["weights"]
    assert Recipe.from_json(json.dumps(fields)).weights == "auto"


def test_inputs_wait_in_host_memory_where_that_has_room_for_them():
    """Pinned memory comes in powers of two: 8 KiB a token, 0.5 GiB for 36,864 of them."""
    recipe = Recipe(model=EIGHT, max_length=36_864, effective_batch_size=1, weights="resident")
    much, some = plan(recipe, "T4"), plan(recipe, "T4", host_gib=12.7)
    assert (set(much.layers), much.offloaded_gib) == ({OFFLOADED}, 16.0)
    assert "(16.0 GiB)" in str(much)
    assert (some.layers.count(OFFLOADED), some.layers.count(CHECKPOINTED), some.offloaded_gib) == (21, 11, 10.5)
    assert much.needs_gib < some.needs_gib <= some.limit_gib
    with pytest.raises(DoesNotFitError):
        plan(recipe, "T4", host_gib=2.0)
    shorter = plan(recipe.replace(max_length=20_480), "T4")
    less = smaller(shorter)
    assert less.layers.count(OFFLOADED) > shorter.layers.count(OFFLOADED)
    assert less.offloaded_gib == less.layers.count(OFFLOADED) / 4, "what is done when memory runs out says so too"


def test_a_training_that_has_no_host_memory_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    made = plan(streamed("tiny", max_length=128), Card("CPU", None)).replace(streamed=(0,), streamed_gib=9.0)
    monkeypatch.setattr("llamanb.training.host_memory", lambda: (16.0, 8.0, 12.0))
    with pytest.raises(
        HostMemoryError, match=r"weights of layers(.|\n)*9\.0 GiB wait there, and 2 more are needed to work with; 8\.0"
    ):
        train(made, runs=tmp_path)
    with pytest.raises(HostMemoryError, match=r"inputs of layers(.|\n)*7\.0 GiB wait there"):
        train(made.replace(streamed=(), streamed_gib=0.0, offloaded_gib=7.0), runs=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_recomputes_says_where_streaming_is_predicted_to_be_faster():
    small = dataclasses.replace(Card.known("RTX 3060"), free_gib=7.2)
    recipe = Recipe(model=EIGHT, max_length=512, effective_batch_size=16)
    made, other = plan(recipe, small), plan(recipe.replace(weights="streamed"), small)
    said = re.search(
        r"weights = 'streamed' is predicted to take about ([\d.]+) s a step instead of ([\d.]+) s", str(made)
    )
    assert not made.streamed
    assert made.recomputed > 0
    predicted, instead = map(float, said.groups())
    assert instead == pytest.approx(made.step_s, abs=0.06)
    assert predicted < made.step_s / WORTH
    assert predicted == pytest.approx(other.step_s, rel=0.03)
    assert re.search(r"and [1-9]\.\d GiB of host memory", str(made))


@pytest.mark.parametrize(
    ("free_gib", "more"),
    [
        (11.2, {}),  # everything is kept
        (7.2, {"weights": "resident"}),
        (7.2, {"checkpointing": "all"}),
        (7.2, {"dropout": 0.1}),
        (7.2, {"model": "meta-llama/Llama-3.2-3B-Instruct", "max_length": 8192}),  # not WORTH it
    ],
)
def test_and_says_nothing_where_it_is_not_or_may_not_be(free_gib, more):
    small = dataclasses.replace(Card.known("RTX 3060"), free_gib=free_gib)
    made = plan(Recipe(**{"model": EIGHT, "max_length": 512, "effective_batch_size": 16, **more}), small, force=True)
    assert "is predicted to take" not in str(made)


def test_nor_where_host_memory_has_no_room_for_it():
    small = dataclasses.replace(Card.known("RTX 3060"), free_gib=7.2)
    made = plan(Recipe(model=EIGHT, max_length=512, effective_batch_size=16), small, host_gib=2.5)
    assert "is predicted to take" not in str(made)
