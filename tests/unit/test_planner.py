"""Plans: what is chosen for which card, that it fits, and what is said where nothing does."""

import ast
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from llamanb import Card, Recipe, plan, planner
from llamanb.architecture import architecture
from llamanb.errors import GpuError, ModelError, RecipeError
from llamanb.layout import EXPANDED_ATTENTION, GIB, Plan
from llamanb.memory import predict
from llamanb.planner import MARGIN, MARGIN_ELSEWHERE, MEASURED_WITH, DoesNotFitError, search, workload_of
from llamanb.search import recomputed_steps, ways
from llamanb.tape import CHECKPOINTED, HALVED, OFFLOADED, STORED

MODELS = {
    "8B": "meta-llama/Llama-3.1-8B-Instruct",
    "3B": "meta-llama/Llama-3.2-3B-Instruct",
    "1B": "meta-llama/Llama-3.2-1B-Instruct",
}
SEVENTY = "meta-llama/Llama-3.3-70B-Instruct"
CPU = Card("CPU", None)
SLOW = Card("unknown", (8, 6), 12.0, attention_gqa=("flash",))
"""A card of which no speed is known."""
OTHER_VERSIONS = planner._other_versions


@pytest.fixture(autouse=True)
def measured_versions(monkeypatch):
    """Plans as with the versions that were measured, whatever is installed here."""
    monkeypatch.setattr(planner, "_other_versions", lambda: ())


def limit(card: Card, margin: float = MARGIN) -> float:
    return card.free_gib * (1 - margin)


def eight(**fields) -> Recipe:
    return Recipe(model=MODELS["8B"], **fields)


def replanned(made: Plan, kept: int = 0) -> float:
    """GiB of the same plan, or of one with so many steps (search.ways) less recomputed."""
    work = workload_of(made, architecture(made.recipe.model))
    if kept:
        work = work.replace(layers=ways(len(work.layers), fused=work.fused)[recomputed_steps(work) - kept])
    return predict(work).reserved / GIB


# What is chosen


def test_a_t4_gets_fp16_and_attention_with_expanded_heads():
    made = plan(eight(), "T4")
    assert (made.dtype, made.attention, made.kernel) == ("fp16", EXPANDED_ATTENTION, "memory-efficient")
    assert made.optimizer == "paged_adamw_8bit"
    assert "emulated" in made.reasons["dtype"]


@pytest.mark.parametrize(("card", "kernel"), [("L4", "flash"), ("RTX 4090", "flash"), ("H200", "cudnn")])
def test_a_newer_card_gets_bf16_and_a_kernel_that_takes_grouped_heads(card, kernel):
    as_they_are, fused = plan(eight(dropout=0.1, checkpointing="all"), card), plan(eight(), card)
    assert (as_they_are.dtype, as_they_are.attention, as_they_are.kernel) == ("bf16", "sdpa", kernel)
    assert (fused.dtype, fused.attention, fused.kernel) == ("bf16", "sdpa", "flash"), "rows one behind the other"
    assert as_they_are.reasons["attention"].startswith(kernel)
    assert fused.reasons["attention"].startswith("flash")


def test_a_card_on_which_cudnn_alone_takes_grouped_heads_has_fused_layers_with_expanded_ones():
    card = replace(Card.known("H200"), attention=("cudnn", "memory-efficient", "math"), attention_gqa=("cudnn", "math"))
    as_they_are, fused = plan(eight(dropout=0.1, checkpointing="all"), card), plan(eight(), card)
    assert (as_they_are.attention, as_they_are.kernel) == ("sdpa", "cudnn")
    assert (fused.fused, fused.attention, fused.kernel) == (True, EXPANDED_ATTENTION, "memory-efficient")


