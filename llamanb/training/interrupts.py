"""The kernel's interrupt (Ctrl-C, the stop button). Outside of the main thread, where Python hands no signals, nothing
here does anything."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


def set_handler(handler) -> None:
    """Of interrupts. None stands for one that is not Python's, and changes nothing."""
    with contextlib.suppress(ValueError, TypeError):
        signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """What is short and must come to its end: interrupts are not heard meanwhile."""
    before = signal.getsignal(signal.SIGINT)
    set_handler(signal.SIG_IGN)
    try:
        yield
    finally:
        set_handler(before)
