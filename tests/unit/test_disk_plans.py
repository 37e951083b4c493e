"""Plans whose weights wait on disk where host memory has no room for them: how many, how long a step then takes, and
what is said of it."""

import dataclasses
import json
import re

import pytest

from llamanb import Card, Recipe, disk, plan
from llamanb.architecture import architecture
from llamanb.copies import HOST_GIB, room_in_memory, room_with_disk
from llamanb.errors import RecipeError
from llamanb.layout import GIB, Plan
from llamanb.planner import DoesNotFitError, workload_of
from llamanb.rehearsal import rehearse
from llamanb.speed import shares, step_time
from llamanb.streaming import NCCL_GIB, TOKENS, in_its_machine, tokens_that_hide
from llamanb.tape import spread, streamed_bytes
from llamanb.tape.workload import STAGED
from llamanb.training.recovery import smaller
from tests.unit.test_streamed_plans import EIGHT, SEVENTY, streamed, work

COLAB = dataclasses.replace(Card.known("T4"), host_gib=12.7)


def shape_of(made):
    return workload_of(made, architecture(made.recipe.model))


@pytest.mark.parametrize("rank", [8, 16])
@pytest.mark.parametrize("weights", ["auto", "streamed"])
def test_70b_on_colabs_t4(weights, rank):
    """12.7 GB, which have room for 21 of 80 layers, less those that are on their way."""
    made = plan(streamed(rank=rank, weights=weights), "T4", host_gib=12.7)
    assert made.fits
    assert len(made.streamed) - len(made.on_disk) == 21 - STAGED
    assert made.streamed == spread(len(made.streamed), 80)
    assert set(made.on_disk) < set(made.streamed)
    assert 12.7 - HOST_GIB - 0.5 < made.streamed_gib <= 12.7 - HOST_GIB
    assert made.disk_gib == pytest.approx(len(made.on_disk) * 0.411, rel=0.001)
    assert made.needs_gib > 0.95 * made.limit_gib, "as few on disk as fit the card"
    said = str(made)
    held, below = len(made.streamed) - len(made.on_disk), len(made.on_disk)
    assert f"of {held} of 80 layers in host memory: {made.streamed_gib:.1f} GiB; of {below} on disk:" in said
    assert "taken to be 0.5 GB/s, not measured" in said
    assert f"a step takes {made.step_s / 60:.0f} min, each word of an answer" in said
    assert re.search(
        r"the disk hides behind about [\d,]+ tokens at once and more, here [\d,]+; bound by the disk", said
    )
    assert Plan.from_json(made.to_json()) == made


def test_where_host_memory_is_enough_nothing_waits_on_disk():
    for card, host in (("RTX 4090", 64), ("T4", 32)):
        made = plan(streamed(rank=8, weights="auto"), card, host_gib=host)
        assert (made.on_disk, made.disk_gib) == ((), 0.0)
        assert "disk" not in str(made)
    assert plan(Recipe(model=EIGHT, max_length=2048), "T4", host_gib=1).streamed == ()


def test_a_plan_from_before_says_nothing_of_a_disk():
    made = plan(streamed(rank=8), "T4", host_gib=64)
    fields = json.loads(made.to_json())
    del fields["on_disk"], fields["disk_gib"], fields["card"]["disk_gib"], fields["card"]["disk_gbs"]
    assert Plan.from_json(json.dumps(fields)) == made


@pytest.mark.parametrize("disk_gbs", [0.2, 1.0, 8.0])
def test_a_step_takes_as_long_as_the_slowest_of_arithmetic_link_and_disk(disk_gbs):
    host = HOST_GIB + 2 * 128_256 * 4096 / GIB + 12.5 * streamed_bytes(work()) / GIB
    card = dataclasses.replace(Card.known("RTX 4090"), host_link_gbs=8.0, host_gib=host, disk_gbs=disk_gbs)
    one = work(32, streamed=32, rows=2)
    below = 32 - 12 + STAGED
    reads, copies = (n * 30 / 32 * streamed_bytes(one) / 1e9 for n in (below / disk_gbs, 32 / 8.0))
    free = step_time(work(32, rows=2), card, 1)
    hides_s = free.step_s - free.update_s
    stalls = sum(max(0.0, max(reads, copies) - share * hides_s) for share in shares(one))
    assert step_time(one, card, 1).stall_s == pytest.approx(stalls, rel=1e-6)
    assert (reads > copies) == (disk_gbs < 8)


def test_the_fewest_tokens_that_hide_the_disk_are_where_stalls_end():
    card = dataclasses.replace(Card.known("RTX 4090"), launch_us=0.1, host_gib=5.0, disk_gbs=1.0)
    assert room_in_memory(work(32), card) < 32
    free = tokens_that_hide(work(32, streamed=32, length=TOKENS, rows=128), card)
    stalls = [
        step_time(work(32, streamed=32, length=TOKENS, rows=rows), card, 1).stall_s
        for rows in (int(0.94 * free / TOKENS), round(1.06 * free / TOKENS) + 1)
    ]
    assert [stall > 0 for stall in stalls] == [True, False]


