"""The benchmark of the planner's choice: what is run and what need not be, that a layout is laid out, verdicts, and all
of it once on a CPU."""

import json
import math

import pytest
import torch

from benchmarks import choice, choice_bench
from benchmarks.choice import (
    DRY,
    FAMILIES,
    MORE_KEPT,
    ROWS,
    TOO_SLOW,
    card_of,
    counted,
    family,
    kinds_of,
    laid_out,
    look_through,
    planned,
    rows,
)
from benchmarks.choice_bench import RAN_OUT, TIMED, Bench
from benchmarks.choice_report import report, verdict
from benchmarks.speed_processes import Clock
from benchmarks.speed_worker import Gpu
from llamanb.architecture import architecture
from llamanb.tape import CHECKPOINTED, HALVED, OFFLOADED, STORED

KEPT = {STORED: 1.0, HALVED: 0.4, CHECKPOINTED: 0.1, OFFLOADED: 0.02}
WORK = {STORED: 1.0, HALVED: 1.2, CHECKPOINTED: 1.5, OFFLOADED: 1.6}
DEPTH = 12


def step_s(layout, launch_s=0.0):
    """Eight rows of work, and something for each micro-batch."""
    micro, kinds = layout
    return 8 * sum(WORK[kind] for kind in kinds) + launch_s * 8 // micro


def machine(room, launch_s=0.0):
    """`run` of a card with room for so much, and what was run."""
    ran = []

    def run(layout):
        ran.append(layout)
        micro, kinds = layout
        if micro * sum(KEPT[kind] for kind in kinds) > room:
            return {"status": RAN_OUT}
        return {"status": TIMED, "step_s": step_s(layout, launch_s)}

    return run, ran


EVERY = {
    (micro, kinds): None for micro in (1, 2, 4, 8) for more, less in FAMILIES for kinds in family(DEPTH, more, less)
}


def test_layouts_go_in_fours_from_none_to_all():
    assert [counted(kinds) for kinds in family(8, HALVED, STORED)] == [
        [[STORED, 8]],
        [[HALVED, 4], [STORED, 4]],
        [[HALVED, 8]],
    ]
    assert [kinds.count(CHECKPOINTED) for kinds in family(6, CHECKPOINTED, HALVED)] == [0, 4, 6]
    for kinds in family(32, OFFLOADED, STORED):
        assert kinds_of(counted(kinds)) == kinds


@pytest.mark.parametrize("launch_s", [0, 3, 30])
@pytest.mark.parametrize("room", [0.5, 2, 7, 13, 30, 1000])
def test_the_fastest_that_fits_is_found_whatever_was_predicted(room, launch_s):
    fitting = [one for one in EVERY if one[0] * sum(KEPT[kind] for kind in one[1]) <= room]
    fastest = min(step_s(one, launch_s) for one in fitting)
    for likely in (lambda one: True, lambda one: False, lambda one: one in fitting, lambda one: one[0] < 4):
        run, ran = machine(room, launch_s)
        found = look_through(DEPTH, run, likely)
        assert found.keys() == EVERY.keys()
        assert min(line.get("step_s", math.inf) for line in found.values()) == fastest
        assert len(ran) == len(set(ran)), "nothing runs twice"


def test_what_cannot_be_the_fastest_does_not_run():
    run, ran = machine(room=7)
    found = look_through(DEPTH, run, lambda one: one[0] * sum(KEPT[kind] for kind in one[1]) <= 7)
    assert len(ran) < len(EVERY) / 2
    best = min(line["step_s"] for line in found.values() if line["status"] == TIMED)
    for (micro, kinds), line in found.items():
        if line["status"] == MORE_KEPT:
            assert micro * sum(KEPT[kind] for kind in kinds) > 7
        if line["status"] == TOO_SLOW:
            assert step_s((micro, kinds)) > choice.SLOWER * best
    assert {MORE_KEPT, TOO_SLOW} < {line["status"] for line in found.values()}
    ran_out = {one for one, line in found.items() if line["status"] == RAN_OUT}
    for micro, kinds in ran_out:
        assert not any((more, kinds) in ran for more in (2, 4, 8) if more > micro), "more rows would take more"


def test_rows_are_found_by_words_of_their_names():
    assert len(ROWS) == 10
    assert [row.id for row in rows("T4-1b,4090")] == ["T4-1b-512", "T4-1b-8192", "RTX4090-8b-1024", "RTX4090-8b-2048"]
    assert rows("dry") == [DRY]
    with pytest.raises(ValueError, match="no row"):
        rows("70b")


