"""The last step of a notebook's setup cell: is what this kernel has loaded still what is installed?

pip replaces files under a running kernel; modules that were loaded before stay as they were, and the mix fails later
with an error that names neither. Needs the standard library only. docs/decisions/0002-colab.md has the setup cell.
"""

from __future__ import annotations

import re
import sys
import warnings
from importlib import metadata
from typing import NamedTuple

from llamanb import REPOSITORY, __version__
from llamanb.errors import LlamanbError

SETUP_CELL = f"""\
try:
    from llamanb.setup import check_loaded
except ImportError:  # Colab, Kaggle, a rented GPU: fetch the release, install what is missing (about a minute)
    import sys

    url, folder, python = "{REPOSITORY}", "llamanb-v{__version__}", sys.executable
    !test -d {{folder}} || git -c advice.detachedHead=false clone -q --depth 1 -b v{__version__} {{url}} {{folder}}
    !bash {{folder}}/colab_setup.sh {{python}}
    from llamanb.setup import check_loaded

check_loaded()  # stops here, once, if this session needs a restart"""
"""The first code cell of every notebook; where llamanb is installed it does nothing."""


class Stale(NamedTuple):
    """A package whose loaded version is not the installed one.

    Attributes:
        name: as it is imported.
        loaded: the version in this process.
        installed: the version on disk; None when it was removed.
    """

    name: str
    loaded: str
    installed: str | None


class RestartNeededError(LlamanbError):
    """This process holds packages that were replaced on disk."""


def loaded_but_stale() -> list[Stale]:
    """The packages llamanb uses (and torchao, which the setup may remove) that this process holds in another version
    than the installed one. Nothing is imported for the check."""
    stale = []
    for name in _watched():
        module = sys.modules.get(name.replace("-", "_"))
        with warnings.catch_warnings():  # some packages deprecate `__version__`
            warnings.simplefilter("ignore")
            loaded = getattr(module, "__version__", None)
        if not isinstance(loaded, str):
            continue
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed = None
        if loaded != installed:
            stale.append(Stale(module.__name__, loaded, installed))
    return stale


def check_loaded() -> None:
    """Silent when all is well.

    Raises:
        RestartNeededError: something loaded is stale; says how to restart.
    """
    if stale := loaded_but_stale():
        raise RestartNeededError(
            "restart this kernel once, then run the notebook again from the top",
            "it had loaded packages before the setup changed them: "
            + ", ".join(f"{s.name} {s.loaded} (now {s.installed or 'removed'})" for s in stale),
            "Colab: Runtime > Restart session. Kaggle: Run > Restart. Jupyter: Kernel > Restart. Nothing is installed"
            " a second time",
        )


def _watched() -> list[str]:
    try:
        requirements = metadata.requires("llamanb") or []
    except metadata.PackageNotFoundError:  # a checkout that was never installed has had nothing replaced by its setup
        requirements = []
    return [*(re.match(r"[\w.-]+", line)[0] for line in requirements if "extra ==" not in line), "torchao"]
