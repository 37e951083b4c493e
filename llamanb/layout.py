"""Plan: how a recipe runs on a card. Plain data with the reason for each choice; `planner.py` makes it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from llamanb.card import Card
from llamanb.html import Table
from llamanb.recipe import Recipe

EXPANDED_ATTENTION = "llamanb_expanded"
"""Name under which `model.attention` registers attention with a key and value head for every query head."""


@dataclass(frozen=True)
class Plan:
    """How one recipe runs on one card."""

    recipe: Recipe
    card: Card
    dtype: str
    """Arithmetic: fp16, bf16 or fp32."""
    micro_batch_size: int
    """Rows computed at once."""
    accumulation: int
    """Micro-batches summed up into one optimizer step; times `micro_batch_size` it is the effective batch."""
    checkpoint_layers: bool
    """Whether every decoder layer's activations are recomputed in the backward pass instead of kept."""
    attention: str
    """transformers' name of the attention: `sdpa`, or EXPANDED_ATTENTION."""
    optimizer: str
    """transformers' name of the optimizer."""
    reasons: dict[str, str]
    """Why, by field name."""

    def table(self) -> Table:
        layers = "recomputed in the backward pass" if self.checkpoint_layers else "kept"
        batch = f"{self.accumulation} × {self.micro_batch_size} rows of up to {self.recipe.max_length} tokens"
        chosen = [
            ("arithmetic", self.dtype, "dtype"),
            ("optimizer step", batch, "micro_batch_size"),
            ("activations", layers, "checkpoint_layers"),
            ("attention", self.attention, "attention"),
            ("optimizer", self.optimizer, "optimizer"),
        ]
        caption = f"{self.recipe.model}, {self.recipe.method}, on {self.card.name}"
        return Table(["plan", "", "why"], [(a, b, self.reasons.get(name, "")) for a, b, name in chosen], caption)

    def __str__(self) -> str:
        return str(self.table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        fields = json.loads(text)
        return cls(**{**fields, "recipe": Recipe.from_dict(fields["recipe"]), "card": Card(**fields["card"])})
