"""The estimate of a step's time: what it is made of, and what changes it."""

import dataclasses
import json
from pathlib import Path

import pytest

from llamanb import Card
from llamanb.architecture import architecture
from llamanb.memory import outline
from llamanb.recipe import LINEAR_LAYERS
from llamanb.speed import (
    LAUNCHES_PER_FUSED,
    LAUNCHES_PER_OPERATION,
    READS_PER_FUSED,
    READS_PER_WEIGHT,
    flops,
    step_time,
)
from llamanb.tape import CHECKPOINTED, HALVED, OFFLOADED, STORED, Workload

EIGHT = architecture("meta-llama/Llama-3.1-8B-Instruct")
T4 = Card.known("T4")


def make(kind=STORED, **fields) -> Workload:
    return Workload(**{"model": EIGHT, "rows": 2, "length": 1024, "layers": (kind,) * EIGHT.layers, **fields})


def test_twice_the_tokens_take_about_twice_the_gpu():
    one, two = (step_time(make(rows=rows), T4, 4) for rows in (2, 4))
    assert 1.8 < two.gpu_s / one.gpu_s < 2.05
    assert two.matrix_s == pytest.approx(2 * one.matrix_s)


def test_longer_rows_cost_more_attention():
    short, long = (step_time(make(rows=rows, length=length), T4, 1) for rows, length in ((8, 512), (1, 4096)))
    assert long.matrix_s == pytest.approx(short.matrix_s)
    assert long.attention_s == pytest.approx(8 * short.attention_s)


def test_twice_the_micro_batches_take_twice_as_long():
    one, two = (step_time(make(), T4, accumulation) for accumulation in (4, 8))
    assert two.matrix_s == pytest.approx(2 * one.matrix_s)
    assert two.step_s == pytest.approx(2 * one.step_s, rel=0.05)  # the optimizer steps once


@pytest.mark.parametrize(
    ("full", "share"),
    [(True, 1 / 3), (False, 1 / 2)],  # frozen weights: a second forward beside one forward and one product backward
)
def test_recomputing_costs_a_forward_more(full, share):
    fields = {"full": full, "quantization": None if full else "nf4"}
    again, kept = (step_time(make(kind, **fields), T4, 1).matrix_s for kind in (CHECKPOINTED, STORED))
    assert 0.85 * share < again / kept - 1 < share  # the head is not recomputed


def test_offloading_adds_its_copies():
    again, offloaded = (step_time(make(kind), T4, 1) for kind in (CHECKPOINTED, OFFLOADED))
    copied = 2 * EIGHT.layers * 2048 * EIGHT.hidden * 2
    assert again.link_s == 0
    assert offloaded.link_s == pytest.approx(copied / (T4.host_link_gbs * 1e9))
    assert offloaded.matrix_s == again.matrix_s


def test_arithmetic_is_six_a_weight_and_token_and_four_where_weights_are_frozen():
    weights = EIGHT.layers * EIGHT.layer_linear_parameters
    head = 4 * 2 * EIGHT.embedding_parameters
    full, _ = flops(make(full=True, quantization=None))
    frozen, _ = flops(make(rank=1))
    assert full == pytest.approx(2048 * (6 * weights + head))
    assert frozen == pytest.approx(2048 * (4 * weights + head * 3 / 4), rel=0.002)


def test_attention_counts_half_of_the_scores():
    _, attention = flops(make())
    forward = 2 * 2 * 2 * 1024 * 1024 * EIGHT.q / 2  # two products, two operations each, rows, queries, half the keys
    assert attention == pytest.approx(3.5 * EIGHT.layers * forward)


@pytest.mark.parametrize("targets", [LINEAR_LAYERS, ("q_proj", "v_proj")])
def test_adam_reads_and_writes_what_is_trained(targets):
    """Seven times four bytes a parameter, once a step; all else that is moved is moved in each micro-batch."""
    one, two = (step_time(make(targets=targets), T4, accumulation).memory_s for accumulation in (1, 2))
    trained = EIGHT.layers * 16 * sum(sum(EIGHT.linear(name)) for name in targets)
    assert (2 * one - two) * T4.bandwidth_gbs * 1e9 == pytest.approx(28 * trained)


def test_fp32_is_slower():
    assert step_time(make(dtype="fp32"), T4, 1).matrix_s > 4 * step_time(make(), T4, 1).matrix_s


def test_a_step_waits_for_the_slower_of_python_and_gpu():
    patient = dataclasses.replace(T4, launch_us=100_000.0)
    waiting = step_time(make(), patient, 1)
    assert waiting.step_s == pytest.approx(waiting.launch_s + waiting.update_s)
    assert waiting.launch_s > waiting.gpu_s
    busy = step_time(make(rows=8), T4, 1)
    assert busy.step_s == pytest.approx(busy.gpu_s + busy.update_s, rel=1e-3)
    assert busy.gpu_s == busy.matrix_s + busy.attention_s + busy.memory_s + busy.link_s


def test_launches_are_those_of_the_layers_that_run():
    for fused, each in ((False, LAUNCHES_PER_OPERATION), (True, LAUNCHES_PER_FUSED)):
        work = make(fused=fused)
        launches = 3 * outline(work).operations * each
        assert step_time(work, T4, 3).launch_s == pytest.approx(launches * T4.launch_us * 1e-6)


def test_what_takes_as_long_as_the_other_does_not_hide_wholly():
    busy = step_time(make(rows=8), T4, 1)
    each = dataclasses.replace(T4, launch_us=T4.launch_us * busy.gpu_s / busy.launch_s)
    even = step_time(make(rows=8), each, 1)
    assert even.launch_s == pytest.approx(even.gpu_s)
    assert even.step_s == pytest.approx(2**0.125 * even.gpu_s + even.update_s)


