"""Fused layers on a GPU: their kernels, and adapters' gradients against fp32: pytest tests/gpu/test_fused_gpu.py -s

Two layers of Llama 3.2 1B's shape, adapters on all linear layers, the same weights in fp16 and fp32.
"""

from dataclasses import replace

import bitsandbytes.functional as bnb
import pytest
import torch
from peft.tuners.lora import LoraLayer

from llamanb import Card, Recipe
from llamanb.architecture import architecture
from llamanb.model import attach_adapters, load_model
from llamanb.model.elementwise import Fast, dequantize
from llamanb.model.fused import FusedDecoder
from llamanb.model.head import head_loss
from llamanb.planner import search
from llamanb.rehearsal import _tokenizer
from llamanb.tape import CHECKPOINTED, HALVED, OFFLOADED, STORED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]
MODEL = "meta-llama/Llama-3.2-1B-Instruct"
LAYERS = 2
LENGTHS = {"even": [256, 256], "uneven": [256, 31, 200]}


def model_in(kernel: str, weights: dict | None = None):
    """The model with adapters, and its plan; with the adapters' `weights` where they are given."""
    shape = replace(architecture(MODEL), layers=LAYERS)
    recipe = Recipe(model=MODEL, precision="fp16", checkpointing="none", micro_batch_size=1, effective_batch_size=1)
    plan = search(recipe, replace(Card.present(), name="here"), shape, force=True)
    plan = plan.replace(kernel=kernel, layers=(STORED,) * LAYERS)
    model = attach_adapters(load_model(plan, _tokenizer(), shape), recipe).train()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if weights:
                parameter.data.copy_(weights[name])
            elif "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
    return model


def widened(model):
    """The model in fp32, with the very numbers that the 4-bit weights stand for."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            exact = dequantize(module.get_base_layer().weight).float()
            module.base_layer = torch.nn.Linear(*exact.shape[::-1], bias=False, device="meta")
            module.base_layer.weight = torch.nn.Parameter(exact, requires_grad=False)
    return model.float()


def gradients(model, kinds, kernel: str, lengths: list[int], scale: float) -> tuple[float, dict]:
    torch.manual_seed(0)
    ids = torch.randint(0, 128_000, (sum(lengths),)).cuda()
    labels = torch.cat([torch.cat((row[1:], row.new_full((1,), -100))) for row in ids.split(lengths)])
    model.zero_grad()
    decoder = FusedDecoder(model, kinds, kernel)
    with decoder.step():
        loss = head_loss(decoder(ids, lengths), model.get_output_embeddings().weight, labels) / sum(lengths)
        (loss * scale).backward()
    found = {name: p.grad.double() / scale for name, p in model.named_parameters() if p.requires_grad}
    return loss.item(), found


@pytest.mark.parametrize("rows", LENGTHS)
@pytest.mark.parametrize("kernel", ["memory-efficient", "flash"])
def test_every_layout_has_the_gradients_of_fp32(kernel, rows, monkeypatch):
    narrow = model_in(kernel)
    weights = {name: p.data for name, p in narrow.named_parameters() if p.requires_grad}
    wide = widened(model_in("memory-efficient", weights))
    with monkeypatch.context() as patch:
        patch.setattr(Fast, "why_not", "as a reference")
        loss, exact = gradients(wide, (STORED,) * LAYERS, "memory-efficient", LENGTHS[rows], 1.0)
    assert not Fast.why_not, "the kernels run here"
    for kinds in ((STORED,) * 2, (HALVED,) * 2, (CHECKPOINTED,) * 2, (OFFLOADED,) * 2, (CHECKPOINTED, STORED)):
        seen, found = gradients(narrow, kinds, kernel, LENGTHS[rows], 1024.0)
        assert seen == pytest.approx(loss, rel=1e-3)
        cosines = {
            name: torch.nn.functional.cosine_similarity(found[name].flatten(), exact[name].flatten(), dim=0).item()
            for name in exact
        }
        least = min(cosines, key=cosines.get)
        print(f"{kernel}, {rows}, {kinds}: least cosine {cosines[least]:.6f}, {least}")
        assert cosines[least] >= 0.9999


def test_dequantized_weights_are_bitsandbytes_own():
    for layer in model_in("flash").get_decoder().layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.mlp.down_proj):
            weight = linear.base_layer.weight
            assert torch.equal(dequantize(weight), bnb.dequantize_4bit(weight.data, weight.quant_state))
