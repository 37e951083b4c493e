"""A checkpoint walked through layer by layer: one decoder layer on the device, all else on disk or in host memory.

What calibration rows come to between two layers waits in host memory, so a model that is larger than the device is
walked through on it: of 8B a layer is 0.44 GB, and 128 rows of 1,024 tokens between two layers are 1.1 GB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from llamanb import hub
from llamanb.architecture import Architecture, from_config
from llamanb.card import Card
from llamanb.data import TrainingData
from llamanb.errors import DataError, ModelError
from llamanb.export import stored
from llamanb.export.base import Base
from llamanb.export.read import DTYPES, read_rows
from llamanb.export.source import require_names
from llamanb.export.stored import Stored
from llamanb.model import attention
from llamanb.model.load import DTYPES as COMPUTED
from llamanb.planner import plan
from llamanb.recipe import LINEAR_LAYERS, Recipe

CALIBRATION_ROWS = 128
TOKENS_AT_ONCE = 4096
"""Padded tokens that go through a layer together, one row at least."""
SHARED = {
    "q_proj": LINEAR_LAYERS[:3],
    "o_proj": ("o_proj",),
    "gate_proj": LINEAR_LAYERS[4:6],
    "down_proj": ("down_proj",),
}
"""Linear layers that get the same input, by the first of them."""


@dataclass(frozen=True)
class Checkpoint:
    """A 16- or 32-bit checkpoint of the Llama architecture."""

    name: str
    folder: Path
    config: dict
    """Its config.json."""
    shape: Architecture
    tensors: dict[str, Stored]

    @classmethod
    def open(cls, model: str, revision: str = "main") -> Checkpoint:
        """Raises ModelError where there is none, it is quantized, has biases, or is not complete."""
        folder = hub.checkpoint_folder(model, revision)
        config = hub.read_config(folder, model)
        shape = from_config(config, model)
        if shape.quantization:
            raise ModelError(
                f"{model} is quantized ({shape.quantization}), and cannot be made smaller further",
                "what is small among quantized weights is decided by their blocks, and factors of them are not theirs",
                "give the 16-bit checkpoint that it was made from, and quantize the result: method = 'qlora-nf4'",
            )
        if config.get("attention_bias") or config.get("mlp_bias"):
            fix = "give a checkpoint without them, as Meta's Llama 3 are"
            raise ModelError(f"{model} has biases", "they are not made smaller along with their weights here", fix)
        base = Base(stored.tensors(folder))
        require_names(base, shape, folder)
        return cls(model, folder, config, shape, base.tensors)

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored weights."""
        return DTYPES[self.tensors["model.embed_tokens.weight"].dtype]

    def layer_state(self, number: int) -> dict[str, torch.Tensor]:
        """A decoder layer's weights as they are stored, by their names within the layer."""
        prefix = f"model.layers.{number}."
        names = [name for name in self.tensors if name.startswith(prefix) and name.endswith(".weight")]
        return {name.removeprefix(prefix): read_rows(self.tensors[name]) for name in sorted(names)}


def calibration(data: TrainingData | None, count: int = CALIBRATION_ROWS) -> list[list[int]]:
    """Token ids of the first rows to train on. Raises DataError where there are none."""
    rows = [row.input_ids for row in data.train[: max(0, count)]] if data else []
    if not rows:
        why = "what the weights are multiplied with is measured on rows, and " + (
            f"{count} of {len(data.train)} are to be taken" if data else "none are given"
        )
        raise DataError("calibration rows are missing", why, "data = load_data(recipe), and calibration_rows = 128")
    return rows


@dataclass
class Layer:
    """A decoder layer, on the device to be computed with and in host memory as it is stored."""

    module: LlamaDecoderLayer
    state: dict[str, torch.Tensor]

    def linear(self, name: str) -> torch.nn.Linear:
        return getattr(self.module.self_attn if name in LINEAR_LAYERS[:4] else self.module.mlp, name)

    def stored(self, name: str) -> torch.Tensor:
        return self.state[path_of(name)]

    def weight(self, name: str) -> torch.Tensor:
        """(out, in) of one of LINEAR_LAYERS in fp32, on the device."""
        return self.linear(name).weight.detach().float()

    def put(self, name: str, weight: torch.Tensor) -> None:
        """Gives one of LINEAR_LAYERS another weight, which may be smaller; in the dtype and place of the stored one."""
        there = self.linear(name).weight
        self.state[path_of(name)] = weight
        self.linear(name).weight = torch.nn.Parameter(weight.to(there.device, there.dtype), requires_grad=False)


