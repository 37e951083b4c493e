"""Colab's image is made once, in .venv-colab; the tests change a copy of it."""

import hashlib
import os
import shutil
import sysconfig
from pathlib import Path

import pytest

from llamanb import REPOSITORY, __version__
from tests.colab.image import DIFFERS, FREEZE, ROOT, Environment, make_colab, run


def pytest_report_header() -> str:
    return f"Colab lane: {DIFFERS}"


@pytest.fixture(scope="session")
def pristine() -> Path:
    """Made once per content of colab-freeze.txt."""
    key = hashlib.sha256(FREEZE.read_bytes() + sysconfig.get_python_version().encode()).hexdigest()[:12]
    folder = ROOT / ".venv-colab" / key
    if not (folder / "complete").exists():
        shutil.rmtree(ROOT / ".venv-colab", ignore_errors=True)
        make_colab(folder)
        (folder / "complete").touch()
    return folder


@pytest.fixture(scope="module")
def colab(pristine, tmp_path_factory) -> Environment:
    """Colab as a user finds it. Files are hard links: pip replaces files, and never writes into one."""
    folder = pristine.with_name(f"run-{tmp_path_factory.mktemp('colab').name}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(pristine, folder, symlinks=True, copy_function=os.link)
    yield Environment(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def github(tmp_path_factory) -> dict[str, str]:
    """The working tree as a release: variables under which git takes the project's address to mean it."""
    released = tmp_path_factory.mktemp("github") / "llamanb"
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (released / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, released / name)
    person = ("-c", "user.name=lane", "-c", "user.email=lane@invalid")
    run("git", "init", "-q", cwd=released)
    run("git", "add", "-A", cwd=released)
    run("git", *person, "commit", "-q", "-m", "release", cwd=released)
    run("git", "tag", f"v{__version__}", cwd=released)
    return {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{released.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": REPOSITORY,
    }
