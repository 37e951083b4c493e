"""A 4-bit model loaded weight by weight, for layers that are streamed: each is quantized on the card by itself and goes
to host memory or disk at once, so that neither the card nor the host ever holds more than what stays there and one
weight."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import bitsandbytes as bnb
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils.quantization_config import QuantizationMethod

from llamanb import disk
from llamanb.errors import ModelError
from llamanb.layout import Plan
from llamanb.model.homes import DiskLayer
from llamanb.model.load import require_all
from llamanb.model.quantized import QuantizedLayers, now_and_then
from llamanb.model.streamed import HostEmbedding, StreamedLayers
from llamanb.model.weight_files import Span, WeightFile
from llamanb.recipe import Recipe
from llamanb.tape.workload import BLOCK, BUFFERS

Read = Callable[[str], Tensor]
"""A stored tensor by its name, in host memory or on the card."""


FETCH = "fetch it again (`hf download --force-download`) and train again, which goes on from the last checkpoint"


class Source(NamedTuple):
    """What a checkpoint stores."""

    read: Read
    stored: frozenset[str]
    """Names of its tensors: of 16 bits, or with the constants of 4."""
    where: Callable[[str], Span] | None = None
    """Where those of a layer lie that waits on disk, once they were read."""


def load_planned(
    plan: Plan,
    config: LlamaConfig,
    folder: Path | None,
    random: tuple[Read, frozenset[str]] | None,
    dtype: torch.dtype,
    device: torch.device,
    streams=None,
) -> LlamaForCausalLM:
    """`load_piecewise` for a plan, from a checkpoint's folder or from `random` weights; those keep the files of what
    waits on disk for as long as the model is there."""
    with contextlib.ExitStack() as until_loaded:
        source, home = files(folder) if folder else Source(*random), None
        if folder:
            home = QuantizedLayers.folder(folder, plan.recipe, dtype)
        elif plan.on_disk:
            disk.layers_folder().mkdir(parents=True, exist_ok=True)
            home = Path(
                until_loaded.enter_context(tempfile.TemporaryDirectory(prefix="random-", dir=disk.layers_folder()))
            )
        if home:
            together = streams.make_together if streams else None
            source = quantized(source, home, config, plan.recipe, dtype, device, plan.on_disk, together)
        where = {"dtype": dtype, "device": device, "attention": plan.attention}
        where |= {"streamed": plan.streamed, "on_disk": plan.on_disk}
        says = streams is None or streams.says
        model = load_piecewise(
            config, plan.recipe, source, streams=streams if plan.shards > 1 else None, says=says, **where
        )
        if plan.on_disk:
            with streams.alone() if streams else contextlib.nullcontext():
                said = disk.measure(model.streamed.hosts[plan.on_disk[0]].path) if says else None
        if plan.on_disk and says:
            planned = plan.card.disk_gbs or disk.GBS
            speed = f", which reads {said:.2f} GB/s; {planned:.2f} were planned with" if said else ""
            layers = f"{len(plan.on_disk)} of {len(plan.layers)} layers"
            print(f"the weights of {layers} wait on disk{speed}", flush=True)
        return model


def load_piecewise(
    config: LlamaConfig,
    recipe: Recipe,
    source: Source,
    *,
    streamed: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    attention: str,
    on_disk: Collection[int] = (),
    streams=None,
    says: bool = True,
) -> LlamaForCausalLM:
    """A Llama in 4 bits, with the weights of its `streamed` layers in host memory, or of some of them on disk
    (`on_disk`), and its token embedding where the head is not the same; as its `streamed` the StreamedLayers that bring
    them, None where there is none.

    Args:
        source: of 16 bits, which are quantized as the recipe says, or in 4 bits already.
        dtype: of arithmetic, and of what is not quantized.
        attention: transformers' name of it.
        streams: in the place of StreamedLayers, with a `home` for each layer.
        says: whether to print how far it has come, where that takes long.

    Raises ModelError where a weight is not stored, or linear layers have biases, which no Llama 3 has.
    """
    if config.attention_bias or config.mlp_bias:
        why = "its linear layers have biases, which are not brought along"
        raise ModelError("its weights cannot wait outside of the card", why, 'weights = "resident"')
    read, stored, where = source
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation=attention)
    decoder = model.get_decoder()
    decoder.rotary_emb = LlamaRotaryEmbedding(config).to(device)  # what it computes is stored nowhere
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    require_all({name for name, _ in model.named_parameters()} - tied - stored)
    for name in [name for name, _ in model.named_parameters()]:  # first what is large when it is cast
        if name == "model.embed_tokens.weight" and streamed and not tied:
            decoder.embed_tokens = HostEmbedding(read(name).to(dtype), device)
        elif not name.endswith("_proj.weight") and name not in tied:
            made = nn.Parameter(read(name).to(device, dtype), requires_grad=False)
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], made)
    hosts, tell = {}, now_and_then(says)
    for number, layer in enumerate(decoder.layers):
        tell(f"{number} of {len(decoder.layers)} layers loaded")
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    path = f"model.layers.{number}.{_name(layer, part)}.{name}.weight"
                    weight = _weight(path, recipe, read, stored, dtype, device)
                    setattr(part, name, _linear(child, recipe, weight, number in streamed))
        if number in on_disk:
            hosts[number] = DiskLayer(layer, where, f"model.layers.{number}")
        elif number in streamed:
            hosts[number] = (streams or StreamedLayers).home(layer, device)
    if tied:
        model.tie_weights()
    model.is_loaded_in_4bit = True  # peft asks this, and the Trainer the next line, before it would move the model
    model.quantization_method = QuantizationMethod.BITS_AND_BYTES
    model.streamed = (streams or StreamedLayers)(decoder.layers, hosts, BUFFERS, device) if streamed else None
    return model.eval()


def quantized(
    source: Source,
    home: Path,
    config: LlamaConfig,
    recipe: Recipe,
    dtype: torch.dtype,
    device: torch.device,
    on_disk: Collection[int] = (),
    together: Callable[[QuantizedLayers, int], None] | None = None,
) -> Source:
    """The same with its layers in 4 bits. Those of 16 bits are quantized once, and kept in `home` for the next time;
    `together` has each of several ranks do it with some of them first.

    Raises SafetensorError or OSError for a file that cannot be read, DiskFullError where layers that wait on disk have
    no room."""
    read, stored, _ = source
    if any(name.endswith(".weight.absmax") for name in stored):
        return source
    layers = {
        number: sorted(name for name in stored if name.startswith(f"model.layers.{number}.") and "_proj." in name)
        for number in range(config.num_hidden_layers)
    }
    of_layer = {name: number for number, names in layers.items() for name in names}
    cache = QuantizedLayers(home, read, layers, recipe, dtype, device, on_disk)
    constants = QuantizedLayers.constants(recipe)
    if together:
        together(cache, config.num_hidden_layers)

    def layer_of(name: str) -> int | None:
        return of_layer.get(f"{name.partition('.weight')[0]}.weight")

    def read_quantized(name: str) -> Tensor:
        number = layer_of(name)
        return read(name) if number is None else cache.layer(number)[name]

    names = stored | {f"{name}.{part}" for name in of_layer for part in constants}
    return Source(read_quantized, names, lambda name: cache.span(layer_of(name), name))


def files(folder: Path) -> Source:
    """What a checkpoint stores, and how to read it. Raises SafetensorError or OSError for a file that cannot be."""
    places, opened = {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            places |= dict.fromkeys(file.keys(), path)

    def read(name: str) -> Tensor:
        with safe_open(places[name], "pt") as file:
            return file.get_tensor(name)

    def where(name: str) -> Span:
        path = places[name]
        if path not in opened:
            opened[path] = WeightFile(path, FETCH)
        opened[path].forget()  # what was read of it to get here
        return opened[path].span(name)

    return Source(read, frozenset(places), where)


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
