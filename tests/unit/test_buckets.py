"""What lasts, tensor by tensor, against a count by hand of the mini model: two layers, 64 wide, a vocabulary of 512."""

from types import SimpleNamespace

import pytest
import torch

from llamanb import Card, Recipe, plan
from llamanb.data.encode import load_tokenizer
from llamanb.model import attach_adapters, load_model
from llamanb.tape.workload import ADAPTERS, BUCKETS, CONSTANTS, EMBEDDINGS, GRADIENTS, OPTIMIZER, WEIGHTS
from llamanb.watch.buckets import lasting_bytes

CPU = Card("CPU", None)
FP32 = 4
LINEAR = 2 * [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
"""Outputs and inputs of q, k, v, o, gate, up and down, twice."""
SIZE = sum(outputs * inputs for outputs, inputs in LINEAR)
NORMS = 5 * 64 * FP32
POSITIONS = 2 * 8 * FP32
"""transformers keeps the inverse frequencies of rotary embeddings, and the original ones beside them."""
VOCABULARY = 512 * 64 * FP32
"""Embeddings and head are tied."""
RANK = 4
ADAPTER_SIZE = sum(RANK * (outputs + inputs) for outputs, inputs in LINEAR)


@pytest.fixture
def model(mini):
    """`model("lora")`: the mini model, ready to train."""

    def made(method, **fields):
        recipe = Recipe(model=str(mini), dataset="rows.jsonl", method=method, max_length=16, rank=RANK, **fields)
        loaded = load_model(plan(recipe, CPU), load_tokenizer(mini))
        return attach_adapters(loaded, recipe) if recipe.adapters else loaded

    return made


def trained(model):
    """The model and its optimizer after a step, gradients still there."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(input_ids=torch.arange(10)[None], labels=torch.arange(10)[None]).loss.backward()
    optimizer.step()
    return lasting_bytes(model, optimizer)


def test_adapters_over_plain_weights(model):
    made = model("lora")
    before = {WEIGHTS: SIZE * FP32 + NORMS + POSITIONS, EMBEDDINGS: VOCABULARY, ADAPTERS: ADAPTER_SIZE * FP32}
    before |= {CONSTANTS: 0, GRADIENTS: 0, OPTIMIZER: 0}
    assert lasting_bytes(made) == before
    tensors = 2 * len(LINEAR)  # a pair of matrices each; Adam keeps two averages and a count of steps of each
    assert trained(made) == before | {
        GRADIENTS: ADAPTER_SIZE * FP32,
        OPTIMIZER: 2 * ADAPTER_SIZE * FP32 + tensors * FP32,
    }


@pytest.mark.parametrize("double_quant", [True, False])
def test_adapters_over_four_bits(model, double_quant):
    found = trained(model("qlora-nf4", double_quant=double_quant))
    assert found[WEIGHTS] == SIZE // 2 + NORMS + POSITIONS
    blocks = SIZE // 64
    table = 16 * FP32
    if double_quant:  # a byte a block; for each 256 of them a number; of each layer two tables and an offset
        assert found[CONSTANTS] == blocks + len(LINEAR) * (FP32 + table + 256 * FP32 + FP32)
    else:
        assert found[CONSTANTS] == blocks * FP32 + len(LINEAR) * table
    assert found[EMBEDDINGS] == VOCABULARY
    assert found[ADAPTERS] == found[GRADIENTS] == ADAPTER_SIZE * FP32


def test_int8_keeps_its_scales_whether_it_has_run_or_not(model):
    """bitsandbytes moves them from the weights to the layer at the first forward pass."""
    made = model("qlora-int8")
    scales = sum(outputs for outputs, _ in LINEAR) * FP32
    before = lasting_bytes(made)
    assert before[CONSTANTS] == scales
    assert before[WEIGHTS] == SIZE + NORMS + POSITIONS
    after = trained(made)
    assert (after[CONSTANTS], after[WEIGHTS]) == (scales, before[WEIGHTS])


def test_full_fine_tuning_has_a_gradient_for_every_weight(model):
    found = trained(model("full"))
    everything = SIZE * FP32 + NORMS + VOCABULARY
    assert found[WEIGHTS] + found[EMBEDDINGS] - POSITIONS == found[GRADIENTS] == everything
    assert found[ADAPTERS] == found[CONSTANTS] == 0
    assert found[OPTIMIZER] == pytest.approx(2 * everything, rel=0.001)


def test_dora_s_magnitudes_are_adapters(model):
    more = sum(outputs for outputs, _ in LINEAR) * FP32
    assert lasting_bytes(model("lora", dora=True))[ADAPTERS] == ADAPTER_SIZE * FP32 + more


def test_paged_states_count_as_nothing(model):
    paged, resident = torch.zeros(100), torch.zeros(10)
    paged.is_paged = True
    optimizer = SimpleNamespace(state={1: {"state1": paged, "state2": paged, "step": 3}, 2: {"state1": resident}})
    assert lasting_bytes(model("lora"), optimizer)[OPTIMIZER] == resident.nbytes


def test_buckets_are_the_plan_s(model):
    assert set(lasting_bytes(model("lora"))) <= set(BUCKETS)


def test_a_weight_that_waits_elsewhere_is_not_on_the_device(model):
    made = model("lora")
    before, mlp = lasting_bytes(made), made.get_decoder().layers[0].mlp
    mlp.down_proj.base_layer.weight = torch.nn.Parameter(mlp.down_proj.base_layer.weight.to("meta"))
    assert lasting_bytes(made) == before | {WEIGHTS: before[WEIGHTS] - 64 * 128 * FP32}
