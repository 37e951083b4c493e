"""Recipe: what the user wants, independent of the GPU it will run on.

Frozen and checked when it is made; every field is a flat literal, so a notebook's `parameters` cell, papermill's `-p`,
a widget and a JSON file all say the same thing. How the recipe runs on a card is the Plan's business (`layout.py`).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from llamanb.errors import RecipeError

METHODS = {
    "qlora-nf4": "adapters over weights in 4-bit NormalFloat (Dettmers et al. 2023); the smallest",
    "qlora-fp4": "adapters over weights in 4-bit float",
    "qlora-int8": "adapters over weights in 8-bit integers (LLM.int8, Dettmers et al. 2022)",
    "lora": "adapters over 16-bit weights (Hu et al. 2021)",
    "full": "every weight is trained, in 32-bit with 16-bit arithmetic; the largest",
}
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Of a decoder layer, in the order in which they are computed."""
TARGETS = {"all-linear": LINEAR_LAYERS, "attention": LINEAR_LAYERS[:4]}
_CHOICES = {
    "method": tuple(METHODS),
    "long_rows": ("stop", "skip", "truncate"),
    "bad_rows": ("stop", "skip"),
    "loss_on": ("answers", "everything"),
    "optimizer": ("auto", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"),
    "schedule": ("linear", "cosine", "constant"),
    "checkpointing": ("auto", "all", "none", "offloaded"),
    "precision": ("auto", "fp16", "bf16", "fp32"),
    "weights": ("auto", "resident", "streamed"),
}
_RANGES = {  # field: (kind, lowest, highest), both ends included
    "rank": (int, 1, 1024),
    "alpha": (float, 1e-3, 1e5),
    "dropout": (float, 0.0, 0.9),
    "effective_batch_size": (int, 1, 65536),
    "micro_batch_size": (int, 1, 65536),
    "max_length": (int, 8, 131072),
    "epochs": (float, 1e-3, 1000.0),
    "steps": (int, 1, 10_000_000),
    "learning_rate": (float, 1e-8, 1.0),
    "warmup": (float, 0.0, 0.9),
    "weight_decay": (float, 0.0, 1.0),
    "max_grad_norm": (float, 1e-4, 1e4),
    "eval_rows": (int, 0, 100_000),
    "seed": (int, 0, 2**32 - 1),
    "stop_after_min": (float, 0.1, 100_000.0),
    "checkpoint_every_min": (float, 0.01, 100_000.0),
    "checkpoint_every_steps": (int, 1, 10_000_000),
}
_FLAGS = ("double_quant", "rslora", "dora")
_OPTIONAL = ("alpha", "learning_rate", "micro_batch_size", "steps", "stop_after_min", "checkpoint_every_steps")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to fine-tune, on what, and how. Raises RecipeError, naming the field, for anything that cannot work."""

    model: str = "tiny"
    """Checkpoint: a Hub name, a folder, or `tiny`, the small Llama that comes with llamanb. A checkpoint already
    quantized to 4 bits is used as it is: 8B is then a 5.5 GB download instead of 16."""

    revision: str = "main"
    """Branch, tag or commit of a Hub model; name a commit to make a run repeatable."""

    dataset: str = "tiny"
    """Rows: a Hub name (`owner/name`, `owner/name:config`), a json, jsonl, csv or parquet file, or `tiny`."""

    dataset_split: str = "train"
    """Split of a Hub dataset to take; files have one."""

    method: str = "qlora-nf4"
    """What is trained over what; 4-bit is what lets 8B fit 16 GB. One of METHODS."""

    double_quant: bool = True
    """4-bit only: quantize the quantization constants too. Saves 0.047 bytes a parameter, 0.3 GiB on 8B."""

    rank: int = 16
    """Rank of the adapters. More can learn more, and costs memory in proportion."""

    alpha: float | None = None
    """Scale of the adapters is alpha / rank. None: equal to the rank, so that changing the rank leaves the scale."""

    dropout: float = 0.0
    """Share of adapter inputs dropped while training. 0 is fastest, and enough for all but very few rows."""

    targets: str | tuple[str, ...] = "all-linear"
    """Which layers get adapters: `all-linear`, `attention`, or names such as `("q_proj", "v_proj")`. All of them
    learns best at equal memory (Dettmers et al. 2023, figure 2)."""

    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, for high ranks (Kalajdzievski 2023)."""

    dora: bool = False
    """Train a magnitude beside the direction (Liu et al. 2024): slower, sometimes better at low rank."""

    effective_batch_size: int = 16
    """Rows per optimizer step. Accumulation is derived from it, so memory never changes what is learned."""

    micro_batch_size: int | None = None
    """Rows computed at once; must divide the effective batch. None: the plan chooses."""

    max_length: int = 1024
    """Longest row, in tokens. Activations grow in proportion to it."""

    long_rows: str = "stop"
    """Rows over max_length: `stop` and say which, `skip` them and say how many, or `truncate`."""

    bad_rows: str = "stop"
    """Rows that cannot be trained on: `stop` and say which, or `skip` them and say how many and why."""

    epochs: float = 1.0
    """Passes over the rows; `steps`, where given, comes first."""

    steps: int | None = None
    """Optimizer steps. None: as many as the epochs need."""

    optimizer: str = "auto"
    """`auto`: 8-bit paged AdamW where adapters train on a GPU, fused AdamW elsewhere. Paging moves the optimizer's
    states, never the parameters, to host memory when the GPU is full."""

    learning_rate: float | None = None
    """Highest learning rate. None: 2e-4 for adapters, 2e-5 for full fine-tuning."""

    schedule: str = "linear"
    """How the learning rate falls after the warmup."""

    warmup: float = 0.03
    """Share of the steps over which the learning rate rises; the schedule `constant` has none."""

    weight_decay: float = 0.0
    """AdamW's weight decay."""

    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""

    loss_on: str = "answers"
    """`answers`: only the assistant's words and end-of-turn tokens are learned. `everything`: prompts too."""

    checkpointing: str = "auto"
    """Activation checkpointing, which recomputes layers in the backward pass to save their memory: `all` layers,
    `none`, `offloaded`: all, with what they start from in host memory, or `auto`: as few as fit; none on a CPU."""

    weights: str = "auto"
    """Where frozen weights lie: `resident` on the card; `streamed`: those of as many layers as do not fit wait in host
    memory, or on disk where nothing fits otherwise, and each is brought to the card shortly before it is computed (GPU,
    adapters over 4 bits); or `auto`: resident where anything fits so, and else streamed where that can be done."""

    precision: str = "auto"
    """Arithmetic: `auto` is bf16 where the GPU has it in hardware, fp16 on older ones such as a T4, fp32 on a CPU."""

    eval_rows: int = 64
    """Rows held out of training and scored before and after; a fifth of the rows at most. 0: none, and no scores."""

    seed: int = 0
    """Everything random starts here: split, order, adapters, dropout."""

    stop_after_min: float | None = None
    """End with the adapter saved after this many minutes: before Colab does. Trained again, the same recipe goes on
    from there. None: no limit."""

    checkpoint_every_min: float = 10.0
    """Minutes between two checkpoints, from which a training that died goes on; one more is made when it ends."""

    checkpoint_every_steps: int | None = None
    """Optimizer steps between two checkpoints, beside those by the clock. None: only by the clock."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _OPTIONAL and value is None:
                continue
            if field.name in _CHOICES:
                _check_choice(field.name, value)
            elif field.name in _RANGES:
                object.__setattr__(self, field.name, _checked_number(field.name, value))
            elif field.name in _FLAGS:
                _check_flag(field.name, value)
            elif field.name == "targets":
                object.__setattr__(self, "targets", _checked_targets(value))
            else:
                _check_text(field.name, value)
        self._check_together()

    def _check_together(self):
        micro, effective = self.micro_batch_size, self.effective_batch_size
        if micro and effective % micro:
            fits = max(n for n in range(1, micro + 1) if effective % n == 0)
            raise RecipeError(
                f"micro_batch_size = {micro} does not divide effective_batch_size = {effective}",
                "each optimizer step adds up whole micro-batches",
                f"micro_batch_size = {fits}, or None to let the plan choose",
            )
        if self.weights == "streamed" and (self.quantization not in ("nf4", "fp4") or self.dropout or self.dora):
            raise RecipeError(
                "weights = 'streamed' is for adapters over 4-bit weights, without dropout and DoRA",
                "those are computed by fused layers, which know when each weight is read",
                "method = 'qlora-nf4', dropout = 0, dora = False; or weights = 'auto'",
            )
        if self.method == "full" and (self.dora or self.rslora):
            raise RecipeError(
                "dora and rslora need adapters, and method = 'full' has none",
                "full fine-tuning trains the weights themselves",
                "method = 'lora' or 'qlora-nf4', or switch dora and rslora off",
            )

    @property
    def adapters(self) -> bool:
        """Whether adapters are trained rather than the weights themselves."""
        return self.method != "full"

    @property
    def quantization(self) -> str | None:
        """`nf4`, `fp4`, `int8`, or None where the weights stay 16-bit or wider."""
        return self.method.removeprefix("qlora-") if self.method.startswith("qlora-") else None

    @property
    def lora_alpha(self) -> float:
        return self.rank if self.alpha is None else self.alpha

    @property
    def highest_learning_rate(self) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-4 if self.adapters else 2e-5

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Names of the linear layers that get adapters."""
        return TARGETS[self.targets] if isinstance(self.targets, str) else self.targets

    def replace(self, **changes) -> Recipe:
        """The same recipe with some fields changed."""
        return self.from_dict({**dataclasses.asdict(self), **changes})

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RecipeError("the recipe is not JSON", str(error), "write it with Recipe.to_json()") from None
        if not isinstance(fields, dict):
            raise RecipeError(
                f"the recipe is a JSON {type(fields).__name__}, not an object",
                "a recipe is a set of named fields",
                'write it as {"model": ..., "dataset": ...}, or with Recipe.to_json()',
            )
        return cls.from_dict(fields)

    @classmethod
    def from_dict(cls, fields: dict) -> Recipe:
        """Builds a recipe from named values; a name it does not know raises RecipeError with the nearest one."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                raise RecipeError(
                    f"a recipe has no field {name!r}",
                    "the name is misspelled, or comes from another version of llamanb",
                    f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(known)}",
                )
        return cls(**fields)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RecipeError(f"{path} holds no recipe", str(error), "give the recipe.json of a run") from None


def _check_choice(name: str, value: object) -> None:
    choices = _CHOICES[name]
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        raise RecipeError(
            f"{name} = {value!r} is not a choice",
            f"{name} is one of: {', '.join(choices)}",
            f"did you mean {near[0]!r}?" if near else f"{name} = {choices[0]!r}",
        )


def _checked_number(name: str, value: object) -> int | float:
    kind, low, high = _RANGES[name]
    number = None
    # bool is an int to Python, and 2e1 a float: neither is what a field of the other kind was meant to be
    if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:  # so no NaN, no inf
        number = kind(value) if kind is float or value == int(value) else None
    if number is None:
        what = "a whole number" if kind is int else "a number"
        raise RecipeError(
            f"{name} = {value!r} is not possible",
            f"{name} is {what} from {low:g} to {high:g}" + (" or None" if name in _OPTIONAL else ""),
            f"{name} = {Recipe.__dataclass_fields__[name].default!r} is the default",
        )
    return number


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise RecipeError(f"{name} = {value!r} is not possible", f"{name} is on or off", f"{name} = True or False")


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise RecipeError(
            f"{name} = {value!r} is not possible",
            f"{name} is a name or a path, in printable characters",
            f"{name} = {Recipe.__dataclass_fields__[name].default!r} is the default",
        )
    if re.search(r"\bhf_[A-Za-z0-9]{20}|://[^/]*@", value):  # not said again: an error stands in notebooks and logs
        why = "a recipe is written into notebooks, reports and model cards"
        raise RecipeError(f"{name} holds a token or a password", why, "set HF_TOKEN; download what needs a password")


def _checked_targets(value: object) -> str | tuple[str, ...]:
    if isinstance(value, str) and value not in TARGETS:  # papermill passes a list as text
        value = tuple(name.strip() for name in value.split(","))
    if isinstance(value, str):
        return value
    names = tuple(value) if isinstance(value, (list, tuple)) else ()
    unknown = [name for name in names if not isinstance(name, str) or not re.fullmatch(r"\w+", name)]
    unknown += [name for name in names if name not in LINEAR_LAYERS and name not in unknown]
    if not names or unknown:
        near = difflib.get_close_matches(str(unknown[0]), [*TARGETS, *LINEAR_LAYERS], n=1) if unknown else []
        raise RecipeError(
            f"targets = {value!r} is not possible",
            f"{unknown[0]!r} is no linear layer of a Llama" if unknown else "no layer is named",
            (f"did you mean {near[0]!r}? " if near else "")
            + f"'all-linear', 'attention', or a list of {LINEAR_LAYERS}",
        )
    return tuple(dict.fromkeys(names))