@pytest.mark.parametrize("card", ["T4", "RTX 4090", "H200"])
@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, ""),
        ({"method": "lora"}, ""),
        ({"method": "qlora-fp4", "double_quant": False, "targets": "attention", "checkpointing": "offloaded"}, ""),
        ({"method": "qlora-int8"}, "int8"),
        ({"method": "full"}, "adapters only"),
        ({"dropout": 0.1}, "dropout"),
        ({"dora": True}, "DoRA"),
    ],
)
def test_layers_are_fused_where_they_can_be(fields, why, card):
    made = plan(Recipe(model=MODELS["1B"], max_length=512, **fields), card, force=True)
    assert made.fused == (not why)
    assert (why or "the same numbers in fewer kernels") in made.reasons["fused"]
    assert workload_of(made, architecture(MODELS["1B"])).fused == made.fused


def test_fp32_on_a_gpu_has_no_flash():
    made = plan(eight(precision="fp32"), "L4")
    assert (made.attention, made.kernel) == (EXPANDED_ATTENTION, "memory-efficient")


@pytest.mark.parametrize("capability", [(7, 5), (8, 6), (9, 0)])
def test_kernels_that_nobody_tried_are_those_of_the_capability(capability):
    by_hand = plan(eight(max_length=512), Card("mine", capability, 24.0))
    known = plan(eight(max_length=512), {(7, 5): "T4", (8, 6): "RTX 3090", (9, 0): "H200"}[capability])
    assert (by_hand.attention, by_hand.kernel) == (known.attention, known.kernel)
    assert by_hand.reasons["attention"] == f"{known.reasons['attention']} (by its compute capability; not tried)"


def test_on_wsl2_no_state_is_planned_to_leave_the_gpu():
    wsl = replace(Card.known("RTX 3090"), pages=False)
    assert plan(eight(), wsl).optimizer == "adamw_8bit"
    assert "WSL2" in plan(eight(), wsl).reasons["optimizer"]
    assert plan(eight(optimizer="adamw_8bit"), wsl).memory == plan(eight(), wsl).memory
    full = Recipe(model=MODELS["1B"], method="full", optimizer="paged_adamw_32bit", micro_batch_size=1, max_length=512)
    assert plan(full, "RTX 3090").optimizer == "paged_adamw_32bit"
    on_wsl = plan(full, wsl, force=True)
    assert on_wsl.optimizer == "adamw_torch_fused"
    assert on_wsl.memory.buckets["optimizer"] > 8 * GIB


def test_a_cpu_gets_fp32_and_keeps_its_activations():
    made = plan(Recipe(max_length=512), CPU)
    assert (made.dtype, made.attention, made.optimizer) == ("fp32", "sdpa", "adamw_torch_fused")
    assert (made.layers, made.recomputed, made.memory) == ((), 0, None)
    assert set(plan(Recipe(checkpointing="all", max_length=512), CPU).layers) == {CHECKPOINTED}


