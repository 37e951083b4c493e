"""Layer shapes and parameter counts of a Llama, from its config.json: what a plan has to know of a model.

    from llamanb.architecture import architecture
    architecture("meta-llama/Llama-3.1-8B-Instruct").parameters    # 8030261248, without a byte downloaded

The Llama 3 family is known by name; anything else reads its own config.json, a few kilobytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamanb import hub, tiny
from llamanb.errors import ModelError
from llamanb.recipe import LINEAR_LAYERS, Recipe

QUANTIZATIONS = ("nf4", "fp4", "int8")
"""What bitsandbytes writes into a checkpoint."""
BLOCK = 64
"""Weights that share a constant in bitsandbytes' 4 bits."""


@dataclass(frozen=True)
class Architecture:
    """Layer shapes of a Llama, from its config.json."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    tied: bool
    """Embedding and head are one matrix."""
    max_positions: int
    """Tokens that its positions reach."""
    quantization: str | None = None
    """What the checkpoint already is: one of QUANTIZATIONS, or None for 16 or 32 bits."""

    @property
    def q(self) -> int:
        """Width of the queries of one token."""
        return self.heads * self.head_size

    @property
    def kv(self) -> int:
        """Width of the keys (and of the values) of one token."""
        return self.kv_heads * self.head_size

    def linear(self, name: str) -> tuple[int, int]:
        """(in, out) of one of LINEAR_LAYERS."""
        h, f = self.hidden, self.intermediate
        return {
            "q_proj": (h, self.q),
            "k_proj": (h, self.kv),
            "v_proj": (h, self.kv),
            "o_proj": (self.q, h),
            "gate_proj": (h, f),
            "up_proj": (h, f),
            "down_proj": (f, h),
        }[name]

    @property
    def layer_linear_parameters(self) -> int:
        """Of one decoder layer's LINEAR_LAYERS."""
        return sum(rows * columns for rows, columns in map(self.linear, LINEAR_LAYERS))

    @property
    def layer_parameters(self) -> int:
        """Of one decoder layer, its two norms included."""
        return self.layer_linear_parameters + 2 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Of the embedding; a head that is not tied to it has as many again."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        ends = self.embedding_parameters * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + ends + self.hidden


