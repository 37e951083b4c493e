"""Errors a person can act on: what happened, why, and how to fix it.

`LlamanbError` is the only family this package raises for something a user did or met. In a notebook it shows its three
lines instead of a traceback; everywhere else `str(error)` is the same text.
"""

from __future__ import annotations


class LlamanbError(Exception):
    """Something the user can fix.

    Args:
        what: what went wrong, with the place (file, row, column, field) it went wrong at.
        why: the cause, as far as it is known.
        fix: what to do next; a command, a setting or a page.
    """

    def __init__(self, what: str, why: str, fix: str):
        super().__init__(what, why, fix)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        return f"{self.what}\n  why: {self.why}\n  fix: {self.fix}"

    def _render_traceback_(self) -> list[str]:
        """IPython's hook: in a notebook the three lines stand where a traceback would."""
        return [f"{type(self).__name__}: {line}" if i == 0 else line for i, line in enumerate(str(self).splitlines())]


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


class GpuError(LlamanbError):
    """The GPU or its driver cannot do what was asked."""
