"""Predicted memory: deep models from shallow tapes, what it grows with, and what a bucket holds."""

import itertools

import pytest

from llamanb.architecture import architecture
from llamanb.memory import REPLAYED, outline, predict, replay, tape_peaks
from llamanb.recipe import LINEAR_LAYERS
from llamanb.tape import CHECKPOINTED, HEAD, OFFLOADED, STEP, STORED, Workload, record, record_steady
from llamanb.tape.workload import (
    ADAPTERS,
    BUCKETS,
    CONSTANTS,
    EMBEDDINGS,
    GRADIENTS,
    JOINED,
    LIBRARIES,
    LOSS,
    OPTIMIZER,
    TEMPORARIES,
    WEIGHTS,
)
from tests.unit.test_tape import METHODS, make

EIGHT, ONE = "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"
SEVENTY = "meta-llama/Llama-3.3-70B-Instruct"
DEEP = (
    (CHECKPOINTED,) * 7,
    (STORED,) * 7,
    (OFFLOADED,) * 7,
    (CHECKPOINTED,) * 4 + (STORED,) * 3,
    (CHECKPOINTED,) + (STORED,) * 6,
    (CHECKPOINTED,) * 6 + (STORED,),
    (OFFLOADED,) * 5 + (STORED,) * 2,
    (STORED,),
    (OFFLOADED, STORED),
)


def of(name: str, stored: int = 0, kind: str = CHECKPOINTED, **fields) -> Workload:
    model = architecture(name)
    layers = (kind,) * (model.layers - stored) + (STORED,) * stored
    return Workload(**{"model": model, "rows": 1, "length": 1024, "layers": layers, **fields})


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("layers", DEEP)
@pytest.mark.parametrize("method", METHODS)
def test_a_deep_model_is_outlined_exactly(method, layers, accumulation):
    for dtype, kernel, length, rows in itertools.product(("fp16", "fp32"), ("flash", "math"), (96, 640), (1, 2)):
        fields = {"dtype": dtype, "kernel": kernel, "length": length, "rows": rows, "accumulation": accumulation}
        work = make(method, layers, **fields)
        assert outline(work).peaks == tape_peaks(record(work)), work


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("length", [256, 3072])
def test_full_fine_tuning_is_outlined_within_a_percent(length, accumulation):
    """Not exactly: whether a backward pass is highest where it begins or where it ends depends on the depth."""
    fields = {"quantization": None, "full": True, "dtype": "fp32", "optimizer": "adamw_torch_fused"}
    for stored in (0, 8, 16):
        work = of(ONE, stored, length=length, accumulation=accumulation, **fields)
        whole = max(sum(buckets.values()) for buckets in tape_peaks(record(work)).values())
        assert -0.01 < outline(work).allocated / whole - 1 <= 0


@pytest.mark.parametrize(("stored", "kind"), [(0, CHECKPOINTED), (0, OFFLOADED), (9, CHECKPOINTED), (32, STORED)])
def test_8b_is_outlined_exactly(stored, kind):
    work = of(EIGHT, stored, kind, rows=2, length=512)
    assert outline(work).peaks == tape_peaks(record(work))


def test_what_a_micro_batch_writes_is_counted_exactly():
    work = make("nf4", DEEP[3])
    tape = record_steady(work)
    begin = next(at for at, name in tape.marks if name == "forward")
    new = [tape.sizes[event - 1] for event in tape.events[begin:] if event > 0]
    assert (outline(work).written, outline(work).operations) == (sum(new), len(new))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("length", (256, 512, 1024, 4096)),
        ("rows", (1, 2, 4, 8)),
        ("rank", (8, 16, 64, 256)),
        ("targets", (("q_proj",), LINEAR_LAYERS[:4], LINEAR_LAYERS)),
        ("quantization", ("nf4", "int8", None)),
        ("optimizer", ("paged_adamw_8bit", "adamw_8bit", "adamw_torch_fused")),
    ],
)
@pytest.mark.parametrize("stored", [0, 6, 16])
def test_more_of_it_takes_more_memory(field, values, stored):
    needed = [outline(of(ONE, stored, **{field: one})).allocated for one in values]
    assert needed == sorted(set(needed))


def test_offloading_takes_less_than_recomputing_and_recomputing_less_than_keeping():
    layouts = ((0, OFFLOADED), (0, CHECKPOINTED), (32, STORED))
    needed = [outline(of(EIGHT, stored, kind, rows=4)).allocated for stored, kind in layouts]
    assert needed == sorted(set(needed))


def test_dropout_takes_memory_where_activations_are_kept():
    assert outline(of(ONE, 16, dropout=True)).allocated > outline(of(ONE, 16)).allocated


def test_the_loss_takes_less_where_fewer_tokens_are_trained():
    answers = of(ONE, length=4096, trained_tokens=100)
    fewer, all_of_them = (outline(work).peaks[HEAD][LOSS] for work in (answers, answers.replace(trained_tokens=None)))
    assert fewer == pytest.approx(all_of_them * 100 / 4095, rel=0.01)


