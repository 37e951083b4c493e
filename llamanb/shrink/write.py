"""A shrunken checkpoint as it is written: a file a decoder layer, in a folder aside that is renamed at the end."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llamanb import __version__, hub
from llamanb.errors import DiskFullError, ModelError, RecipeError
from llamanb.export.describe import TOKENIZER
from llamanb.export.model_card import CARD, MAKER, NOTICE, licence
from llamanb.export.read import pieces, read_rows
from llamanb.export.shards import ASIDE, free_bytes, write_safetensors
from llamanb.export.stored import INDEX
from llamanb.shrink.walk import Checkpoint
from llamanb.training.checkpoints import flush, lock

FACTS = "shrink.json"
"""How a checkpoint was made smaller."""


@dataclass
class Output:
    """What is being written.

    Args:
        checkpoint: what it is made from.
        aside: where it lies until it is whole.
        layers: decoder layers that it will have.
    """

    checkpoint: Checkpoint
    aside: Path
    layers: int
    _places: dict[str, str] = field(default_factory=dict)
    _size: int = 0
    _begin_s: float = field(default_factory=time.monotonic)

    def layer(self, state: dict[str, torch.Tensor]) -> None:
        """Writes the next decoder layer; names are those within it."""
        number = sum(name.endswith("input_layernorm.weight") for name in self._places)
        dtype = self.checkpoint.dtype
        tensors = {f"model.layers.{number}.{name}": tensor.to("cpu", dtype) for name, tensor in state.items()}
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                fix = "the checkpoint may be damaged: fetch it again"
                raise ModelError(f"{name} is not finite", f"it came out of {self.checkpoint.name} so", fix)
        self._write(number, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, lambda n: [tensors[n]])
        print(f"{number + 1} of {self.layers} layers", flush=True)

    def finish(self, changes: dict, facts: dict, words: str) -> None:
        """Writes embeddings, head and norm, which stay as they are, and the small files.

        Args:
            changes: fields of the config.
            facts: what FACTS holds.
            words: how it was made, for the model card.
        """
        source = self.checkpoint
        rest = {"model.embed_tokens.weight", "model.norm.weight", *([] if source.shape.tied else ["lm_head.weight"])}

        def rows(name: str) -> Iterator[torch.Tensor]:
            for first, last in pieces(source.tensors[name].shape):
                yield read_rows(source.tensors[name], first, last).to(source.dtype)

        self._write(self.layers, {name: source.tensors[name].shape for name in sorted(rest)}, rows)
        self._json(INDEX, {"metadata": {"total_size": self._size}, "weight_map": self._places})
        self._json("config.json", source.config | changes)
        for pattern in (*TOKENIZER, "generation_config.json"):
            for path in source.folder.glob(pattern):
                shutil.copyfile(path, self.aside / path.name)
        gpu = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
        made = {"took_s": round(time.monotonic() - self._begin_s, 1), "peak_gpu_gib": gpu}
        self._json(FACTS, {"llamanb": __version__, "model": source.name, **facts, **made, "bytes": self._size})
        (self.aside / CARD).write_text(_card(source.name, words), encoding="utf-8")
        if (known := licence(source.name)) and known.notice:
            (self.aside / NOTICE).write_text(f"{known.notice}\n", encoding="utf-8")

    def _write(self, number: int, shapes: dict[str, tuple[int, ...]], rows) -> None:
        name = f"model-{number + 1:05d}-of-{self.layers + 1:05d}.safetensors"
        write_safetensors(self.aside / name, shapes, self.checkpoint.dtype, rows)
        self._places |= dict.fromkeys(shapes, name)
        self._size += sum(torch.Size(shape).numel() for shape in shapes.values()) * self.checkpoint.dtype.itemsize

    def _json(self, name: str, fields: dict) -> None:
        (self.aside / name).write_text(json.dumps(fields, indent=1), encoding="utf-8")


@contextlib.contextmanager
def written(checkpoint: Checkpoint, to: str | Path, layers: int, share: float = 1.0) -> Iterator[Output]:
    """The folder `to`, while it is being made; it is there when it is whole, and not before.

    Args:
        share: of the checkpoint's bytes that it will take, about.

    Raises RecipeError where the folder is taken, DiskFullError where it will not fit.
    """
    target = require_free(to)
    need, free = share * sum(tensor.size for tensor in checkpoint.tensors.values()), free_bytes(target)
    if need > free:
        raise DiskFullError(
            f"{target} does not fit on its disk",
            f"it takes {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            "free some room, or give a folder on another disk",
        )
    aside = target.with_name(target.name + ASIDE)
    aside.mkdir(parents=True, exist_ok=True)
    with lock(aside) as is_free:
        if not is_free:
            raise RecipeError(f"{target} is being made by another process", f"it holds {aside}", "wait for it")
        for path in aside.iterdir():  # of a try that did not come to its end
            path.unlink() if path.is_file() else shutil.rmtree(path)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            yield Output(checkpoint, aside, layers)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        for path in (*aside.rglob("*"), aside):
            flush(path)
        aside.rename(target)
        flush(target.parent)


def require_free(to: str | Path) -> Path:
    """The folder as an absolute path. Raises RecipeError where it is there already."""
    target = Path(to).expanduser().absolute()
    if target.exists():
        raise RecipeError(f"{target} is there already", "nothing is written over", "another folder, or remove it")
    return target


def facts_of(folder: str | Path) -> dict:
    """What FACTS says of a shrunken checkpoint. Raises RecipeError where it is none."""
    try:
        return dict(json.loads((Path(folder) / FACTS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        why = f"{FACTS}: {type(error).__name__}"
        raise RecipeError(
            f"{folder} is no shrunken checkpoint", why, "give a folder that llamanb.shrink wrote"
        ) from None


def _card(name: str, words: str) -> str:
    known, on_the_hub = licence(name), hub.is_name(name) and name != "tiny"
    header = ["---", *([f"base_model: {name}"] if on_the_hub else []), *([f"license: {known.tag}"] if known else [])]
    header += ["library_name: transformers", "tags: [llamanb, llama]", "---"]
    title = " ".join(name.split("/")[-1].replace("`", "'").split())
    terms = f"{known.built_with}. " if known and known.built_with else ""
    terms += f"Under the licence of its base: {known.name} {known.page}" if known else "Its base's licence holds."
    text = f"Made from `{title}` with {MAKER}: {words}. `{FACTS}` has the figures."
    return "\n".join([*header, f"# `{title}`, made smaller", "", text, "", terms.rstrip(), ""])
