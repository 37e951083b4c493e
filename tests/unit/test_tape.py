"""The tape held to recorded trainings, and what has to be true of every one."""

import itertools
from dataclasses import replace

import pytest

from llamanb.architecture import Architecture
from llamanb.memory import outline, replay, tape_peaks
from llamanb.planner import MEASURED_WITH
from llamanb.recipe import LINEAR_LAYERS
from llamanb.tape import (
    BACKWARD,
    CHECKPOINTED,
    EMPTIED,
    FORWARD,
    HALVED,
    HEAD,
    HEAD_BACKWARD,
    HEAD_TILE,
    LOAD,
    OFFLOADED,
    RECOMPUTED,
    STEP,
    STORED,
    Workload,
    record,
    record_steady,
)
from llamanb.tape.step import Step
from llamanb.tape.workload import (
    ADAPTERS,
    CONSTANTS,
    EMBEDDINGS,
    GRADIENTS,
    KERNELS,
    LIBRARIES,
    OPTIMIZER,
    WEIGHTS,
)
from tests import traces

OUTLIERS = "int8_1b"
"""int8 multiplies columns with outliers apart; how many lies in the values: down_proj is planned for all."""
OVER = {"bf_pad_none": 0.01, "math_all": 0.02}
"""Predicted higher than recorded by more than half a percent, in some part: masks, and scores of the math kernel."""
RESERVED = {"full_none": 0.07, "t4fp32": 0.09}
"""Where more than 3 % of what torch reserved is missing."""
LATE = {"1b_none", *(case for case in traces.names() if traces.read(case).case.get("t4"))}
"""In these recordings cuBLAS took its 64 MiB in the first step and not before loading."""
CASES = sorted({*traces.names()} - {OUTLIERS})


@pytest.mark.parametrize("case", CASES)
def test_it_predicts_what_was_recorded(case):
    trace = traces.read(case)
    replayed = replay(record(trace.work), expandable=trace.expandable)
    assert -0.005 < replayed.peak_allocated / max(trace.peaks.values()) - 1 < OVER.get(case, 0.005)
    assert replayed.peak_reserved == pytest.approx(trace.reserved, rel=RESERVED.get(case, 0.03))


@pytest.mark.parametrize("case", CASES)
def test_it_predicts_the_peak_of_each_part(case):
    trace = traces.read(case)
    found = _totals(record(trace.work))
    predicted = {
        traces.LOADING: found[LOAD] - (64 * 2**20 if case in LATE else 0),
        traces.FORWARD: max(found[FORWARD], found[HEAD]),
        traces.BACKWARD: max(found.get(name, 0) for name in (HEAD_BACKWARD, BACKWARD, RECOMPUTED)),
        traces.STEP: found[STEP],
    }
    for part, most in trace.peaks.items():
        assert -0.005 < predicted[part] / most - 1 < OVER.get(case, 0.005), part


def test_outliers_are_planned_for():
    trace = traces.read(OUTLIERS)
    assert 0 <= max(_totals(record(trace.work)).values()) / max(trace.peaks.values()) - 1 < 0.10


def test_recordings_are_of_the_versions_that_plans_count_on():
    assert all(traces.read(case).versions == MEASURED_WITH for case in traces.names())


TINY = Architecture(
    name="small",
    hidden=64,
    layers=3,
    heads=4,
    kv_heads=2,
    head_size=16,
    intermediate=160,
    vocabulary=512,
    tied=False,
    max_positions=4096,
)
LAYOUTS = (
    (STORED,) * 3,
    (CHECKPOINTED,) * 3,
    (OFFLOADED,) * 3,
    (CHECKPOINTED, CHECKPOINTED, STORED),
    (OFFLOADED, STORED, STORED),
)
TARGETS = (LINEAR_LAYERS, LINEAR_LAYERS[:4], ("q_proj", "v_proj"), ("k_proj", "up_proj"), ("down_proj",))
METHODS = ("nf4", "fp4", "int8", "lora", "full")
LASTING = {WEIGHTS, CONSTANTS, EMBEDDINGS, ADAPTERS, OPTIMIZER, LIBRARIES}


def make(method="nf4", layers=LAYOUTS[0], model=TINY, **fields) -> Workload:
    fields = {"rows": 2, "length": 96, "rank": 8, **fields}
    return Workload(
        model=replace(model, layers=len(layers)),
        layers=layers,
        quantization=None if method in ("lora", "full") else method,
        full=method == "full",
        **fields,
    )


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("method", METHODS)
def test_all_that_is_made_is_freed_once_and_only_what_lasts_stays(method, dtype):
    for kernel, layers, dropout, targets, rows, tied in itertools.product(
        KERNELS, LAYOUTS, (False, True), TARGETS, (1, 3), (False, True)
    ):
        if method == "full" and (dropout or targets != LINEAR_LAYERS):
            continue
        work = make(
            method,
            layers,
            replace(TINY, tied=tied),
            dtype=dtype,
            kernel=kernel,
            dropout=dropout,
            targets=targets,
            rows=rows,
            accumulation=1 + rows,
        )
        assert _left(record(work)) <= LASTING, work
        assert _left(record_steady(work)) <= {*LASTING, GRADIENTS}, work


def test_a_step_of_one_micro_batch_makes_its_gradients_anew():
    assert _left(record(make(accumulation=1))) == _left(record(make(accumulation=4)))


