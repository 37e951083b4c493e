import pytest

from llamanb import Card, Recipe, plan
from llamanb.errors import GpuError
from llamanb.layout import EXPANDED_ATTENTION, Plan

T4 = Card("T4", (7, 5), 14.56, attention=("memory-efficient", "math"), attention_gqa=("math",))
L4 = Card("L4", (8, 9), 22.0, attention=("flash", "memory-efficient"), attention_gqa=("flash", "math"))
CPU = Card("CPU", None)


def test_a_t4_gets_fp16_and_attention_with_expanded_heads():
    p = plan(Recipe(), T4)
    assert (p.dtype, p.attention, p.optimizer) == ("fp16", EXPANDED_ATTENTION, "paged_adamw_8bit")
    assert p.checkpoint_layers
    assert "emulated" in p.reasons["dtype"]


def test_a_newer_card_gets_bf16_and_flash():
    p = plan(Recipe(), L4)
    assert (p.dtype, p.attention) == ("bf16", "sdpa")


def test_fp32_on_a_gpu_has_no_flash():
    assert plan(Recipe(precision="fp32"), L4).attention == EXPANDED_ATTENTION


def test_a_cpu_gets_fp32_and_keeps_its_activations():
    p = plan(Recipe(), CPU)
    assert (p.dtype, p.attention, p.optimizer) == ("fp32", "sdpa", "adamw_torch_fused")
    assert not p.checkpoint_layers


def test_bf16_on_a_t4_is_refused():
    with pytest.raises(GpuError, match=r"7\.5"):
        plan(Recipe(precision="bf16"), T4)


@pytest.mark.parametrize(
    ("length", "effective", "micro"),
    [(512, 16, 4), (1024, 16, 2), (4096, 16, 1), (128, 16, 16), (512, 6, 3), (512, 7, 1)],
)
def test_accumulation_is_derived(length, effective, micro):
    p = plan(Recipe(max_length=length, effective_batch_size=effective), T4)
    assert p.micro_batch_size == micro
    assert p.micro_batch_size * p.accumulation == effective


def test_what_is_asked_for_comes_first():
    p = plan(Recipe(micro_batch_size=8, checkpointing="none", optimizer="adamw_8bit", precision="fp32"), T4)
    assert (p.micro_batch_size, p.accumulation, p.checkpoint_layers) == (8, 2, False)
    assert (p.optimizer, p.dtype) == ("adamw_8bit", "fp32")
    assert plan(Recipe(checkpointing="all"), CPU).checkpoint_layers


def test_full_fine_tuning_keeps_exact_states():
    assert plan(Recipe(method="full"), L4).optimizer == "adamw_torch_fused"


def test_every_choice_has_its_reason_and_survives_json():
    for card in (T4, L4, CPU):
        p = plan(Recipe(targets=["q_proj"]), card)
        assert all(
            p.reasons[name] for name in ("dtype", "micro_batch_size", "checkpoint_layers", "attention", "optimizer")
        )
        assert Plan.from_json(p.to_json()) == p
        assert p.dtype in str(p)
