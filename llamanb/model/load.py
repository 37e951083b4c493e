"""From a plan to a model that is ready to train: loaded in the plan's arithmetic, quantized, with adapters."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoConfig, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llamanb import hub
from llamanb.architecture import Architecture, from_config, require_method
from llamanb.data.encode import end_token_ids
from llamanb.errors import LlamanbError, ModelError
from llamanb.layout import Plan
from llamanb.memory import segments_grow
from llamanb.model import attention
from llamanb.model.layers import lay_out
from llamanb.model.start import load_start
from llamanb.recipe import Recipe

REPEATED = 10_000_019
"""Random numbers that all random weights are made of, over and over: a host makes a billion of them in ten seconds."""
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def load_model(plan: Plan, tokenizer, shape: Architecture | None = None, streams=None) -> PreTrainedModel:
    """The recipe's base model on the plan's card, quantized as the recipe says, without adapters.

    Embeddings, head and norms stay in the 16-bit dtype they compute in: peft's usual preparation would cast them to
    fp32, 2 GiB more on 8B. Raises ModelError for weights that are missing or do not fit the config.

    Args:
        plan: made for the model; its `layers` are laid out.
        tokenizer: whose padding and end tokens the model gets.
        shape: random weights of this shape instead of the recipe's checkpoint, made on the device.
        streams: of several ranks (scale/sharded.py): what brings the layers to the card that they share; None: alone.
    """
    recipe = plan.recipe
    attention.register()
    if shape is None:
        folder = hub.checkpoint_folder(recipe.model, recipe.revision)
        config = AutoConfig.from_pretrained(folder)
    else:
        folder, config = None, random_config(shape)
    quantization = _quantization(recipe, config, DTYPES[plan.dtype])
    try:
        if plan.streamed:
            model = piecewise_model(plan, config, folder, streams)
        else:
            model, told = LlamaForCausalLM.from_pretrained(
                folder,
                output_loading_info=True,
                config=config,
                state_dict=_random_state(plan, config) if shape else None,
                dtype=weights_dtype(plan),  # never "auto": Llama's checkpoints say bf16, which a T4 only emulates
                quantization_config=quantization,
                device_map={"": torch.cuda.current_device() if plan.card.is_gpu else "cpu"},
                attn_implementation=plan.attention,
                use_safetensors=True,
                # From a mapped file, safetensors (0.8) leaves 64 bytes a tensor behind; a small one has room in memory
                disable_mmap=True if recipe.model == "tiny" else None,
            )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise _explain(error, recipe.model) from error
    if not plan.streamed:
        require_all(told["missing_keys"])  # which transformers makes up, and trains
    return prepared(model, plan, tokenizer)


def require_all(missing: Iterable[str]) -> None:
    """Raises ModelError where weights are missing."""
    if names := sorted(missing):
        why = f"{names[0]} is not among its weights" + (f", nor {len(names) - 1} others" if names[1:] else "")
        raise ModelError("the weights are not complete", why, "fetch the checkpoint again")


def prepared(model: LlamaForCausalLM, plan: Plan, tokenizer) -> LlamaForCausalLM:
    """A model as it was loaded, ready for the plan's training."""
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = end_token_ids(tokenizer)
    model.config.use_cache = False
    for weight in model.parameters():
        if getattr(weight, "quant_state", None) is not None:  # else those saved with bf16 are cast at each product
            weight.quant_state.dtype = DTYPES[plan.dtype]
    keep_gradients_on_cpu(model)
    lay_out(model, () if plan.fused else plan.layers)  # fused layers do it themselves
    return model


def weights_dtype(plan: Plan) -> torch.dtype:
    """What weights that are not quantized are held in: full fine-tuning adds updates too small for 16 bits."""
    return DTYPES[plan.dtype] if plan.recipe.adapters else torch.float32


