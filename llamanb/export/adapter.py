"""An adapter as peft saves it: what is added to which weight."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from llamanb.errors import ModelError
from llamanb.export import stored
from llamanb.export.read import read_rows
from llamanb.export.stored import Stored
from llamanb.recipe import LINEAR_LAYERS

CONFIG = "adapter_config.json"
_PLAIN = {  # fields that name, scale or train an adapter, and leave it the plain sum that a merge adds up
    *("peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"),
    *("auto_mapping", "megatron_core", "qalora_group_size"),  # without effect but for fields that are refused
}
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""`init_lora_weights` under which the base's own weights stay as they are."""
_ONE_OF = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": _PLAIN_STARTS}
_KEY = re.compile(
    rf"base_model\.model\.(.+\.({'|'.join(LINEAR_LAYERS)}))\.(lora_A|lora_B|lora_magnitude_vector)(\.\w+)?"
)


class Parts(NamedTuple):
    """What is added to one weight, in fp32."""

    down: torch.Tensor
    """A: (rank, in)."""
    up: torch.Tensor
    """B: (out, rank)."""
    scale: float
    magnitude: torch.Tensor | None
    """DoRA's length of each row (out); None without DoRA."""


@dataclass(frozen=True)
class Adapter:
    """Its config and where its tensors lie; they are read when they are asked for."""

    config: dict
    tensors: dict[str, dict[str, Stored]]
    """By name of the weight, then `lora_A`, `lora_B` and, for DoRA, `lora_magnitude_vector`."""

    @classmethod
    def open(cls, folder: Path) -> Adapter:
        """Raises ModelError where there is none, or it is one that cannot be merged; MissingShardError where it is cut
        off."""
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            fields = {name: value for name, value in config.items() if value}
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            fix = "give the folder of a run, or that of an adapter"
            raise ModelError(f"{folder} holds no adapter", f"{CONFIG}: {type(error).__name__}", fix) from None
        odd = sorted(fields.keys() - _PLAIN)
        odd += [
            f"{name} = {config[name]!r}" for name, plain in _ONE_OF.items() if config.get(name, plain[0]) not in plain
        ]
        if odd:
            raise _unmergeable(folder, f"{', '.join(odd)} in {CONFIG}")
        found: dict[str, dict[str, Stored]] = {}
        for name, tensor in stored.tensors(folder).items():
            match = _KEY.fullmatch(name)
            if match is None:
                raise _unmergeable(folder, f"it holds {name}")
            found.setdefault(f"{match[1]}.weight", {})[match[3]] = tensor
        needed = {"lora_A", "lora_B", *(["lora_magnitude_vector"] if config.get("use_dora") else [])}
        for name, kinds in found.items():
            if kinds.keys() != needed or kinds["lora_A"].shape[0] != kinds["lora_B"].shape[1]:
                raise _unmergeable(folder, f"{name} has {', '.join(sorted(kinds))}")
        return cls(config, found)

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in) of the weight that it is for."""
        return self.tensors[name]["lora_B"].shape[0], self.tensors[name]["lora_A"].shape[1]

    def scale(self, name: str) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rsLoRA (Kalajdzievski 2023)."""
        rank, alpha = self.tensors[name]["lora_A"].shape[0], self.config["lora_alpha"]
        for pattern, other in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name.removesuffix(".weight")):  # as peft finds them
                alpha = other
                break
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def parts(self, name: str) -> Parts | None:
        """What is added to a weight; None where nothing is."""
        if name not in self.tensors:
            return None
        read = {kind: read_rows(tensor).float() for kind, tensor in self.tensors[name].items()}
        return Parts(read["lora_A"], read["lora_B"], self.scale(name), read.get("lora_magnitude_vector"))


def _unmergeable(folder: Path, why: str) -> ModelError:
    return ModelError(
        f"the adapter in {folder} cannot be merged",
        f"{why}: only LoRA, rsLoRA and DoRA on the linear layers of a Llama are",
        "use it as an adapter, through peft",
    )
