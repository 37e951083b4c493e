"""What a checkpoint's safetensors files hold: names, shapes and places of the tensors, read without torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

from llamanb.errors import ModelError

INDEX = "model.safetensors.index.json"
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_LONGEST_HEADER = 100_000_000
"""Bytes; what the safetensors library takes at most."""


class MissingShardError(ModelError):
    """A file of the weights is not there, or is cut off."""


class Stored(NamedTuple):
    """Where a tensor lies."""

    path: Path
    dtype: str
    """As safetensors calls it, such as BF16."""
    shape: tuple[int, ...]
    begin: int
    """First byte in the file."""

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * BYTES[self.dtype]


def tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint, or of an adapter, by name.

    Raises MissingShardError where a file that the index names is not there, is cut off, or lacks a tensor.
    """
    try:
        files = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except FileNotFoundError:
        files = None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _incomplete(folder, f"{INDEX} cannot be read ({type(error).__name__})") from None
    names = sorted({str(name) for name in files.values()} if files else {p.name for p in folder.glob("*.safetensors")})
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing or not names:
        raise _incomplete(folder, f"{', '.join(missing) or 'any *.safetensors'} is not there")
    found = {}
    for name in names:
        found |= header(folder / name)
    if files and (lacks := files.keys() - found.keys()):
        raise _incomplete(folder, f"{files[min(lacks)]} lacks {min(lacks)}")
    return found


def header(path: Path) -> dict[str, Stored]:
    """Every tensor of one file. Raises MissingShardError where it is cut off.

    The format: eight bytes with the length of a JSON header, the header, and the tensors' bytes end to end.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            fields = json.loads(file.read(min(length, _LONGEST_HEADER)))
        size, found = path.stat().st_size, {}
        for name in fields.keys() - {"__metadata__"}:
            begin, end = (8 + length + int(n) for n in fields[name]["data_offsets"])
            found[name] = Stored(path, fields[name]["dtype"], tuple(fields[name]["shape"]), begin)
            if end > size or end - begin != found[name].size:
                raise _incomplete(path.parent, f"{path.name} is cut off: {size:,} bytes, {end:,} expected at least")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"{path.name} cannot be read ({type(error).__name__}: it may be cut off)"
        raise _incomplete(path.parent, why) from None
    return found


def _incomplete(folder: Path, why: str) -> MissingShardError:
    return MissingShardError(
        f"the weights in {folder} are not complete",
        why,
        "fetch the checkpoint again (`hf download NAME --force-download`)",
    )
