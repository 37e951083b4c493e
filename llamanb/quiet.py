"""Keeps known chatter of the libraries out of a lesson; every warning that is not listed here still shows."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

KNOWN_WARNINGS = (
    r".*gradient_checkpointing.* is deprecated",  # the old name is the only one transformers 5.15 knows; trl's too
    r".*`torch_dtype` is deprecated",
)
KNOWN_LOG_LINES = (
    "kernels",  # bitsandbytes on a CPU: an optional package for faster 4-bit products
    "MatMul8bitLt: inputs will be cast",  # int8 multiplies in fp16 whatever comes in
    "parallel_mode != ParallelMode.DISTRIBUTED",  # each rank trains by itself, and gradients are added up (ranks.py)
    "tokenizer has new PAD/BOS/EOS tokens",  # ours to change, and written to the model's config
)


class _Known(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in KNOWN_LOG_LINES)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Filters KNOWN_WARNINGS and KNOWN_LOG_LINES and switches the libraries' progress bars off, for a while."""
    import datasets
    from transformers.utils import logging as transformers_logging

    known = _Known()
    named = [handler for name in ("", "transformers", "trl") for handler in logging.getLogger(name).handlers]
    handlers = [*named, logging.lastResort]  # where a library's line comes out, whichever of its loggers it came from
    for handler in handlers:
        handler.addFilter(known)
    datasets.disable_progress_bars()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            for pattern in KNOWN_WARNINGS:
                warnings.filterwarnings("ignore", message=pattern)
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(known)
        if bars:
            transformers_logging.enable_progress_bar()
