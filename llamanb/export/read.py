"""Tensors of a checkpoint, read a piece at a time. Files are read, not mapped: what is held is what was asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from llamanb.export.stored import Stored

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
AT_ONCE = 2**22
"""Elements of a piece: 16 MiB in fp32."""


def read_rows(tensor: Stored, first: int = 0, last: int | None = None) -> torch.Tensor:
    """Rows `first` up to `last` of a stored tensor; all of it by default."""
    shape = tensor.shape or (1,)
    last = shape[0] if last is None else last
    row = tensor.size // shape[0]
    with tensor.path.open("rb") as file:
        file.seek(tensor.begin + first * row)
        data = bytearray((last - first) * row)
        if file.readinto(data) != len(data):
            raise OSError(f"{tensor.path} ends early")
    if not data:
        return torch.empty(0, *tensor.shape[1:], dtype=DTYPES[tensor.dtype])
    return torch.frombuffer(data, dtype=DTYPES[tensor.dtype]).view(last - first, *tensor.shape[1:])


def pieces(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(first, last) of runs of rows of about AT_ONCE elements; a multiple of 64 rows each but for the last."""
    width = math.prod(shape[1:])
    rows = max(64, AT_ONCE // max(width, 1) // 64 * 64)
    for first in range(0, shape[0], rows):
        yield first, min(first + rows, shape[0])