@pytest.fixture(scope="module")
def bench():
    return Bench(planned(DRY, card_of(DRY, "cpu")), Gpu("cpu", None))


def kept_bytes(bench, plan) -> int:
    """What a micro-batch keeps for its backward pass."""
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        bench.micro_batches(plan, 1)
    return sum(seen.values())


def test_a_layout_is_that_of_the_steps_that_are_timed(bench):
    plan, found = planned(DRY, card_of(DRY, "cpu")), {}
    for kind in (STORED, HALVED, CHECKPOINTED):
        one = laid_out(plan, (2, (kind,) * 4))
        bench.lay(one)
        found[kind] = kept_bytes(bench, one)
    assert found[STORED] > 1.2 * found[HALVED]
    assert found[HALVED] > 1.2 * found[CHECKPOINTED]


@pytest.mark.parametrize("micro", [1, 2, 8])
def test_a_micro_batch_is_of_as_many_rows_as_the_layout_says(bench, micro, monkeypatch):
    plan, lengths = laid_out(planned(DRY, card_of(DRY, "cpu")), (micro, (STORED,) * 4)), []
    compute = bench.trainer.compute_loss

    def computed(model, inputs, **more):
        lengths.append(inputs["lengths"])
        return compute(model, inputs, **more)

    monkeypatch.setattr(bench.trainer, "compute_loss", computed)
    bench.lay(plan)
    assert len(bench.micro_batches(plan, 3)) == 3
    assert lengths == [[DRY.length] * micro] * 3


def test_a_step_is_its_first_micro_batch_the_others_and_the_optimizer(bench, monkeypatch):
    monkeypatch.setattr(bench, "optimizer_s", 5.0)
    monkeypatch.setattr(bench, "micro_batches", lambda plan, count: [1.0, 0.7, 0.7][:count])
    plan = planned(DRY, card_of(DRY, "cpu"))
    for micro, seconds in ((1, 1.0 + 7 * 0.7), (4, 1.0 + 0.7), (8, 1.0)):
        assert bench.final(laid_out(plan, (micro, plan.layers))) == pytest.approx(seconds + 5)
    assert bench.screen(laid_out(plan, (2, plan.layers))) == pytest.approx(4 * 0.7 + 5), "the first warms up"


def test_running_out_of_memory_is_a_result_and_anything_else_an_error(bench):
    def runs_out(plan):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def breaks(plan):
        raise RuntimeError("an illegal memory access was encountered")

    plan = planned(DRY, card_of(DRY, "cpu"))
    assert bench.attempt(plan, runs_out) == {"status": RAN_OUT}
    with pytest.raises(RuntimeError, match="illegal"):
        bench.attempt(plan, breaks)