def test_adapters_are_updated_once_a_step():
    one, two = (step_time(make(fused=True), T4, accumulation).update_s for accumulation in (1, 8))
    assert one == two > 0
    assert step_time(make(), T4, 1).update_s == 0, "in the launches of transformers' layers"


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("kind", [STORED, HALVED, CHECKPOINTED])
def test_weights_are_dequantized_in_each_pass_and_for_each_tile_of_a_recomputed_layer_s_mlp(kind, rows):
    mlp = 3 * EIGHT.intermediate * EIGHT.hidden
    attention, tiles = EIGHT.layer_linear_parameters - mlp, 1 if kind == STORED else rows
    times = {
        STORED: 2 * (attention + mlp),
        HALVED: 2 * attention + tiles * (2 * mlp + mlp * 2 / 3),  # gate and up once more
        CHECKPOINTED: 3 * attention + tiles * (2 * mlp + mlp * 2 / 3),
    }
    work = make(kind, fused=True, rows=rows, length=4096, kernel="memory-efficient")
    unasked = EIGHT.hidden * (EIGHT.q + 2 * EIGHT.kv)  # for no gradient goes on below the first layer
    assert outline(work).dequantized == 2 * (EIGHT.layers * times[kind] - unasked)
    assert outline(work.replace(quantization=None)).dequantized == 0


def test_a_weight_of_four_bits_is_read_in_four_and_written_in_sixteen():
    work = make(fused=True, accumulation=4)
    outlined, adapters = outline(work), 28 * EIGHT.layers * 16 * sum(sum(EIGHT.linear(n)) for n in LINEAR_LAYERS)
    moved = step_time(work, T4, 4).memory_s * T4.bandwidth_gbs * 1e9 / 4 - adapters / 4
    others = (outlined.written - outlined.dequantized) * (1 + READS_PER_FUSED)
    assert moved == pytest.approx(others + outlined.dequantized * (1 + READS_PER_WEIGHT))


def test_a_recomputed_forward_pass_leaves_no_more_idle_than_the_first():
    """It is the backward pass whose blocks are few."""
    fields = {"kernel": "memory-efficient", "fused": True, "rows": 1, "length": 4096}
    full = dataclasses.replace(T4, multiprocessors=32)
    extra = [
        step_time(make(CHECKPOINTED, **fields), card, 1).attention_s - step_time(make(**fields), card, 1).attention_s
        for card in (full, T4)
    ]
    assert extra[0] == pytest.approx(extra[1])


@pytest.mark.parametrize("unknown", ["tflops", "bandwidth_gbs"])
def test_an_unknown_speed_gives_no_time(unknown):
    assert step_time(make(), dataclasses.replace(T4, **{unknown: None}), 1) is None


@pytest.mark.parametrize("unknown", ["host_link_gbs", "launch_us"])
def test_of_the_rest_a_usual_figure_is_taken(unknown):
    assert step_time(make(OFFLOADED), dataclasses.replace(T4, **{unknown: None}), 1).step_s > 0


RAW = Path(__file__).parents[2] / "benchmarks/results/raw/attention_splits.jsonl"
LONG = [line for line in map(json.loads, RAW.read_text().splitlines()) if line["length"] >= 1024]


@pytest.mark.parametrize("line", LONG, ids=lambda line: f"{line['rows']}x{line['length']}")
def test_attention_takes_what_was_measured_from_one_row_to_many(line):
    """Of the memory-efficient kernel on an H200, by one rate. Rows of 512 tokens take a third longer than it says."""
    shape = dataclasses.replace(EIGHT, heads=line["heads"], head_size=line["head_size"])
    fields = {"model": shape, "rows": line["rows"], "length": line["length"], "kernel": "memory-efficient"}
    card = dataclasses.replace(Card.known("H200"), efficient_tflops=138.0)
    took = step_time(make(fused=True, **fields), card, 1).attention_s / EIGHT.layers
    ms = {int(parts): ms for parts, ms in line["backward_ms"].items()}
    measured = line["forward_ms"] + ms[min(ms, key=lambda parts: abs(parts - line["taken"]))]
    assert 1000 * took == pytest.approx(measured, rel=0.2)


def test_a_kernel_has_the_rate_that_was_measured_for_it():
    measured = dataclasses.replace(Card.known("RTX 4090"), flash_tflops=100.0, efficient_tflops=50.0)
    times = [
        step_time(make(kernel=kernel), measured, 1).attention_s for kernel in ("flash", "memory-efficient", "cudnn")
    ]
    half = measured.tflops / 2
    assert times[1] == pytest.approx(2 * times[0])
    assert times[2] == pytest.approx(times[0] * 100 / half)


def test_blocks_that_fill_no_turn_leave_a_card_idle():
    """32 blocks of a row on 40 multiprocessors; fewer stand still where keys may be split, by the GPU that computes."""
    whole = dataclasses.replace(T4, multiprocessors=32)
    fields = {"kernel": "memory-efficient", "fused": True, "rows": 1, "length": 4096}
    full, idle, unknown = (
        step_time(make(**fields), card, 1).attention_s
        for card in (whole, T4, dataclasses.replace(T4, multiprocessors=None))
    )
    assert full == unknown
    assert idle == pytest.approx(full * (1 + 2.5 * 40 / 32) / 3.5)
    wide = dataclasses.replace(T4, multiprocessors=320)
    split = dataclasses.replace(wide, computes_as=(9, 0))
    assert step_time(make(**fields), split, 1).attention_s < 0.5 * step_time(make(**fields), wide, 1).attention_s