@pytest.mark.parametrize(("length", "effective", "rows"), [(512, 16, 4), (1024, 16, 2), (4096, 16, 1), (512, 7, 1)])
def test_a_cpu_computes_few_tokens_at_once(length, effective, rows):
    made = plan(eight(max_length=length, effective_batch_size=effective), CPU)
    assert (made.micro_batch_size, made.accumulation) == (rows, effective // rows)


def test_full_fine_tuning_keeps_exact_states():
    assert plan(Recipe(model=MODELS["1B"], method="full"), "A100 80").optimizer == "adamw_torch_fused"


@pytest.mark.parametrize(("checkpointing", "kind"), [("none", STORED), ("all", CHECKPOINTED), ("offloaded", OFFLOADED)])
@pytest.mark.parametrize("card", ["T4", "RTX 4090"])
def test_checkpointing_is_done_as_asked(checkpointing, kind, card):
    made = plan(eight(checkpointing=checkpointing), card)
    assert set(made.layers) == {kind}
    assert made.reasons["layers"] == "as asked"


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
def test_a_micro_batch_that_is_asked_for_is_kept(rows):
    made = plan(eight(micro_batch_size=rows, max_length=512), "RTX 4090")
    assert (made.micro_batch_size, made.accumulation, made.alternatives) == (rows, 16 // rows, ())
    assert made.reasons["micro_batch_size"] == "as asked"


def test_optimizer_and_precision_are_kept():
    made = plan(Recipe(model=MODELS["1B"], optimizer="adamw_8bit", precision="fp32"), "T4")
    assert (made.optimizer, made.dtype) == ("adamw_8bit", "fp32")


def test_layers_are_recomputed_where_memory_is_short_and_the_first_ones():
    roomy, tight = (plan(eight(max_length=2048), card) for card in ("RTX 4090", "RTX 3060"))
    assert roomy.recomputed == 0
    assert 0 < tight.recomputed < 32
    assert tight.layers == (HALVED,) * tight.recomputed + (STORED,) * (32 - tight.recomputed)
    tightest = plan(eight(max_length=8192), "RTX 3060").layers
    assert tightest == (CHECKPOINTED,) * (whole := tightest.count(CHECKPOINTED)) + (HALVED,) * (32 - whole)
    assert 0 < whole < 32
    not_fused = plan(eight(dropout=0.1), "RTX 3060")
    assert 0 < not_fused.recomputed < 32
    assert not_fused.layers == (CHECKPOINTED,) * not_fused.recomputed + (STORED,) * (32 - not_fused.recomputed)


def test_nothing_else_that_fits_is_estimated_faster():
    made = plan(eight(), "RTX 3060")
    assert made.alternatives
    for other in made.alternatives:
        assert other.needs_gib > limit(made.card) or other.step_s >= made.step_s


def test_a_card_of_unknown_speed_gets_the_plan_with_the_fewest_layers_recomputed():
    made = plan(eight(), SLOW)
    assert made.time is None
    assert made.needs_gib <= limit(SLOW)
    assert all(one.recomputed >= made.recomputed for one in made.alternatives if one.needs_gib <= limit(SLOW))
    assert str(made)


def test_the_longest_row_that_is_there_counts():
    data = SimpleNamespace(train=[SimpleNamespace(input_ids=range(n)) for n in (5, 700, 30)])
    made = plan(eight(max_length=8192, epochs=20), "T4", data)
    assert made.steps == 20, "a pass over three rows is a step"
    assert made.memory == plan(eight(max_length=700), "T4").memory
    made = plan(eight(max_length=8192, effective_batch_size=6), CPU, data)
    assert (made.length, made.micro_batch_size, made.steps) == (700, 2, 1)


def test_changes_are_offered_for_the_rows_that_are_there():
    data = SimpleNamespace(train=[SimpleNamespace(input_ids=range(n)) for n in (5, 4000, 30)])
    recipe = eight(max_length=8192, micro_batch_size=4, checkpointing="all", weights="resident")
    with pytest.raises(DoesNotFitError) as caught:
        plan(recipe, "RTX 3060", data)
    changes = {change.split(" = ")[0]: (change, needs) for change, needs, _ in caught.value.changes.rows}
    assert 128 < ast.literal_eval(changes["max_length"][0].split(" = ")[1]) < 4000
    assert (
        changes["micro_batch_size"][1]
        == f"{plan(recipe.replace(micro_batch_size=None), 'RTX 3060', data).needs_gib:.2f} GiB"
    )


def test_a_model_of_the_most_layers_is_planned_in_seconds():
    deep = replace(architecture(MODELS["1B"]), layers=1024)
    begin_s = time.perf_counter()
    made = search(Recipe(model="deep", max_length=4096), Card.known("H200"), deep, force=True)
    assert 0 < recomputed_steps(workload_of(made, deep)) < 2048
    assert time.perf_counter() - begin_s < 5


# It fits


@pytest.mark.parametrize("card", ["T4", "RTX 3060", "L4", "RTX 4090", "A100 40", "H200"])
@pytest.mark.parametrize("method", ["qlora-nf4", "qlora-int8", "lora", "full"])
@pytest.mark.parametrize("size", MODELS)
def test_a_plan_fits_and_leaves_no_more_than_two_layers_room(size, method, card):
    for length in (512, 2048, 4096):
        made = plan(Recipe(model=MODELS[size], method=method, max_length=length), card, force=True)
        room = limit(made.card)
        assert made.micro_batch_size * made.accumulation == 16
        assert (made.needs_gib > room) == (not made.fits) == (made.reasons["layers"] == "nothing fits")
        assert made.needs_gib == pytest.approx(replanned(made))
        less = 4 if made.fused else 3  # a fused layer's MLP is three fifths of it
        if made.recomputed >= less and OFFLOADED not in made.layers:
            assert replanned(made, less) > room


def test_other_versions_leave_more_room_and_ask_for_a_rehearsal(monkeypatch):
    as_measured = plan(eight(micro_batch_size=2), "RTX 3060")
    assert "rehearse" not in as_measured.basis
    monkeypatch.setattr(planner, "_other_versions", lambda: (("torch", "9.9.9"),))
    made = plan(eight(micro_batch_size=2), "RTX 3060")
    assert made.needs_gib <= limit(made.card, MARGIN_ELSEWHERE)
    assert made.recomputed > as_measured.recomputed
    assert "torch 9.9.9" in made.basis
    assert "rehearse(plan)" in str(made)


def test_versions_are_compared_with_what_is_installed(monkeypatch):
    installed = {**MEASURED_WITH, "torch": "2.11.0+cu130", "trl": "1.99.0"}
    monkeypatch.setattr(planner.importlib.metadata, "version", installed.__getitem__)
    assert OTHER_VERSIONS.__wrapped__() == (("trl", "1.99.0"),)


def test_dora_asks_for_a_rehearsal():
    assert "rehearse(plan)" in plan(eight(dora=True), "RTX 4090").basis


# Nothing fits


@pytest.fixture(scope="module")
def refused():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "_other_versions", lambda: ())
        with pytest.raises(DoesNotFitError) as caught:
            plan(Recipe(model=SEVENTY, weights="resident"), "RTX 4090")
    return caught.value


def test_what_does_not_fit_is_said_with_its_numbers(refused):
    closest = refused.plan
    assert closest.micro_batch_size == 1
    assert set(closest.layers) == {OFFLOADED}
    assert f"{closest.needs_gib:.2f} GiB" in refused.what
    assert f"{limit(closest.card):.2f}" in refused.what
    assert "weights" in refused.why
    assert f"{closest.memory.buckets['weights'] / GIB:.2f} GiB" in refused.why
    assert refused.fix == refused.changes.rows[0][0] == "weights = 'streamed'"
    assert "a larger card" in "\n".join(refused._render_traceback_())


CASES = [
    (Recipe(model=SEVENTY, weights="resident"), "RTX 4090"),
    (Recipe(model=SEVENTY, dropout=0.1), "RTX 4090"),
    (eight(checkpointing="none", max_length=2048, rank=64, weights="resident"), "RTX 3060"),
    (eight(micro_batch_size=16, max_length=4096, checkpointing="all"), "T4"),
    (eight(max_length=131072), "T4"),
    (eight(method="lora"), "T4"),
    (Recipe(model=MODELS["1B"], method="full"), "T4"),
    (eight(precision="fp32", max_length=32768, weights="resident"), "T4"),
]


@pytest.mark.parametrize(("recipe", "card"), CASES)
def test_every_change_that_is_listed_fits(recipe, card):
    with pytest.raises(DoesNotFitError) as caught:
        plan(recipe, card)
    assert caught.value.changes.rows
    for change, needs, costs in caught.value.changes.rows:
        if change.startswith("a larger card: "):
            made = plan(recipe, change.removeprefix("a larger card: "))
        else:
            fields = dict(one.split(" = ") for one in change.split(", "))
            made = plan(recipe.replace(**{name: ast.literal_eval(value) for name, value in fields.items()}), card)
        assert needs == f"{made.needs_gib:.2f} GiB"
        assert costs


@pytest.mark.parametrize(("recipe", "card"), CASES)
def test_a_forced_plan_comes_closest(recipe, card):
    made = plan(recipe, card, force=True)
    assert made.needs_gib > limit(made.card)
    assert not made.fits
    assert ("too much" in str(made)) == (made.needs_gib > made.card.free_gib)


# What cannot be


@pytest.mark.parametrize(
    ("fields", "card", "kind", "says"),
    [
        ({"model": MODELS["8B"]}, "RTX 9999", GpuError, "RTX 9999"),
        ({"model": MODELS["8B"], "precision": "bf16"}, "T4", GpuError, r"7\.5"),
        ({"model": "meta-llama/Meta-Llama-3-8B", "max_length": 8193}, "T4", RecipeError, "8192 positions"),
        ({"model": "unsloth/Meta-Llama-3.1-8B-bnb-4bit", "method": "lora"}, "T4", ModelError, "already quantized"),
    ],
)
def test_what_cannot_be_is_one_clear_error(fields, card, kind, says):
    with pytest.raises(kind, match=says):
        plan(Recipe(**fields), card)


def test_on_a_cpu_too_a_model_is_looked_at(tmp_path):
    with pytest.raises(RecipeError, match="512 positions"):
        plan(Recipe(max_length=513), CPU)
    assert plan(Recipe(max_length=513), CPU, force=True).length == 513, "an adapter is loaded with its own recipe"
    with pytest.raises(ModelError, match="already quantized"):
        plan(Recipe(model="unsloth/Meta-Llama-3.1-8B-bnb-4bit", method="lora"), CPU)
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    with pytest.raises(ModelError, match="not a Llama"):
        plan(Recipe(model=str(tmp_path)), CPU)


# As data


@pytest.mark.parametrize(
    ("fields", "card"),
    [
        ({"model": MODELS["8B"], "targets": ["q_proj"]}, Card.known("T4")),
        ({"model": MODELS["8B"], "checkpointing": "offloaded"}, Card.known("L4")),
        ({"model": MODELS["1B"], "method": "full", "stop_after_min": 5}, Card.known("H200")),
        ({"model": MODELS["8B"], "steps": 1000, "stop_after_min": 5}, Card.known("RTX 3060")),
        ({"model": MODELS["8B"]}, SLOW),
        ({"max_length": 512}, CPU),
    ],
)
def test_every_choice_has_its_reason_and_survives_json(fields, card):
    made = plan(Recipe(**fields), card)
    choices = ("dtype", "micro_batch_size", "layers", "fused", "attention", "optimizer")
    assert all(made.reasons[name] for name in choices)
    assert Plan.from_json(made.to_json()) == made
    assert made.dtype in str(made)
    assert made.dtype in made._repr_html_()


def test_a_plan_for_a_card_of_the_table_needs_neither_torch_nor_matplotlib():
    code = f"""
import sys
from llamanb import Recipe, plan
made = plan(Recipe(model={MODELS["8B"]!r}), "T4", force=True)
made._repr_html_(), str(made)
print([name for name in ("torch", "matplotlib", "transformers", "numpy") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# What was measured is what is installed

MEASURE_AGAIN = "{} moved to {} and the tape was held against {}: measure benchmarks/memory.py again"
TORCH_PINNED = "2.13.0"
"""The CPU's. The GPU measurements were made with MEASURED_WITH["torch"]."""


@pytest.mark.parametrize("package", MEASURED_WITH)
def test_pins_are_what_was_measured(package):
    pins = dict(
        line.split("==") for line in (Path(__file__).parents[2] / "constraints.txt").read_text().split() if "==" in line
    )
    expected = TORCH_PINNED if package == "torch" else MEASURED_WITH[package]
    assert pins[package] == expected, MEASURE_AGAIN.format(package, pins[package], MEASURED_WITH[package])
    assert MEASURED_WITH["torch"] == "2.11.0", "with the same torch as the pin, drop TORCH_PINNED"


def test_dora_is_planned_for_with_room():
    plain, dora = (
        plan(Recipe(model="meta-llama/Llama-3.1-8B-Instruct", dora=dora, micro_batch_size=1), "RTX 4090")
        for dora in (False, True)
    )
    assert dora.memory.allocated > 1.5 * plain.memory.allocated or dora.recomputed > plain.recomputed
    assert dora.limit_gib < plain.limit_gib
    assert "DoRA" in dora.basis
