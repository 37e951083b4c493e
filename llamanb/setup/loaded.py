"""The last step of a notebook's setup cell: is what this kernel has loaded still what is installed?

pip replaces files under a running kernel; modules that were loaded before stay as they were, and the mix fails later
with an error that names neither. Needs the standard library only. docs/decisions/0002-colab.md has the setup cell.
"""

from __future__ import annotations

import contextlib
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


class Version(NamedTuple):
    """A package, in this process and on disk."""

    package: str
    loaded: str
    """Its version; "not yet", or "yes" where the module does not tell."""
    installed: str | None
    """None where it is not."""
    stale: bool
    """Another version was installed after the import, or none is left: only a restart of the kernel helps."""


class RestartNeededError(LlamanbError):
    """This process holds packages that were replaced on disk."""


def version(package: str, module: str = "") -> Version:
    """The version of `package` that this process holds, and the one that is installed. Nothing is imported for it.

    `module` is the name it is imported as, where that is another one.
    """
    found = sys.modules.get(module or package.replace("-", "_"))
    with warnings.catch_warnings():  # some packages deprecate `__version__`
        warnings.simplefilter("ignore")
        told = getattr(found, "__version__", None)
    installed = None
    with contextlib.suppress(metadata.PackageNotFoundError):
        installed = metadata.version(package)
    loaded = str(told or ("yes" if found else "not yet"))
    return Version(package, loaded, installed, bool(told) and not _same_version(loaded, installed or ""))


def _same_version(one: str, other: str) -> bool:
    """A local part (+cu130) counts only if both have one: a wheel may leave out what its module tells."""
    (a, _, local_a), (b, _, local_b) = one.partition("+"), other.partition("+")
    return a == b and (not local_a or not local_b or local_a == local_b)


def loaded_but_stale() -> list[Version]:
    """The packages llamanb uses (and torchao, which the setup may remove) that this process holds in another version
    than the installed one."""
    return [found for found in map(version, _watched()) if found.stale]


def check_loaded() -> None:
    """Silent when all is well.

    Raises:
        RestartNeededError: something loaded is stale; says how to restart.
    """
    if stale := loaded_but_stale():
        raise RestartNeededError(
            "restart this kernel once, then run the notebook again from the top",
            "it had loaded packages before the setup changed them: "
            + ", ".join(f"{s.package} {s.loaded} (now {s.installed or 'removed'})" for s in stale),
            "Colab: Runtime > Restart session. Kaggle: Run > Restart. Jupyter: Kernel > Restart. Nothing is installed"
            " a second time",
        )


def _watched() -> list[str]:
    requirements = []
    with contextlib.suppress(metadata.PackageNotFoundError):  # a checkout that was never installed replaced nothing
        requirements = metadata.requires("llamanb") or []
    return [*(re.match(r"[\w.-]+", line)[0] for line in requirements if "extra ==" not in line), "torchao"]
