"""The 4-bit weights of a 16-bit checkpoint, kept on disk a layer a file, so that they are quantized once.

A file counts when its hash is the one noted when it was written; what was cut off goes on with the layers that are
there. The files hold what checkpoints of bitsandbytes do, under the same names. Layers that wait on disk wait in them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import bitsandbytes as bnb
import torch
from safetensors.torch import load, save
from torch import Tensor

from llamanb import disk, hub
from llamanb.disk import SPARE_GIB
from llamanb.errors import UNREADABLE, DiskFullError, ModelError
from llamanb.machine import GIB
from llamanb.model.weight_files import Span, WeightFile
from llamanb.recipe import Recipe
from llamanb.tape.workload import BLOCK

MANIFEST = "manifest.json"
EVERY_S = 15.0
"""Seconds between what loading says of how far it has come."""
MEND = "train again: a layer that is not what was written is made again, and training goes on from its last checkpoint"


class QuantizedLayers:
    """Reads a checkpoint's layers in 4 bits, from the cache where they are there, and else through it.

    Args:
        home: the cache.
        read: one of the checkpoint's tensors by its name.
        names: of the linear weights of each layer.
        recipe: whose `quantization` and `double_quant` are taken.
        dtype: that weights are cast to first, as for resident ones.
        device: that quantizes.
        on_disk: layers that wait there, so that their files have to be.
    """

    def __init__(
        self,
        home: Path,
        read,
        names: Mapping[int, list[str]],
        recipe: Recipe,
        dtype,
        device: torch.device,
        on_disk: Collection[int] = (),
    ):
        self.home, self.read, self.names, self.dtype, self.device = home, read, names, dtype, device
        self.options = {"compress_statistics": recipe.double_quant, "quant_type": recipe.quantization}
        self.files: dict[int, WeightFile] = dict.fromkeys(on_disk)
        self.hashes = self._noted()
        """Of the files that hold what they should, by name."""
        self._at, self._tensors = -1, {}

    @staticmethod
    def folder(checkpoint: Path, recipe: Recipe, dtype: torch.dtype) -> Path:
        """Where a checkpoint's layers are kept. Raises OSError."""
        made_of = [hub.fingerprint(checkpoint), recipe.double_quant, recipe.quantization, str(dtype), bnb.__version__]
        return disk.layers_folder() / hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]

    def span(self, number: int, name: str) -> Span:
        """Where a tensor of a layer lies that waits on disk, once the layer was asked for."""
        return self.files[number].span(name)

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

    def note(self) -> None:
        """Writes down which files hold, beside what other ranks wrote down meanwhile. Raises OSError."""
        self.hashes = self._noted() | self.hashes
        new = self.home / f"{MANIFEST}.{os.getpid()}"
        new.write_text(json.dumps(self.hashes), encoding="utf-8")
        new.replace(self.home / MANIFEST)

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
        if path.name not in self.hashes:
            return None
        try:
            file = WeightFile(path, MEND) if number in self.files else None
            data = file.content() if file else path.read_bytes()
        except (OSError, ModelError):
            return None
        if hashlib.sha256(data).hexdigest() != self.hashes[path.name]:
            print(f"{path} is not what was written there: it is made again", flush=True)
            return None
        self.files |= {number: file} if file else {}
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
        """Writes the layer's file. Without room, or where nothing can be written, the next training quantizes again;
        unless the layer waits there: then it raises DiskFullError."""
        data, path, waits = save(made), self._file(number), number in self.files
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            still = [n for n in self.files if n == number or not self._file(n).exists()]
            need, free = len(data) * len({*still, number}) + SPARE_GIB * GIB, shutil.disk_usage(self.home).free
            if free < need:
                if waits:
                    raise self._full(f"{len(still)} of them take {need / GIB:.1f} GiB, and {free / GIB:.1f} are free")
                return
            new = path.with_suffix(f".{os.getpid()}")
            self._write(new, data, waits)
            file = WeightFile(new, MEND) if waits else None
            new.replace(path)
            if file:
                file.path, self.files[number] = path, file
            self.hashes[path.name] = hashlib.sha256(data).hexdigest()
            self.note()
        except OSError as error:
            with contextlib.suppress(OSError):
                path.with_suffix(f".{os.getpid()}").unlink()
            if waits:
                raise self._full(f"{error.strerror or error}, at {path}") from None
            if number == 0:
                print(f"4-bit weights are not kept for the next time: {error}", flush=True)

    @staticmethod
    def _write(path: Path, data: bytes, waits: bool) -> None:
        """Where a layer waits, until it is on the disk, so that no memory is taken by what is not written yet."""
        with path.open("wb") as file:
            file.write(data)
            if waits:
                file.flush()
                os.fsync(file.fileno())
                disk.forget(file.fileno())

    def _full(self, why: str) -> DiskFullError:
        return DiskFullError(
            "the layers that host memory has no room for cannot be kept on disk",
            f"{why} ({self.home})",
            "free some room (the folders beside that one hold the layers of other models), set HF_HOME to a larger "
            "disk, or take a machine with more memory",
        )


def now_and_then(says: bool) -> Callable[[str], None]:
    """Prints what it is told where it `says` anything, and EVERY_S have gone by."""
    said_s = time.monotonic()

    def tell(words: str) -> None:
        nonlocal said_s
        if says and time.monotonic() - said_s >= EVERY_S:
            said_s = time.monotonic()
            print(words, flush=True)

    return tell