def test_a_mask_is_needed_where_several_rows_differ_in_length():
    def totals(**fields):
        return max(_totals(record(make(kernel="flash", length=512, **fields))).values())

    assert totals(rows=2, padded=True) > totals(rows=2, padded=False)
    assert totals(rows=1, padded=True) == totals(rows=1, padded=False)


@pytest.mark.parametrize("case", ["t4_all", "off_all", "lora_all", "full_all"])
def test_layers_that_are_kept_cost_memory(case):
    work = traces.read(case).work
    more = [work.replace(layers=(work.layers[0],) * (3 - stored) + (STORED,) * stored) for stored in range(4)]
    peaks = [outline(one).allocated for one in more]
    assert peaks == sorted(peaks)
    assert peaks[-1] > peaks[0]


def test_the_cache_is_emptied_once_after_loading():
    marks = [name for _, name in record(make()).marks]
    assert marks.count(EMPTIED) == 1
    assert marks.index(EMPTIED) < marks.index(FORWARD)


# Fused layers

FUSED = (
    *((kind,) * 3 for kind in (STORED, HALVED, CHECKPOINTED, OFFLOADED)),
    (CHECKPOINTED, HALVED, STORED),
    (OFFLOADED, STORED, HALVED),
)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("method", ["nf4", "lora"])
def test_fused_layers_too_free_all_that_they_make_once(method, dtype):
    for kernel, layers, targets, rows in itertools.product(("flash", "memory-efficient"), FUSED, TARGETS, (1, 3)):
        fields = {"dtype": dtype, "kernel": kernel, "targets": targets, "rows": rows, "accumulation": 1 + rows}
        work = make(method, layers, fused=True, **fields)
        assert _left(record(work)) <= LASTING, work
        assert _left(record_steady(work)) <= {*LASTING, GRADIENTS}, work


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("layers", FUSED)
def test_a_fused_micro_batch_leaves_its_adapters_gradients_and_nothing_else(layers, targets):
    tape = record(make(layers=layers, fused=True, targets=targets, accumulation=4))
    begins = [at for at, name in tape.marks if name == FORWARD]
    steps = [at for at, name in tape.marks if name == STEP]
    ends = [next(at for at in steps if at > begin) + 1 for begin in begins]  # the adapters' copies go last
    first, second = (
        sorted(tape.sizes[slot - 1] for slot in events if slot > 0 and -slot not in events)
        for events in (set(tape.events[begin:end]) for begin, end in zip(begins, ends, strict=True))
    )
    sides = [TINY.linear(name) for name in targets for _ in layers]
    assert first == sorted(4 * 8 * side for both in sides for side in both)
    assert second == [], "added to those of the first"


@pytest.mark.parametrize("method", ["nf4", "lora"])
@pytest.mark.parametrize("kernel", ["flash", "memory-efficient"])
def test_the_more_of_a_fused_layer_is_recomputed_the_less_it_takes(kernel, method):
    for targets, depth in itertools.product(TARGETS, (1, 2, 5)):
        peaks = [
            outline(make(method, (kind,) * depth, fused=True, targets=targets, kernel=kernel, length=512)).allocated
            for kind in (STORED, HALVED, CHECKPOINTED, OFFLOADED)
        ]
        assert peaks == sorted(peaks, reverse=True)
        if depth > 1:
            assert len(set(peaks)) == 4


@pytest.mark.parametrize("method", ["nf4", "lora"])
@pytest.mark.parametrize("kind", [STORED, CHECKPOINTED, OFFLOADED])
def test_fused_layers_take_less_than_those_of_transformers_and_peft(kind, method):
    plain, fused = (
        outline(make(method, (kind,) * 5, fused=fused, kernel="flash", length=512, padded=False)).allocated
        for fused in (False, True)
    )
    assert fused < plain


def test_rows_one_behind_the_other_are_a_matter_of_tokens_alone():
    def peaks(rows, length):
        return outline(make(fused=True, rows=rows, length=length, trained_tokens=100)).peaks

    assert peaks(8, 64) == peaks(2, 256) == peaks(1, 512)


def test_no_more_than_a_tile_of_logits_is_planned_for():
    def at_the_loss(tokens):
        work = make(layers=(CHECKPOINTED,), fused=True, rows=1, length=tokens, kernel="flash")
        return tape_peaks(record_steady(work))[HEAD]["loss"]

    kept, logits = 2 * TINY.hidden, 2 * (TINY.vocabulary + TINY.hidden)
    for tokens in (HEAD_TILE // 2 + 1, HEAD_TILE + 1, 4 * HEAD_TILE + 1):
        trained = tokens - 1
        assert at_the_loss(tokens) == kept * trained + logits * min(trained, HEAD_TILE)


def _totals(tape):
    return {instant: sum(buckets.values()) for instant, buckets in tape_peaks(tape).items()}


def _left(tape) -> set[str]:
    """Buckets of what is alive at the end of a tape; a second free of anything is a KeyError."""
    living = set()
    for event in tape.events:
        if event > 0:
            living.add(event)
        else:
            living.remove(-event)
    return {tape.buckets[slot - 1] for slot in living}


def test_copies_of_adapters_are_there_when_the_optimizers_part_begins():
    """torch's counters begin with what is there, and what is let go of right after counts."""
    work = make(layers=(STORED,) * 2, fused=True, rank=64)
    step, adapters = outline(work).peaks[STEP], sum(Step(work)._adapter(n, p) for n in work.targets for p in "AB") * 2
    assert step["adapters"] == pytest.approx((4 + 2) * adapters, rel=0.01)
