"""A 4-bit model loaded weight by weight, for layers that are streamed: each is quantized on the card by itself and goes
to host memory at once, so that neither the card nor the host ever holds more than what stays there and one weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import bitsandbytes as bnb
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils.quantization_config import QuantizationMethod

from llamanb.errors import ModelError
from llamanb.model.quantized import QuantizedLayers
from llamanb.model.streamed import HostEmbedding, StreamedLayers
from llamanb.recipe import Recipe
from llamanb.tape.workload import BLOCK, BUFFERS

Read = Callable[[str], Tensor]
"""A stored tensor by its name, in host memory or on the card."""


def load_piecewise(
    config: LlamaConfig,
    recipe: Recipe,
    read: Read,
    stored: frozenset[str],
    *,
    streamed: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    attention: str,
    streams: Callable | None = None,
) -> LlamaForCausalLM:
    """A Llama in 4 bits, with the weights of its `streamed` layers in host memory, and its token embedding where the
    head is not the same; as its `streamed` the StreamedLayers that bring them, None where there is none. What else
    `streams` takes layers only.

    Args:
        read: gives the tensors that `stored` names: of 16 bits, which are quantized as the recipe says, or of a
            checkpoint that is in 4 bits already.
        dtype: of arithmetic, and of what is not quantized.
        attention: transformers' name of it.
        streams: makes the StreamedLayers, from what those are made of; None: they themselves.

    Raises ModelError where a weight is not stored.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation=attention)
    decoder = model.get_decoder()
    decoder.rotary_emb = LlamaRotaryEmbedding(config).to(device)  # what it computes is stored nowhere
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if missing := sorted({name for name, _ in model.named_parameters()} - tied - stored):
        why = f"{missing[0]} is not among its weights" + (f", nor {len(missing) - 1} others" if missing[1:] else "")
        raise ModelError("the weights are not complete", why, "fetch the checkpoint again")
    for number, layer in enumerate(decoder.layers):
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    path = f"model.layers.{number}.{_name(layer, part)}.{name}.weight"
                    weight = _weight(path, recipe, read, stored, dtype, device)
                    setattr(part, name, _linear(child, recipe, weight, number in streamed))
    for name, parameter in list(model.named_parameters()):
        if name == "model.embed_tokens.weight" and streamed and not (tied or streams):
            decoder.embed_tokens = HostEmbedding(read(name).to(dtype), device)
        elif parameter.is_meta and name not in tied:
            made = nn.Parameter(read(name).to(device, dtype), requires_grad=False)
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], made)
    if tied:
        model.tie_weights()
    model.is_loaded_in_4bit = True  # peft asks this, and the Trainer the next line, before it would move the model
    model.quantization_method = QuantizationMethod.BITS_AND_BYTES
    model.streamed = (streams or StreamedLayers)(decoder.layers, streamed, BUFFERS, device) if streamed else None
    return model.eval()


def quantized(
    folder: Path, config: LlamaConfig, recipe: Recipe, dtype: torch.dtype, device: torch.device
) -> tuple[Read, frozenset[str]]:
    """What a checkpoint stores, its layers in 4 bits, and how to read it. Of a 16-bit one they are quantized once, and
    kept for the next time. Raises SafetensorError or OSError for a file that cannot be read."""
    read, stored = files(folder)
    if any(name.endswith(".weight.absmax") for name in stored):
        return read, stored
    layers = {
        number: sorted(name for name in stored if name.startswith(f"model.layers.{number}.") and "_proj." in name)
        for number in range(config.num_hidden_layers)
    }
    of_layer = {name: number for number, names in layers.items() for name in names}
    cache = QuantizedLayers(folder, read, layers, recipe, dtype, device)
    constants = QuantizedLayers.constants(recipe)

    def read_quantized(name: str) -> Tensor:
        weight = f"{name.partition('.weight')[0]}.weight"
        return cache.layer(of_layer[weight])[name] if weight in of_layer else read(name)

    return read_quantized, stored | {f"{name}.{part}" for name in of_layer for part in constants}


def files(folder: Path) -> tuple[Read, frozenset[str]]:
    """What a checkpoint stores, and how to read it. Raises SafetensorError or OSError for a file that cannot be."""
    places = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            places |= dict.fromkeys(file.keys(), path)

    def read(name: str) -> Tensor:
        with safe_open(places[name], "pt") as file:
            return file.get_tensor(name)

    return read, frozenset(places)


def _name(layer: nn.Module, part: nn.Module) -> str:
    return next(name for name, child in layer.named_children() if child is part)


def _weight(
    path: str, recipe: Recipe, read: Read, stored: frozenset[str], dtype: torch.dtype, device: torch.device
) -> bnb.nn.Params4bit:
    """In 4 bits on the card."""
    more = {name.removeprefix(f"{path}."): name for name in stored if name.startswith(f"{path}.")}
    if more:
        stats: Mapping[str, Tensor] = {name: read(full) for name, full in more.items()}
        weight = bnb.nn.Params4bit.from_prequantized(read(path), stats, requires_grad=False, device=device)
        weight.quant_state.dtype = dtype
        return weight
    options = {"compress_statistics": recipe.double_quant, "quant_type": recipe.quantization}
    data, state = bnb.functional.quantize_4bit(read(path).to(device, dtype), blocksize=BLOCK, **options)
    return bnb.nn.Params4bit(data, False, state, BLOCK, bnb_quantized=True, **options)


class InHostMemory(bnb.nn.Linear4bit):
    """Stays there when the model is moved to the card as a whole, which accelerate does before it trains one."""

    def _apply(self, fn, recurse=True):
        return self


def _linear(like: nn.Linear, recipe: Recipe, weight: bnb.nn.Params4bit, streamed: bool) -> bnb.nn.Linear4bit:
    state = weight.quant_state
    made = (InHostMemory if streamed else bnb.nn.Linear4bit)(
        like.in_features,
        like.out_features,
        bias=False,
        compute_dtype=state.dtype,
        compress_statistics=recipe.double_quant,
        quant_type=recipe.quantization,
        device="meta",
    )
    if streamed:
        weight.data = weight.data.cpu()
        for one in (state, state.state2) if state.nested else (state,):
            one.absmax = one.absmax.cpu()
    made.weight, made.quant_state, weight.module = weight, state, made
    return made
