"""Factored Llamas: linear layers as two thinner ones after each other, which train, save and load as modules do.

Such a checkpoint is no plain Llama: a plain loader would fill in what it does not find with random numbers. So its
config.json has a `model_type` of its own, which plain loaders refuse; `load_factored` reads it, and `write_products`
writes the products out as a plain Llama for everything that reads only those, `train` among it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llamanb import hub
from llamanb.architecture import Architecture, from_config
from llamanb.errors import UNREADABLE, ModelError, RecipeError
from llamanb.export import stored
from llamanb.export.adapter import Adapter
from llamanb.export.read import read_rows
from llamanb.recipe import LINEAR_LAYERS
from llamanb.run import Run
from llamanb.shrink.walk import Checkpoint, Layer
from llamanb.shrink.write import facts_of, require_free, written

KIND = "llamanb_factored"
"""`model_type` of such a checkpoint."""
RANKS = "ranks"
"""Field of its config: rank of each linear layer by `key`, 0 for one that is whole."""


class Factored(nn.Module):
    """W x as up (down x), with down (rank, in) and up (out, rank)."""

    def __init__(self, width: int, out: int, rank: int):
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x))


def key(number: int, name: str) -> str:
    """What a linear layer is called in RANKS: `3.q_proj`."""
    return f"{number}.{name}"


def parameters(ranks: Mapping[str, int], shape: Architecture) -> int:
    """Of the linear layers, factored."""
    sizes = {name: shape.linear(name) for name in LINEAR_LAYERS}
    pairs = [(rank, *sizes[k.rpartition(".")[2]]) for k, rank in ranks.items()]
    return sum(rank * (m + n) if rank else m * n for rank, m, n in pairs)


def kept(ranks: Mapping[str, int], shape: Architecture) -> float:
    """Share of the linear layers' parameters."""
    return parameters(ranks, shape) / (shape.layers * shape.layer_linear_parameters)


def put_factors(layer: Layer, name: str, directions: torch.Tensor, dtype: torch.dtype) -> None:
    """Gives a layer the factors of one of its weights: in its state both, in its module their product."""
    weight = layer.weight(name)
    up, down = directions.to(dtype), (directions.T @ weight).to(dtype)
    layer.put(name, (up.float() @ down.float()).to("cpu", dtype))
    path = next(path for path in layer.state if path.endswith(f"{name}.weight"))
    del layer.state[path]
    layer.state |= {path.replace("weight", "down.weight"): down.cpu(), path.replace("weight", "up.weight"): up.cpu()}


def load_factored(folder: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> LlamaForCausalLM:
    """A factored checkpoint as a model whose factored layers are `Factored`; in eval mode, all of it trainable.

    Raises ModelError where the folder holds none, or not all of it.
    """
    folder = Path(folder)
    config, ranks = _config(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
        for number, layer in enumerate(model.model.layers):
            for name in LINEAR_LAYERS:
                parent = layer.self_attn if name in LINEAR_LAYERS[:4] else layer.mlp
                if rank := ranks[key(number, name)]:
                    whole = getattr(parent, name)
                    setattr(parent, name, Factored(whole.in_features, whole.out_features, rank))
    state = {name: read_rows(tensor).to(device, dtype) for name, tensor in stored.tensors(folder).items()}
    missing = [name for name, _ in model.named_parameters() if name not in state]
    if missing:
        fix = "make it again with write_factored"
        raise ModelError(f"the weights in {folder} are not complete", f"{missing[0]} is missing", fix)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config).to(device)  # made of the config, not loaded
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.requires_grad_(True).eval()


def write_products(folder: str | Path, to: str | Path) -> Path:
    """A factored checkpoint as a plain Llama, each pair of factors multiplied: as large as the one it was made from.

    For tools that read only plain Llamas, and to train adapters on; `absorb` takes those back into the factors.
    Raises ModelError where the folder holds none, RecipeError where `to` is taken.
    """
    source = _Source(folder)
    require_free(to)
    with written(source.checkpoint, to, source.layers, share=source.whole_share) as output:
        for number in range(source.layers):
            state = source.checkpoint.layer_state(number)
            for path, up, down in source.factors(state):
                state[path] = up.float() @ down.float()
            output.layer(state)
        facts = {"method": "products of factors", "factored": str(folder), "weights": hub.fingerprint(Path(folder))}
        plain = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], RANKS: None}
        output.finish(plain, facts, "the products of a factored model's factors, written out")
    return Path(to)


