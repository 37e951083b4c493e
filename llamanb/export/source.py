"""What is to be merged: a run's adapter and its base, found and checked before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from llamanb import hub
from llamanb.architecture import BLOCK, Architecture, architecture, from_config, odd_widths
from llamanb.errors import LlamanbError, ModelError, RecipeError
from llamanb.export import stored
from llamanb.export.adapter import CONFIG, Adapter
from llamanb.export.base import Base
from llamanb.export.model_card import noted
from llamanb.export.stored import MissingShardError
from llamanb.layout import Plan
from llamanb.recipe import LINEAR_LAYERS
from llamanb.run import Run


class WrongBaseError(ModelError):
    """The weights are not those that the adapter was trained on."""


class WrongRevisionError(WrongBaseError):
    """The weights have the right names and shapes, and are of another revision or another fine-tune."""


COMPUTED = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Source:
    """One adapter and its base."""

    home: Path
    """Folder of the run; of the adapter, where it comes without one."""
    saved: Path
    """Folder of the adapter."""
    plan: Plan | None
    """None for an adapter without a run."""
    adapter: Adapter
    name: str
    """Of the base: on the Hub, a folder, or `tiny`."""
    revision: str
    checkpoint: Path
    """Folder of the base."""
    config: dict
    """The base's config.json."""
    shape: Architecture
    base: Base
    fingerprint: str
    """Of the base's weights."""

    @classmethod
    def find(cls, run: Run | str | Path, kind: str, checkpoint: str | Path | None) -> Source:
        """See `merge`, whose arguments these are."""
        home = Path(run.folder if isinstance(run, Run) else run).expanduser().absolute()
        saved = home if (home / CONFIG).is_file() else home / "adapter"
        if saved == home and (home.parent / "plan.json").is_file():
            home = home.parent
        plan, facts = _plan(home), noted(home)
        if plan and not plan.recipe.adapters:
            why = "all weights were trained, and saved whole"
            raise RecipeError(f"{home} has no adapter to merge", why, f"use {home / 'model'} as it is")
        adapter = Adapter.open(saved)
        if kind == "trained" and plan is None:
            raise RecipeError(
                f"what {saved} was trained on is not known",
                "there is no plan.json of a run beside it, which says how the base was quantized",
                "base = 'original', or give the folder of the run",
            )
        name = plan.recipe.model if plan else str(adapter.config.get("base_model_name_or_path"))
        revision = facts.get("commit") or (plan.recipe.revision if plan else adapter.config.get("revision")) or "main"
        folder = hub.checkpoint_folder(str(checkpoint or name), "main" if checkpoint else revision)
        config = hub.read_config(folder, str(folder))
        shape = from_config(config, str(folder))
        if kind == "original" and shape.quantization:
            raise RecipeError(
                f"{folder} has no 16-bit weights",
                f"it is stored in {shape.quantization}",
                "base = 'trained', or checkpoint = the 16-bit checkpoint that it was made from",
            )
        base = Base(stored.tensors(folder), **(_as_trained(plan, shape) if kind == "trained" else {}))
        require_names(base, shape, folder)
        _require_fit(adapter, base, saved, folder)
        twin = checkpoint is not None and kind == "original" and _is_stored_quantized(name, revision)
        fingerprint = hub.fingerprint(folder)
        if facts.get("fingerprint", fingerprint) != fingerprint and not twin:
            raise WrongRevisionError(
                f"{folder} is not what {saved} was trained on",
                "names and shapes are right, and the weights are others: another revision, or another fine-tune",
                f"checkpoint = the folder of {name}, revision {revision}",
            )
        return cls(home, saved, plan, adapter, name, revision, folder, config, shape, base, fingerprint)


def _plan(home: Path) -> Plan | None:
    try:
        return Plan.from_json((home / "plan.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        why = f"plan.json: {type(error).__name__}: {error}"
        raise RecipeError(f"{home} is no run that can be read", why, "give the folder that train() printed") from None


def _is_stored_quantized(name: str, revision: str) -> bool:
    """Whether a checkpoint's own weights are quantized; no where it is not to be found any more."""
    try:
        return architecture(name, revision).quantization is not None
    except LlamanbError:
        return False


def _as_trained(plan: Plan, shape: Architecture) -> dict:
    recipe = plan.recipe
    if recipe.quantization in ("nf4", "fp4") and not plan.card.is_gpu and odd_widths(shape):
        raise ModelError(
            "what this adapter was trained on cannot be made again",
            f"on a CPU, bitsandbytes reads past its constants where rows are no multiple of {BLOCK} wide",
            "base = 'original', or train on a GPU or with method = 'lora'",
        )
    quantization = None if shape.quantization else recipe.quantization
    return {"computed": COMPUTED[plan.dtype], "quantization": quantization, "double": recipe.double_quant}


def require_names(base: Base, shape: Architecture, folder: Path) -> None:
    """Raises MissingShardError or WrongBaseError where the weights are not those that config.json describes."""
    layer = {f"self_attn.{name}": shape.linear(name)[::-1] for name in LINEAR_LAYERS[:4]}
    layer |= {f"mlp.{name}": shape.linear(name)[::-1] for name in LINEAR_LAYERS[4:]}
    layer |= {"input_layernorm": (shape.hidden,), "post_attention_layernorm": (shape.hidden,)}
    wanted = {f"model.layers.{i}.{name}.weight": size for i in range(shape.layers) for name, size in layer.items()}
    ends = ["model.embed_tokens.weight", *([] if shape.tied else ["lm_head.weight"])]
    wanted |= dict.fromkeys(ends, (shape.vocabulary, shape.hidden)) | {"model.norm.weight": (shape.hidden,)}
    if missing := sorted(wanted.keys() - base.weights.keys()):
        raise MissingShardError(
            f"the weights in {folder} are not complete",
            f"{len(missing)} are missing, {missing[0]} among them",
            "fetch the checkpoint again (`hf download NAME --force-download`)",
        )
    odd = [name for name, size in wanted.items() if base.weights[name] != size]
    if odd:
        raise WrongBaseError(
            f"the weights in {folder} are not those of its config.json",
            f"{odd[0]} is {base.weights[odd[0]]}, and should be {wanted[odd[0]]}",
            "give the folder of a complete checkpoint",
        )


def _require_fit(adapter: Adapter, base: Base, saved: Path, folder: Path) -> None:
    for name in adapter.tensors:
        if base.weights.get(name) != adapter.shape(name):
            raise WrongBaseError(
                f"the adapter in {saved} is not for {folder}",
                f"{name}: the adapter is for {adapter.shape(name)}, the base has {base.weights.get(name, 'none')}",
                f"give the base it was trained on, {adapter.config.get('base_model_name_or_path')}: checkpoint=",
            )