class Walk:
    """The way through a checkpoint, with calibration rows or without.

    Args:
        checkpoint: whose layers are visited.
        recipe: says in which precision.
        rows: token ids of the calibration rows; none where nothing is measured.
        card: another card than the one at hand, as it pretends to be.
    """

    def __init__(
        self, checkpoint: Checkpoint, recipe: Recipe, rows: Iterable[list[int]] = (), card: Card | None = None
    ):
        made = plan(recipe, card, force=True)
        attention.register()
        self.checkpoint = checkpoint
        self.device = torch.device("cuda" if made.card.is_gpu else "cpu")
        self.dtype = COMPUTED[made.dtype]
        self._config = AutoConfig.from_pretrained(checkpoint.folder, attn_implementation=made.attention)
        self._rotary = LlamaRotaryEmbedding(self._config).to(self.device)
        self._masks: list[torch.Tensor] = []
        self._states: list[torch.Tensor] = []
        self._embed(sorted(rows, key=len))

    @property
    def has_rows(self) -> bool:
        return bool(self._states)

    def layer(self, number: int) -> Layer:
        """A decoder layer read from disk onto the device."""
        state = self.checkpoint.layer_state(number)
        with torch.device("meta"):
            module = LlamaDecoderLayer(self._config, number)
        on_device = {name: tensor.to(self.device, self.dtype) for name, tensor in state.items()}
        module.load_state_dict(on_device, assign=True)
        return Layer(module.eval().requires_grad_(False), state)

    @torch.no_grad()
    def measure(self, layer: Layer, products: bool = False) -> dict[str, torch.Tensor]:
        """What the layer's linear layers are given: the mean square of each input feature (in), or the mean of
        their products x xᵀ (in, in); fp32, by name of the linear layer."""
        sums, tokens = {}, 0

        def watch(name: str):
            def hook(_, args):
                x = args[0][self._mask].float()
                sums[name] = sums.get(name, 0) + (x.T @ x if products else x.square().sum(0))

            return layer.linear(name).register_forward_pre_hook(hook)

        hooks = [watch(name) for name in SHARED]
        for _, mask in self._through(layer):
            tokens += int(mask.sum())
        for hook in hooks:
            hook.remove()
        return {name: sums[first] / tokens for first, names in SHARED.items() for name in names}

    @torch.no_grad()
    def advance(self, layer: Layer) -> float:
        """Takes the rows through the layer. Returns its influence: 1 - cosine of what goes in and what comes out, mean
        over the tokens (block influence: Men et al. 2024, ShortGPT)."""
        influence, tokens = 0.0, 0
        for i, (after, mask) in enumerate(self._through(layer)):
            before = self._states[i].to(self.device)[mask].float()
            cosine = torch.nn.functional.cosine_similarity(before, after[mask].float(), dim=-1)
            influence, tokens = influence + (1 - cosine).sum().item(), tokens + int(mask.sum())
            self._states[i] = after.to("cpu")
        return influence / max(1, tokens)

    def _through(self, layer: Layer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for states, mask in zip(self._states, self._masks, strict=True):
            states, self._mask = states.to(self.device), mask.to(self.device)
            places = torch.arange(states.shape[1], device=self.device)[None]
            angles = self._rotary(states, position_ids=places)
            yield layer.module(states, position_embeddings=angles, position_ids=places), self._mask

    @torch.no_grad()
    def _embed(self, rows: list[list[int]]) -> None:
        """Rows of like length together, padded on the right: under causal attention no token sees the padding."""
        if not rows:
            return
        table = read_rows(self.checkpoint.tensors["model.embed_tokens.weight"])
        batch: list[list[int]] = []
        for i, row in enumerate(rows):
            batch.append(row)
            if i + 1 == len(rows) or len(rows[i + 1]) * (len(batch) + 1) > TOKENS_AT_ONCE:
                width = len(row)  # the longest
                ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in batch])
                self._states.append(table[ids].to(self.dtype))
                self._masks.append(torch.arange(width) < torch.tensor([[len(ids)] for ids in batch]))
                batch = []


def path_of(name: str) -> str:
    """Name of a linear layer's weight within its decoder layer."""
    return f"{'self_attn' if name in LINEAR_LAYERS[:4] else 'mlp'}.{name}.weight"