def absorb(run: Run | str | Path, folder: str | Path, to: str | Path) -> Path:
    """Takes an adapter that was trained on the products into the factors: of rank r, it makes those of rank k into
    such of rank k + r, [up, scale B] and [down; A], which give what product and adapter give.

    Args:
        run: whose adapter, trained on `write_products(folder)`.
        folder: the factored checkpoint.
        to: the folder to make.

    Raises:
        RecipeError: the run was trained on something else, or `to` is taken.
        ModelError: the adapter is no plain LoRA, or the folder no factored checkpoint.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    source, adapter = _Source(folder), Adapter.open(run.saved)
    recipe = run.plan.recipe
    if recipe.model == "tiny" or facts_of(recipe.model).get("weights") != hub.fingerprint(Path(folder)):
        why = f"it was trained on {recipe.model}, which holds no products of these factors"
        raise RecipeError(f"{run.folder} is not for {folder}", why, "train on write_products(folder)")
    if recipe.dora:
        why = "DoRA scales each row of the sum, which two factors cannot say"
        raise ModelError(f"the adapter in {run.saved} cannot become factors", why, "train with dora = False")
    require_free(to)
    ranks = dict(source.ranks)
    with written(source.checkpoint, to, source.layers, share=1.5) as output:
        for number in range(source.layers):
            state = source.checkpoint.layer_state(number)
            prefix = f"model.layers.{number}."
            for path, up, down in list(source.factors(state)):
                if parts := adapter.parts(prefix + path):
                    up = torch.cat([up.float(), parts.scale * parts.up], 1)
                    down = torch.cat([down.float(), parts.down])
                    ranks[key(number, path.split(".")[1])] += len(parts.down)
                stem = path.removesuffix("weight")
                state |= {f"{stem}up.weight": up, f"{stem}down.weight": down}
            for path in [path for path in state if adapter.parts(prefix + path)]:  # whole ones
                parts = adapter.parts(prefix + path)
                state[path] = torch.addmm(state[path].float(), parts.up, parts.down, alpha=parts.scale)
            output.layer(state)
        facts = facts_of(folder) | {
            RANKS: ranks,
            "kept": kept(ranks, source.checkpoint.shape),
            "adapter": str(run.saved),
        }
        output.finish({RANKS: ranks}, facts, f"factors, with an adapter of rank {recipe.rank} taken in")
    return Path(to)


class _Source:
    """A factored checkpoint as it lies on disk."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        config, self.ranks = _config(folder)
        shape = from_config(config | {"model_type": "llama"}, str(folder))
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.checkpoint = Checkpoint(str(folder), folder, fields, shape, stored.tensors(folder))
        self.layers = shape.layers

    @property
    def whole_share(self) -> float:
        """Bytes of the plain Llama, of those on disk here."""
        here = sum(tensor.size for tensor in self.checkpoint.tensors.values())
        return self.checkpoint.shape.parameters * self.checkpoint.dtype.itemsize / here

    @staticmethod
    def factors(state: dict[str, torch.Tensor]):
        """(name of the weight, up, down) of each factored one of a layer's; they leave the state."""
        for name in [name for name in state if name.endswith(".down.weight")]:
            path = name.replace(".down.weight", ".weight")
            down, up = state.pop(name), state.pop(name.replace(".down.", ".up."))
            yield path, up, down


def _config(folder: Path) -> tuple[dict, dict[str, int]]:
    """The fields of a Llama's config, and the ranks. Raises ModelError where it is none of a factored one's."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        ranks = {
            key(i, name): int(config[RANKS][key(i, name)])
            for i in range(config["num_hidden_layers"])
            for name in LINEAR_LAYERS
        }
        if config.pop("model_type") != KIND:
            raise ValueError("model_type")
    except UNREADABLE as error:
        raise ModelError(
            f"{folder} holds no factored Llama",
            f"config.json: {type(error).__name__}: {error}",
            "give a folder that write_factored made; a plain Llama loads with AutoModelForCausalLM",
        ) from None
    return {name: value for name, value in config.items() if name not in (RANKS, "architectures")}, ranks