def from_config(fields: Mapping[str, Any], name: str) -> Architecture:
    """The architecture that a config.json describes; `name` is what errors call it.

    Fields that older configs leave out have transformers' defaults: one key and value head per head, a head as wide as
    the hidden size allows, untied, 2048 positions.

    Raises:
        ModelError: it is no Llama, or a number in it cannot be.
    """
    hub.require_llama(fields, name)
    other = [field for field in ("num_local_experts", "vision_config", "text_config") if fields.get(field)]
    if other:
        raise _wrong(name, f"it calls itself a llama and has {other[0]}: experts and vision are not planned for")

    def number(field: str, largest: int, default: int | None = None) -> int:
        """At most `largest`: far above any Llama, so that a byte count stays a number that a person can read."""
        value = default if fields.get(field) is None else fields[field]
        if value is None:
            raise _wrong(name, f"{field} is missing")
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
            raise _wrong(name, f"{field} is {str(value)[:40]!r}, not a whole number from 1 to {largest:,}")
        return value

    hidden, heads = number("hidden_size", 2**20), number("num_attention_heads", 2**14)
    kv_heads = number("num_key_value_heads", 2**14, heads)
    if fields.get("head_dim") is None and hidden % heads:
        raise _wrong(name, f"hidden_size {hidden} is not divided by its {heads} heads, and head_dim is not given")
    if heads % kv_heads:
        raise _wrong(name, f"{heads} heads cannot share {kv_heads} key and value heads evenly")
    tied = fields.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise _wrong(name, f"tie_word_embeddings is {str(tied)[:40]!r}, not true or false")
    return Architecture(
        name=name,
        hidden=hidden,
        layers=number("num_hidden_layers", 2**10),
        heads=heads,
        kv_heads=kv_heads,
        head_size=number("head_dim", 2**14, hidden // heads),
        intermediate=number("intermediate_size", 2**22),
        vocabulary=number("vocab_size", 2**26),
        tied=tied,
        max_positions=number("max_position_embeddings", 2**32, 2048),
        quantization=_quantization(fields.get("quantization_config"), name),
    )


def require_method(model: Architecture, recipe: Recipe, gpu: bool = True) -> None:
    """Raises ModelError where a checkpoint is quantized already, and otherwise than the recipe's method asks; and where
    it would be computed with other weights than it has, which a CPU does to some in 4 bits."""
    if model.quantization is not None and model.quantization != recipe.quantization:
        raise ModelError(
            f"{model.name} is already quantized ({model.quantization}), and method = {recipe.method!r} asks for "
            "something else",
            "quantized weights cannot be turned into other ones without loss",
            f"method = 'qlora-{model.quantization}', or the 16-bit checkpoint it was made from",
        )
    if not gpu and (odd := odd_widths(model)) and recipe.quantization in ("nf4", "fp4"):
        raise ModelError(
            f"a CPU cannot compute with {model.name} in 4 bits (method = {recipe.method!r})",
            f"its rows are {odd} wide; where that is no multiple of {BLOCK}, bitsandbytes' product on a CPU takes the "
            "wrong constants",
            "method = 'lora' and 16-bit weights, or a GPU",
        )


def odd_widths(model: Architecture) -> str:
    """Widths of linear layers that are no whole number of 4-bit blocks."""
    return ", ".join(str(width) for width in sorted({model.linear(n)[0] for n in LINEAR_LAYERS}) if width % BLOCK)


def _quantization(config: Any, name: str) -> str | None:
    """What transformers' `quantization_config` says the stored weights are."""
    if not config:
        return None
    if not isinstance(config, Mapping):
        raise _wrong(name, "quantization_config is not an object")
    if config.get("load_in_4bit"):
        kind = config.get("bnb_4bit_quant_type", "fp4")
    elif config.get("load_in_8bit"):
        kind = "int8"
    else:
        kind = config.get("quant_method")
    if kind not in QUANTIZATIONS:
        known = f"{', '.join(QUANTIZATIONS)} of bitsandbytes, and 16 or 32 bits"
        raise _wrong(name, f"its weights are stored as {str(kind)[:40]!r}; what can be trained: {known}")
    return kind


def _wrong(name: str, why: str) -> ModelError:
    return ModelError(
        f"{name} has a config.json that describes no Llama llamanb can plan for",
        why,
        "give the config.json of a complete Llama checkpoint, as transformers writes it",
    )


def architecture(model: str, revision: str = "main") -> Architecture:
    """The architecture of a recipe's model: `tiny`, a folder, or a name on the Hub.

    The Llama 3 family under the names of Meta and of KNOWN_OWNERS needs no network; any other name fetches the
    checkpoint's config.json and tokenizer (`hub.checkpoint_folder` says what it raises).

    Raises:
        ModelError: its config.json is missing, unreadable, or no Llama's.
    """
    folder = tiny.CHECKPOINT if model == "tiny" else Path(model).expanduser()
    if not folder.is_dir():
        if revision == "main" and (found := known(model)):
            return found
        folder = hub.checkpoint_folder(model, revision, weights=False)
    return from_config(hub.read_config(folder, model), model)


# The Llama 3 family by name: llama3.json has what Meta published, the config.json of each repository.

KNOWN_OWNERS = ("meta-llama", "unsloth", "NousResearch")
"""Whose repositories of these names are the published weights; another owner's may be anything."""

_FAMILY = json.loads(Path(__file__).with_name("llama3.json").read_text(encoding="utf-8"))
_NAME = re.compile(r"(?:meta-)?(llama-3(?:\.\d)?-\d+b)(?:-instruct)?(-bnb-4bit)?", re.IGNORECASE)


def known(model: str) -> Architecture | None:
    """The architecture of a published Llama 3 by its repository name; None for every other name.

    Held to whole names of KNOWN_OWNERS: `Llama-3.1-8B`, with `Meta-` before or `-Instruct` after it, and unsloth's
    copies in nf4 with `-bnb-4bit` at the end. A fine-tune called `Llama-3.1-8B-something` reads its own config, and so
    does `-unsloth-bnb-4bit`, which keeps some layers in 16 bits.
    """
    owner, _, name = model.partition("/")
    match = _NAME.fullmatch(name)
    if match is None or owner.lower() not in [known.lower() for known in KNOWN_OWNERS]:
        return None
    config = _FAMILY.get(match[1].lower())
    if config is None or (match[2] and owner.lower() != "unsloth"):
        return None
    return replace(from_config(config, model), quantization="nf4" if match[2] else None)