def test_constants_quantized_once_more_save_0_0466_bytes_a_parameter():
    model = architecture(EIGHT)
    once, twice = (outline(of(EIGHT, double_quant=flag)).peaks[STEP] for flag in (False, True))
    quantized = model.layers * model.layer_linear_parameters
    assert (once[CONSTANTS] - twice[CONSTANTS]) / quantized == pytest.approx(4 / 64 - 1 / 64 - 4 / 64 / 256, rel=0.001)
    assert (once[CONSTANTS] - twice[CONSTANTS]) / quantized == pytest.approx(0.0466, abs=0.0001)
    assert twice[WEIGHTS] / quantized == pytest.approx(0.5, rel=0.001)


def test_the_buckets_of_qlora_are_what_they_say():
    model = architecture(EIGHT)
    steady = outline(of(EIGHT, rank=16)).peaks[STEP]
    trained = model.layers * 16 * sum(sum(model.linear(name)) for name in LINEAR_LAYERS)
    assert trained == 41_943_040  # as peft counts them
    assert steady[ADAPTERS] == 4 * trained
    assert steady[GRADIENTS] == 4 * trained
    assert steady[EMBEDDINGS] == 2 * 2 * model.embedding_parameters
    assert steady[LIBRARIES] == 8_519_680
    exact = outline(of(EIGHT, rank=16, optimizer="adamw_torch_fused")).peaks[STEP]
    assert exact[OPTIMIZER] == 8 * trained
    assert steady[OPTIMIZER] < exact[OPTIMIZER] / 4


@pytest.mark.parametrize(("optimizer", "a_parameter"), [("adamw_torch_fused", 8), ("adamw_8bit", 2 + 8 / 256)])
def test_full_fine_tuning_takes_four_bytes_a_weight_four_a_gradient_and_the_states(optimizer, a_parameter):
    model = architecture(ONE)
    work = of(ONE, quantization=None, full=True, dtype="bf16", kernel="cudnn", optimizer=optimizer)
    steady = outline(work).peaks[STEP]
    assert steady[WEIGHTS] + steady[EMBEDDINGS] == pytest.approx(4 * model.parameters, rel=0.001)
    assert steady[GRADIENTS] == pytest.approx(4 * model.parameters, rel=0.001)
    assert steady[OPTIMIZER] == pytest.approx(a_parameter * model.parameters, rel=0.001)


def test_what_is_updated_at_once_is_copied_a_layer_at_a_time():
    """Weights and gradients, 4 bytes each; fused layers let go of more than that when the optimizer's part begins."""

    def copied(rank=16, **fields):
        return outline(of(EIGHT, rank=rank, **fields)).peaks[STEP][TEMPORARIES]

    model = architecture(EIGHT)
    assert copied() == 8 * 16 * sum(sum(model.linear(name)) for name in LINEAR_LAYERS) == 10_485_760
    assert copied(fused=True) == copied(joined=False) == copied(optimizer="adamw_torch_fused") == 0
    assert 0 < copied(rank=128) <= 8 * JOINED


def test_paged_states_are_not_on_the_card():
    paged, kept = (
        outline(of(ONE, quantization=None, full=True, optimizer=name)).peaks[STEP][OPTIMIZER]
        for name in ("paged_adamw_32bit", "adamw_torch_fused")
    )
    assert paged < kept / 1000


def test_a_prediction_adds_up():
    memory = predict(of(ONE, 8, rows=4))
    assert memory.allocated == memory.peaks[memory.instant] == sum(memory.buckets.values())
    assert memory.reserved == memory.allocated + memory.gaps
    assert set(memory.buckets) == set(BUCKETS)
    assert memory.gaps > 0


@pytest.mark.parametrize("expandable", [True, False])
def test_what_a_shallow_model_reserves_is_replayed(expandable):
    work = of(ONE, 5, rows=2)
    assert len(work.layers) <= REPLAYED
    whole = replay(record(work), expandable=expandable).peak_reserved
    assert predict(work, expandable=expandable).reserved == pytest.approx(whole, rel=0 if expandable else 0.01)


@pytest.mark.parametrize("name", [EIGHT, SEVENTY])
@pytest.mark.parametrize("stored", [0, 10, 32])
def test_what_a_deep_model_reserves_is_near_the_replay_of_its_whole_tape(name, stored):
    work = of(name, stored, rows=4, length=512)
    assert predict(work).reserved == pytest.approx(replay(record(work)).peak_reserved, rel=0.01)


def test_the_user_s_own_allocator_settings_are_planned_for(monkeypatch):
    work = of("meta-llama/Llama-3.2-1B-Instruct", 8, rank=128)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    growing = predict(work)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:128")
    assert predict(work) == predict(work, expandable=False)
    assert growing == predict(work, expandable=True)
    assert growing.reserved != predict(work).reserved
