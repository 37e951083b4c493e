"""The 4-bit weights of a 16-bit checkpoint, kept on disk a layer a file, so that they are quantized once.

A file counts when its hash is the one noted when it was written; what was cut off goes on with the layers that are
there. The files hold what checkpoints of bitsandbytes do, under the same names.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import bitsandbytes as bnb
import torch
from safetensors.torch import load, save
from torch import Tensor

from llamanb import hub
from llamanb.errors import UNREADABLE
from llamanb.machine import hub_cache
from llamanb.recipe import Recipe
from llamanb.tape.workload import BLOCK
from llamanb.timeline import replace_text

MANIFEST = "manifest.json"
SPARE_BYTES = 2**30
"""Of the disk, left free."""


class QuantizedLayers:
    """Reads a checkpoint's layers in 4 bits, from the cache where they are there, and else through it.

    Args:
        folder: of the checkpoint.
        read: one of its tensors by its name.
        names: of the linear weights of each layer.
        recipe: whose `quantization` and `double_quant` are taken.
        dtype: that weights are cast to first, as for resident ones.
        device: that quantizes.
    """

    def __init__(self, folder: Path, read, names: Mapping[int, list[str]], recipe: Recipe, dtype, device: torch.device):
        self.read, self.names, self.dtype, self.device = read, names, dtype, device
        self.options = {"compress_statistics": recipe.double_quant, "quant_type": recipe.quantization}
        made_of = [hub.fingerprint(folder), *self.options.values(), str(dtype), bnb.__version__]
        key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
        self.home = hub_cache().parent / "llamanb-4bit" / key
        self._hashes = self._noted()
        self._at, self._tensors = -1, {}

    @staticmethod
    def constants(recipe: Recipe) -> tuple[str, ...]:
        """What stands beside each weight, by the names of bitsandbytes."""
        nested = ("nested_absmax", "nested_quant_map") if recipe.double_quant else ()
        return "absmax", "quant_map", *nested, f"quant_state.bitsandbytes__{recipe.quantization}"

    def layer(self, number: int) -> dict[str, Tensor]:
        """The layer's linear weights and their constants, by name, in host memory. One layer is held."""
        if number != self._at:
            self._tensors = self._kept(number) or self._made(number)
            self._at = number
        return self._tensors

    def _file(self, number: int) -> Path:
        return self.home / f"layer-{number:04d}.safetensors"

    def _noted(self) -> dict[str, str]:
        try:
            found = json.loads((self.home / MANIFEST).read_text(encoding="utf-8"))
            return {str(name): str(value) for name, value in found.items()}
        except UNREADABLE:
            return {}

    def _kept(self, number: int) -> dict[str, Tensor] | None:
        path = self._file(number)
        if path.name not in self._hashes:
            return None
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if hashlib.sha256(data).hexdigest() != self._hashes[path.name]:
            print(f"{path} is not what was written there: it is made again", flush=True)
            return None
        return load(data)

    def _made(self, number: int) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for name in self.names[number]:
            weight = self.read(name).to(self.device, self.dtype)
            packed, state = bnb.functional.quantize_4bit(weight, blocksize=BLOCK, **self.options)
            made[name] = packed.cpu()
            made |= {f"{name}.{part}": value.cpu() for part, value in state.as_dict(packed=True).items()}
        self._keep(number, made)
        return made

    def _keep(self, number: int, made: dict[str, Tensor]) -> None:
        """Writes the layer's file; without room, or where nothing can be written, the next training quantizes again."""
        data, path = save(made), self._file(number)
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self.home).free < len(data) + SPARE_BYTES:
                return
            new = path.with_suffix(".new")
            new.write_bytes(data)
            new.replace(path)
            self._hashes[path.name] = hashlib.sha256(data).hexdigest()
            replace_text(self.home / MANIFEST, json.dumps(self._hashes))
        except OSError as error:
            if number == 0:
                print(f"4-bit weights are not kept for the next time: {error}", flush=True)