def test_a_layout_that_runs_out_of_memory_does_not_go_on_as_a_smaller_one(bench, monkeypatch):
    compute = bench.trainer.compute_loss

    def computed(model, inputs, **more):
        if len(inputs["lengths"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(model, inputs, **more)

    monkeypatch.setattr(bench.trainer, "compute_loss", computed)
    plan = planned(DRY, card_of(DRY, "cpu"))
    assert bench.attempt(laid_out(plan, (2, plan.layers)), bench.screen) == {"status": RAN_OUT}
    assert bench.attempt(laid_out(plan, (1, plan.layers)), bench.screen)["status"] == TIMED


def test_all_of_it_on_a_cpu(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(choice_bench, "SCREENS", 1)
    monkeypatch.setattr(choice_bench, "FINAL_S", 0.0)
    monkeypatch.setattr(choice, "PASSES_S", 0.0)
    monkeypatch.setattr(choice, "Bench", lambda plan, gpu: bench)
    depth = architecture("tiny").layers
    rehearsed = {DRY.id: (2, (CHECKPOINTED,) + (STORED,) * (depth - 1))}  # not one of those enumerated
    (found,) = choice.group([DRY], rehearsed, "cpu", Clock(1000))
    *layouts, row = json.loads(json.dumps(found))
    assert row["row"] == "whole-tiny-32"
    enumerated = {(line["micro"], kinds_of(line["layers"])) for line in layouts if line["enumerated"]}
    assert enumerated == {(m, kinds) for m in (1, 2, 4, 8) for pair in FAMILIES for kinds in family(depth, *pair)}
    (of_plan,) = [line for line in layouts if "plan" in line["chosen_by"]]
    (of_rehearsal,) = [line for line in layouts if "rehearsed" in line["chosen_by"]]
    assert (of_plan["micro"], of_plan["layers"]) == (8, [[STORED, depth]])
    assert of_rehearsal["layers"] == [[CHECKPOINTED, 1], [STORED, depth - 1]]
    assert not of_rehearsal["enumerated"]
    finals = [line for line in layouts if "final_s" in line]
    assert choice.FINALISTS <= len(finals) <= choice.FINALISTS + 2
    assert all(len(line["final_s"]) == choice.PASSES for line in finals)
    text = report(found)
    assert "| whole-tiny-32 |" in text
    assert "`rehearsed`: of all layouts the fastest, within the noise, in " in text


def line(micro, kinds, final_s=None, *, chosen_by=(), enumerated=True, reserved=10.0, status=TIMED):
    made = {"kind": "layout", "row": "r", "micro": micro, "layers": counted(kinds), "status": status}
    made |= {"enumerated": enumerated, "chosen_by": list(chosen_by), "reserved_gib": reserved}
    return made | ({"final_s": final_s} if final_s else {})


ROW = {"kind": "row", "row": "r", "limit_gib": 13.0, "gpu": "H200", "torch": "2.11", "took_s": 1.0}


def test_verdicts_follow_from_the_times():
    found = [
        line(1, (STORED,) * 8, [1.00, 1.02], reserved=14.0),
        line(2, (HALVED,) * 8, [1.04, 1.04]),
        line(2, (HALVED,) * 5 + (STORED,) * 3, [1.03, 1.03], chosen_by=["plan"], enumerated=False),
        line(4, (OFFLOADED,) * 8, chosen_by=["rehearsed"], status=RAN_OUT, reserved=None),
        ROW,
    ]
    what = verdict(found)
    assert what["best"] is found[0]
    assert what["best_s"] == 1.0
    assert what["noise"] == 0.0, "of most layouts"
    assert what["choices"]["plan"]["ratio"] == pytest.approx(1.03)
    assert what["choices"]["plan"]["allowed"] == pytest.approx(1.03 / 1.04), "against what a plan may use"
    assert what["choices"]["rehearsed"]["ratio"] == math.inf
    text = report(found)
    assert "H200, torch 2.11" in text
    assert (
        "`plan`: of all layouts the fastest, within the noise, in 0 of 1 rows; at most 3% slower in 1; at worst 1.030"
        in text
    )
    assert "Of those that a plan may use the fastest, within the noise, in 1 of 1 rows; at most 3% slower in 1" in text
    assert "`rehearsed`: of all layouts the fastest, within the noise, in 0 of 1 rows; at most 3% slower in 0" in text
    assert "2 × 4: 5 mlp checkpointed, 3 stored" in text


def test_a_pass_in_which_the_host_was_busy_does_not_count():
    found = [line(1, (STORED,) * 8, [1.0, 1.3, 1.01], chosen_by=["plan"]), line(2, (STORED,) * 8, [1.1, 1.1, 1.1]), ROW]
    what = verdict(found)
    assert (what["best"], what["best_s"]) == (found[0], 1.0)
    assert what["noise"] == pytest.approx(0.005, abs=1e-3)


def test_memory_is_held_against_what_was_predicted():
    found = [line(1, (STORED,) * 8, [1.0, 1.02], chosen_by=["plan"]), line(2, (STORED,) * 8, [1.01, 1.03]), ROW]
    assert "Memory" not in report(found)
    found[0] |= {"predicted_reserved_gib": 9.9}
    found[1] |= {"predicted_reserved_gib": 10.3}
    assert "Memory reserved by 2 layouts: 2.00% off on average, +3.00% at worst." in report(found)


def test_a_choice_within_the_noise_of_the_fastest_counts_as_the_fastest():
    found = [line(1, (STORED,) * 8, [1.0, 1.02]), line(2, (STORED,) * 8, [1.01, 1.03], chosen_by=["plan"]), ROW]
    assert "in 1 of 1 rows" in report(found)
    found[1]["final_s"] = [1.05, 1.05]
    assert "in 0 of 1 rows; at most 3% slower in 0" in report(found)
