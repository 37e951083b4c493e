"""Plan: how a recipe runs on a card, and what that is predicted to take. Plain data with the reason for each choice;
`planner.py` makes it, `rehearsal.py` corrects it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from llamanb.card import Card
from llamanb.html import Bar, Table, join
from llamanb.memory import Memory
from llamanb.recipe import Recipe
from llamanb.speed import StepTime
from llamanb.tape import CHECKPOINTED, HALVED, OFFLOADED, STORED

GIB = 2**30
EXPANDED_ATTENTION = "llamanb_expanded"
"""Name under which `model.attention` registers attention with a key and value head for every query head."""
LAYER_WORDS = {
    STORED: "kept for the backward pass",
    HALVED: "kept but for the MLP's, which are recomputed in the backward pass",
    CHECKPOINTED: "recomputed in the backward pass",
    OFFLOADED: "recomputed, their inputs waiting in host memory",
}


@dataclass(frozen=True)
class Alternative:
    """A layout that was looked at and not taken."""

    micro_batch_size: int
    recomputed: int
    """Layers whose activations are not kept."""
    needs_gib: float
    step_s: float | None
    verdict: str


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
    """Micro-batches summed up into one optimizer step; times `micro_batch_size` it is `share`. Fused layers take short
    rows in fewer."""
    layers: tuple[str, ...]
    """What becomes of each decoder layer's activations (tape.STORED, HALVED, CHECKPOINTED, OFFLOADED), the first layer
    first. Empty on a CPU that keeps all of them."""
    attention: str
    """transformers' name of the attention: `sdpa`, or EXPANDED_ATTENTION."""
    kernel: str
    """Kernel of attention that is planned for (tape.KERNELS); empty on a CPU."""
    optimizer: str
    """transformers' name of the optimizer."""
    reasons: dict[str, str]
    """Why, by field name."""
    fused: bool = False
    """Layers and loss are computed by `model.fused`; otherwise as transformers, peft and trl have them."""
    memory: Memory | None = None
    """Predicted; None on a CPU, whose memory nothing is planned for."""
    time: StepTime | None = None
    """Predicted; None where the card's speed is not known."""
    alternatives: tuple[Alternative, ...] = ()
    length: int = 0
    """Tokens of the longest row that is planned for."""
    streamed: tuple[int, ...] = ()
    """Numbers of the layers whose weights wait in host memory."""
    streamed_gib: float = 0.0
    """Host memory that they take, with the token embedding where that waits there too."""
    on_disk: tuple[int, ...] = ()
    """Those of them that wait on disk instead, since host memory has no room for them."""
    disk_gib: float = 0.0
    """Of the disk that these take."""
    offloaded_gib: float = 0.0
    """Host memory that the inputs of offloaded layers take."""
    limit_gib: float | None = None
    """What of the card is planned with: `free_gib` less a margin."""
    steps: int | None = None
    """Optimizer steps of the run; None where the rows are not counted yet."""
    basis: str = ""
    """What the predictions rest on, in words."""
    shards: int = 1
    """Cards that share the weights of `streamed` layers instead, each with a part of every layer on the card."""
    cards: int = 1
    """That compute each optimizer step together, a share of its rows each; memory and time are one card's."""

    @property
    def share(self) -> int:
        """Rows of an optimizer step that are planned for one card. It may have more of them where they are short."""
        return -(-self.recipe.effective_batch_size // self.cards)

    @property
    def recomputed(self) -> int:
        """Layers whose activations are not kept."""
        return sum(kind != STORED for kind in self.layers)

    @property
    def needs_gib(self) -> float | None:
        """What torch will reserve."""
        return self.memory.reserved / GIB if self.memory else None

    @property
    def fits(self) -> bool:
        """Whether that is no more than there is to plan with; a CPU's memory is not planned for."""
        return not self.memory or self.needs_gib <= self._limit_gib

    @property
    def step_s(self) -> float | None:
        return self.time.step_s if self.time else None

    def table(self) -> Table:
        """The choices, and why."""
        length = self.length or self.recipe.max_length
        batch = f"{self.accumulation} × {self.micro_batch_size} rows of up to {length} tokens"
        batch += f", on each of {self.cards} cards" if self.cards > 1 else ""
        chosen = [
            ("arithmetic", self.dtype, "dtype"),
            ("optimizer step", batch, "micro_batch_size"),
            ("activations", self._layout(), "layers"),
            ("attention", f"{self.attention}, {self.kernel} kernel" if self.kernel else self.attention, "attention"),
            ("layers", "fused" if self.fused else "as transformers and peft have them", "fused"),
            ("optimizer", self.optimizer, "optimizer"),
        ]
        if self.shards > 1:
            chosen.append(("weights", f"of all layers in parts, shared by {self.shards} cards", "weights"))
        elif self.streamed:
            held = len(self.streamed) - len(self.on_disk)
            what = f"of {held} of {len(self.layers)} layers in host memory: {self.streamed_gib:.1f} GiB"
            what += f"; of {len(self.on_disk)} on disk: {self.disk_gib:.1f} GiB" if self.on_disk else ""
            chosen.append(("weights", what, "weights"))
        rows = [(a, b, self.reasons.get(name, "")) for a, b, name in chosen]
        if self.memory:
            room = f"{self.needs_gib:.2f} of {self._limit_gib:.2f} GiB"
            peak = f"at most {self.memory.allocated / GIB:.2f} GiB in tensors, at this instant: {self.memory.instant}"
            rows.append(("memory", room, peak))
        if self.time:
            rows.append(("time", f"{_duration(self.step_s)} a step", self._run_time()))
        if self.basis:
            rows.append(("predicted from", "", self.basis))
        caption = f"{self.recipe.model}, {self.recipe.method}, on {self.card.name}"
        return Table(["plan", "", "why"], rows, caption)

    def bar(self) -> Bar | None:
        """Memory at the peak by bucket, against what the card has."""
        if not self.memory:
            return None
        parts = {name: size / GIB for name, size in self.memory.buckets.items()}
        parts["fragmentation"] = self.memory.gaps / GIB
        parts["CUDA context"] = self.card.context_gib or 0.0
        limit = self._limit_gib + (self.card.context_gib or 0)
        margin = max(0.0, self.card.free_gib - self._limit_gib)
        caption = f"memory at the peak ({self.memory.instant}); {margin:.2f} GiB of the card are left as a margin"
        return Bar(parts, limit, "GiB", caption)

    def others(self) -> Table | None:
        """The layouts that were looked at and not taken."""
        if not self.alternatives:
            return None
        rows = [
            [a.micro_batch_size, a.recomputed, f"{a.needs_gib:.2f}", _duration(a.step_s) if a.step_s else "", a.verdict]
            for a in self.alternatives
        ]
        return Table(["micro-batch", "layers recomputed", "GiB", "a step", "not taken because"], rows, "alternatives")

    @property
    def _limit_gib(self) -> float:
        return self.card.free_gib if self.limit_gib is None else self.limit_gib

    def _layout(self) -> str:
        counts = {kind: self.layers.count(kind) for kind in LAYER_WORDS if kind in self.layers}
        waits = f" ({self.offloaded_gib:.1f} GiB)" if self.offloaded_gib else ""
        if len(counts) < 2:
            return LAYER_WORDS[next(iter(counts), STORED)] + waits
        return "; ".join(f"{count} layers {LAYER_WORDS[kind]}" for kind, count in counts.items()) + waits

    def _run_time(self) -> str:
        recipe = self.recipe
        if self.steps:
            total = self.steps * self.step_s
            text = f"{_duration(total)} for {self.steps} steps"
        else:
            text = (
                f"{_duration(1000 / recipe.effective_batch_size * self.step_s)} for 1,000 rows of {recipe.max_length}"
            )
            total = 0.0
        if recipe.stop_after_min and total > 60 * recipe.stop_after_min:
            share = 60 * recipe.stop_after_min / total
            text += f"; stop_after_min = {recipe.stop_after_min:g} ends it at about {share:.0%}"
        return text

    def __str__(self) -> str:
        return "\n\n".join(str(part) for part in (self.table(), self.bar(), self.others()) if part)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return join(self.table(), self.bar(), self.others())

    def replace(self, **changes) -> Plan:
        """The same plan with some fields changed; the predictions stay as they are."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        fields = json.loads(text)
        fields["recipe"] = Recipe.from_dict(fields["recipe"])
        fields["card"] = Card(**fields["card"])
        fields |= {name: tuple(fields[name]) for name in ("layers", "streamed", "on_disk") if name in fields}
        fields["alternatives"] = tuple(Alternative(**one) for one in fields["alternatives"])
        for name, kind in (("memory", Memory), ("time", StepTime)):
            fields[name] = fields[name] and kind(**fields[name])
        return cls(**fields)


def _duration(seconds: float) -> str:
    """Seconds in the unit a person would use."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"
