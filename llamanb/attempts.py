"""Work that may run out of memory: done, or given up with all that it held, so that it can be done in another way."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch

Result, Item = TypeVar("Result"), TypeVar("Item")
MESSAGES = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
    "DefaultCPUAllocator: can't allocate memory",
)
"""Of what cuBLAS, Triton, the driver and torch's allocator for a CPU raise as plain RuntimeErrors."""


def is_out_of_memory(error: BaseException) -> bool:
    """Of the GPU's or the host's memory, by type and by message."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(message in str(error) for message in MESSAGES)


def attempt(work: Callable[[], Result], otherwise: Callable[[BaseException], Callable[[], Result] | None]) -> Result:
    """What `work` returns, or, where it runs out of memory, what another way does.

    `otherwise` is asked for that way while everything still lives, and may have none: then the error passes. The way is
    gone after nothing of the first try is alive any more: not its error, no frame of it, no tensor.
    """
    try:
        return work()
    except Exception as error:
        way = otherwise(error) if is_out_of_memory(error) else None
        if way is None:
            raise
        forget(error)
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return way()


def in_halves(work: Callable[[list[Item]], Result], items: list[Item]) -> list[Result]:
    """What `work` makes of all items at once; of each half by itself, and so on, where memory is not enough for all."""

    def otherwise(error: BaseException) -> Callable[[], list[Result]] | None:
        middle = len(items) // 2
        return (lambda: in_halves(work, items[:middle]) + in_halves(work, items[middle:])) if middle else None

    return attempt(lambda: [work(items)], otherwise)


def forget(error: BaseException | None) -> None:
    """Empties the frames that an error and its causes hold."""
    seen = set()
    while error and id(error) not in seen:  # an error may be its own cause
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