def attach_adapters(model: PreTrainedModel, recipe: Recipe, *, start: bool = True) -> PeftModel:
    """New LoRA adapters in fp32 on the recipe's layers; the same seed gives the same adapters. They `start` from those
    that the checkpoint brings, where it brings some (start.py)."""
    torch.manual_seed(recipe.seed)
    adapted = get_peft_model(model, lora_config(recipe))
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # peft puts them where the weights are, which may be the host's memory
            parameter.data = parameter.data.to(model.device)
    # What a person needs to find the base again is its name, not where this machine keeps it
    adapted.peft_config["default"].base_model_name_or_path = recipe.model
    adapted.peft_config["default"].revision = recipe.revision
    if start:
        load_start(adapted, recipe)
    return adapted


def lora_config(recipe: Recipe) -> LoraConfig:
    """A recipe's adapters in peft's words."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(recipe.target_modules),
        use_rslora=recipe.rslora,
        use_dora=recipe.dora,
        bias="none",
    )


def keep_gradients_on_cpu(model: PreTrainedModel) -> None:
    """Switches off a packing of 4-bit weights that loses gradients.

    On a CPU with AVX512-BF16, bitsandbytes (0.50) packs a layer's weights at its first forward in eval mode, and the
    packed product has no backward: after one score, training would go on with no gradient through the base.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def random_config(shape: Architecture) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=shape.max_positions,
        rms_norm_eps=1e-5,
    )


def piecewise_model(plan: Plan, config: LlamaConfig, folder: Path | None, streams=None) -> LlamaForCausalLM:
    """Loaded weight by weight, those of the plan's streamed layers into host memory; random where there is no folder.
    Raises ModelError where a weight is not stored."""
    from llamanb.model.piecewise import load_planned

    attention.register()
    device = torch.device("cuda", torch.cuda.current_device()) if plan.card.is_gpu else torch.device("cpu")
    dtype = DTYPES[plan.dtype]
    random = None if folder else random_weights(config, dtype, device)
    model = load_planned(plan, config, folder, random, dtype, device, streams)
    if model.streamed and model.streamed.refused:
        warnings.warn(f"host memory is not pinned, so copies take longer: {model.streamed.refused}", stacklevel=4)
    return model


def random_weights(
    config: LlamaConfig, dtype: torch.dtype, device: torch.device | str
) -> tuple[Callable[[str], torch.Tensor], frozenset[str]]:
    """Random weights, each made when it is asked for by its name, and their names. What is in them changes neither
    memory nor, as long as it is not zeros, speed; but for int8, whose memory grows with outliers: gate and up are so
    wide that every column of their product has one."""
    with torch.device("meta"):
        names = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    numbers = torch.randn(REPEATED, generator=torch.Generator(device).manual_seed(0), device=device, dtype=dtype)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()

    def make(name: str) -> torch.Tensor:
        made = torch.ones(names[name], device=device, dtype=dtype)
        if made.dim() > 1:
            rolled = numbers.roll(zlib.crc32(name.encode()) % REPEATED)  # no two weights alike
            for part in made.view(-1).split(REPEATED):
                part.copy_(rolled[: len(part)])
            made *= 0.06 if "gate_proj" in name or "up_proj" in name else 0.02
        return made

    return make, frozenset(names.keys() - tied)


def _random_state(plan: Plan, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Made on the GPU it leaves pieces there, which only segments that grow give back; a checkpoint leaves none."""
    make, names = random_weights(config, weights_dtype(plan), "cuda" if plan.card.is_gpu and segments_grow() else "cpu")
    return {name: make(name) for name in sorted(names)}


def _quantization(recipe: Recipe, config, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    saved = getattr(config, "quantization_config", None)
    if saved is not None:  # such checkpoints are saved with bf16 arithmetic, which a T4 only emulates
        require_method(from_config(config.to_dict(), recipe.model), recipe)
        saved["bnb_4bit_compute_dtype"] = str(compute_dtype).removeprefix("torch.")
        return None
    if recipe.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if recipe.quantization:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=recipe.quantization,
            bnb_4bit_use_double_quant=recipe.double_quant,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    return None


def _explain(error: Exception, model: str) -> LlamanbError:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelError(
        f"the weights of {model} cannot be loaded",
        f"{type(error).__name__}: {text}",
        "a file may be missing or cut off: fetch the checkpoint again (`hf download --force-download`)",
    )
