"""Small Llamas with adapters, for tests of fused layers."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from llamanb.model.fused import Places
from llamanb.model.row_attention import for_rows
from llamanb.recipe import LINEAR_LAYERS
from llamanb.tape import CHECKPOINTED, HALVED, OFFLOADED, STORED

KINDS = (STORED, HALVED, CHECKPOINTED, OFFLOADED)
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
VOCABULARY, RANK = 97, 3


def tiny(layers=4, targets=LINEAR_LAYERS, *, base=SHAPE, **settings) -> torch.nn.Module:
    """A Llama of random fp32 weights, norms too, with adapters whose B is not zero."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**SHAPE, "num_hidden_layers": layers, "vocab_size": VOCABULARY, **base})
    return trained(LlamaForCausalLM(config), targets, **settings)


def trained(model, targets=LINEAR_LAYERS, **settings):
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.add_(torch.randn_like(weight), alpha=0.2)
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, r=RANK, lora_alpha=5, **settings))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)
    return adapted


def places(lengths, dtype=torch.float64):
    angles = torch.cat([torch.arange(n) for n in lengths])[:, None] * torch.linspace(1, 0.1, 4).repeat(2)
    return Places(angles.cos().to(dtype), angles.sin().to(dtype), for_rows(lengths, "", torch.device("cpu")))
