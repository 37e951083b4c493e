"""Errors a person can act on: what happened, why, and how to fix it.

`LlamanbError` is the only family this package raises for something a user did or met. A notebook shows it as a card
instead of a traceback, caught or not; everywhere else it is the same in plain text.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

from llamanb.html import alert, join, visible

UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError)
"""What comes of reading JSON that is not there or not what it should be."""


class LlamanbError(Exception):
    """Something the user can fix.

    Args:
        what: what went wrong, with the place (file, row, column, field) it went wrong at.
        why: the cause, as far as it is known.
        fix: what to do next; a command, a setting or a page.
    """

    details: tuple = ()
    """Pieces that end the card, such as a Table or a Bar: each has `__str__` and `_repr_html_`."""

    def __init__(self, what: str, why: str, fix: str):
        super().__init__(what, why, fix)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        return visible(f"{self.what}\n  why: {self.why}\n  fix: {self.fix}")

    def _repr_html_(self) -> str:
        parts = {"why": self.why, "how to fix it": self.fix}
        return alert(type(self).__name__, self.what, parts, "".join(self._drawn(join)))

    def _repr_pretty_(self, printer, cycle) -> None:
        printer.text("\n".join(self._lines()))

    def _render_traceback_(self) -> list[str]:
        """IPython's hook: what stands where a traceback would.

        A notebook gets the card, and under it one line. Where nobody sits (papermill, nbconvert: they let no cell ask
        for input) all lines follow, for a log and an exception are made of them. IPython 9 asks again outside of the
        `except`, for its history: that shows nothing.
        """
        lines = self._lines()
        with contextlib.suppress(Exception):  # the error must be told, whatever becomes of its card
            from IPython import display, get_ipython

            kernel = getattr(get_ipython(), "kernel", None)
            if kernel is not None and sys.exc_info()[1] is self:
                card = {"text/plain": "\n".join(lines), "text/html": self._repr_html_()}
                display.display(card, raw=True)
                return lines[:1] if kernel._allow_stdin else lines
        return lines

    def _lines(self) -> list[str]:
        text = f"{type(self).__name__}: {self}"
        return "\n\n".join([text, *self._drawn(str)]).splitlines()

    def _drawn(self, draw: Callable[[object], str]) -> list[str]:
        """Each of `details`, drawn; what cannot be drawn is left out."""
        drawn = []
        with contextlib.suppress(Exception):
            for piece in self.details:
                drawn.append(draw(piece))
        return drawn


class RecipeError(LlamanbError):
    """A recipe field that cannot be what it says."""


class DataError(LlamanbError):
    """Rows that cannot be trained on."""


class ModelError(LlamanbError):
    """A checkpoint that cannot be used. The subclasses name the cause."""


class GatedModelError(ModelError):
    """The licence of a gated model has not been accepted by this account."""


class MissingTokenError(ModelError):
    """A gated or private model was asked for without a Hugging Face token."""


class WrongTokenError(ModelError):
    """The Hugging Face token is not valid."""


class ModelNotFoundError(ModelError):
    """No such model on the Hub or on disk."""


class NoNetworkError(LlamanbError):
    """The Hugging Face Hub cannot be reached."""


class DiskFullError(LlamanbError):
    """Not enough room on disk."""


class HostMemoryError(LlamanbError):
    """Not enough host memory."""


class GpuError(LlamanbError):
    """The GPU or its driver cannot do what was asked."""