def test_what_was_measured_is_said_and_a_fast_disk_does_not_bind():
    fast = dataclasses.replace(COLAB, disk_gbs=6.0)
    made = plan(streamed(rank=8), fast)
    assert "read from disk (6 GB/s) twice a micro-batch" in made.reasons["weights"]
    assert made.reasons["weights"].endswith("bound by arithmetic")
    assert made.step_s < plan(streamed(rank=8), COLAB).step_s
    unknown = dataclasses.replace(COLAB, tflops=None)
    assert "a step takes" not in plan(streamed(rank=8), unknown).reasons["weights"]


def test_a_disk_that_is_too_small_is_said_with_what_would_be_enough():
    with pytest.raises(DoesNotFitError) as caught:
        plan(streamed(rank=8), dataclasses.replace(COLAB, disk_gib=9.0))
    room = "12.7 GiB of host memory have room for the weights of 19, and 9.0 GiB of disk for those of 19, of 80 layers"
    assert room in caught.value.why
    rows = {row[0]: row[2] for row in caught.value.changes.rows}
    (free,) = (change for change in rows if "free disk" in change)
    need = float(free.split()[0])
    assert "wait in host memory, " in rows[free]
    assert plan(streamed(rank=8), dataclasses.replace(COLAB, disk_gib=need)).fits
    assert any("free host memory" in change for change in rows)


def test_host_memory_without_room_for_what_is_on_its_way_is_an_error():
    room = r"4\.0 GiB of host memory have room for the weights of 0 of 80 layers"
    with pytest.raises(DoesNotFitError, match=room) as caught:
        plan(streamed(rank=8), "T4", host_gib=4.0)
    assert "Llama-3.1-8B" in caught.value.fix


def test_layers_that_a_checkpoint_has_in_4_bits_are_read_from_there_and_take_no_more():
    there = dataclasses.replace(architecture(SEVENTY), quantization="nf4")
    one = shape_of(plan(streamed(rank=8), COLAB))
    full = dataclasses.replace(COLAB, disk_gib=0.0)
    assert room_with_disk(one, full) == 21
    assert room_with_disk(one, dataclasses.replace(full, host_gib=None)) == 80
    assert room_with_disk(one.replace(model=there), full) == 80


def test_when_memory_runs_out_what_waits_on_disk_stays_there():
    made = plan(streamed(rank=8, weights="auto"), COLAB)
    less = smaller(made)
    assert (less.streamed, less.on_disk) == (made.streamed, made.on_disk)
    assert less.needs_gib < made.needs_gib


def test_what_waits_on_disk_cannot_be_rehearsed_even_where_all_layers_are_streamed():
    made = plan(streamed(rank=8), COLAB)
    with pytest.raises(RecipeError, match="cannot be rehearsed") as caught:
        rehearse(made.replace(streamed=tuple(range(80))))
    assert f"of 80 layers {80 - len(made.on_disk)} wait in host memory" in caught.value.why


def test_cards_share_the_memory_and_what_the_disk_reads():
    """Each reads its own."""
    alone = Card.known("T4")
    one_of_four = {"free_gib": alone.free_gib - NCCL_GIB, "host_gib": 12.5, "disk_gbs": 0.125}
    assert in_its_machine("T4", 50.0, 4) == dataclasses.replace(alone, **one_of_four)
    assert in_its_machine("T4", 50.0).disk_gbs is None


# this machine's disk


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder of kept layers, on a disk of 100 GiB with 30 free, which a file is enough to measure."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: disk.shutil._ntuple_diskusage(100 * GIB, 0, 30 * GIB))
    monkeypatch.setattr(disk, "LEAST", 1000)
    return tmp_path / "llamanb-4bit"


def test_a_plan_for_this_machine_asks_its_disk(kept, monkeypatch):
    monkeypatch.setattr(Card, "here", classmethod(lambda cls: Card.known("T4")))
    (kept / "0123").mkdir(parents=True)
    (kept / "0123" / "layer-0000.safetensors").write_bytes(bytes(2**20))
    (kept / disk.KEPT).write_text('{"gbs": 1.25}')
    card = in_its_machine(None, 12.7)
    assert (card.host_gib, card.disk_gbs) == (12.7, 1.25)
    assert card.disk_gib == 30 + 2**20 / GIB, "layers that are there already are room for layers"
    assert in_its_machine(None).host_gib > 0
    assert "(1.25 GB/s)" in plan(streamed(rank=8), host_gib=12.7).reasons["weights"]


@pytest.mark.parametrize("content", [None, "", "{}", '{"gbs": 0}', '{"gbs": -1}', '{"gbs": NaN}', '{"gbs": []}', "[1]"])
def test_a_rate_that_is_not_one_counts_as_none(content, kept):
    kept.mkdir()
    if content is not None:
        (kept / disk.KEPT).write_text(content)
    assert disk.measured() is None


def test_the_rate_is_measured_by_reading_what_is_there(kept, monkeypatch):
    assert disk.measure() is None
    shard = kept.parent / "hub" / "models--a--b" / "model.safetensors"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(bytes(999))
    assert (disk.measure(), disk.measured()) == (None, None), "too little to tell"
    shard.write_bytes(bytes(5_000_000))
    clock = iter((10.0, 10.5))
    monkeypatch.setattr(disk.time, "perf_counter", lambda: next(clock))
    assert disk.measure() == disk.measured() == 0.01
    assert disk.measure(kept / "missing.safetensors") is None
