"""What stands between a fresh machine and the first cell: pins, the setup cell, what moves and what does not."""

import itertools
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

import llamanb
from llamanb.errors import LlamanbError
from llamanb.setup import environment
from llamanb.setup.environment import Requirement, broken_wishes, read_requirements, unmet, write_constraints
from llamanb.setup.loaded import SETUP_CELL, RestartNeededError, check_loaded, loaded_but_stale, version

ROOT = Path(__file__).parents[2]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# --- the files that pip reads


@pytest.fixture(scope="module")
def pinned() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "exact public versions, nothing else"
    return {canonical(name): version for name, _, version in (line.partition("==") for line in lines)}


def test_pins_are_inside_the_ranges(pinned):
    requirements = read_requirements(ROOT / "requirements.txt")
    extras = re.search(r"^dev = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)[1]
    requirements += [Requirement(line) for line in re.findall(r'"(.+?)"', extras)]
    assert len(requirements) > 20
    for requirement in requirements:
        assert requirement.specifier.contains(pinned[canonical(requirement.name)]), requirement


def test_ranges_hold_for_colabs_image_but_for_what_the_setup_moves():
    frozen = {r.name: next(iter(r.specifier)).version for r in read_requirements(ROOT / "tests/colab/colab-freeze.txt")}
    image = {canonical(name): version for name, version in frozen.items()} | {"torch": "2.11.0+cu128"}
    assert unmet(read_requirements(ROOT / "requirements.txt"), image) == [
        "trl",
        "bitsandbytes",
        "datasets",
        "torchmetrics",
        "gguf",
        "pyarrow",
        "papermill",
    ]


def test_files_beside_the_code_are_installed_with_it():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["llamanb"]
    beside = {path for path in (ROOT / "llamanb").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert beside
    assert beside == {path for pattern in patterns for path in (ROOT / "llamanb").glob(pattern)}


# --- the setup cell


def test_setup_cell_fetches_this_release_from_the_projects_address():
    assert f"clone -q --depth 1 -b v{llamanb.__version__}" in SETUP_CELL
    assert f'"{llamanb.REPOSITORY}"' in SETUP_CELL
    assert max(map(len, SETUP_CELL.splitlines())) <= 120


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_notebook_begins_with_the_setup_cell(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert "".join(cells[0]["source"]) == SETUP_CELL


def test_setup_cell_does_nothing_where_llamanb_is_installed():
    code = SETUP_CELL.replace("!", "raise SystemExit('reached the shell') #")  # IPython's shell lines
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- loaded against installed


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of installed packages, first on the path: `site(x="26.0.1")` installs x, `site(x=None)` removes it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("llamanb.setup.loaded._watched", lambda: ["pyarrow-x", "jinja-x", "torchao-x"])

    def install(**versions: str) -> None:
        for name, wanted in versions.items():
            for old in tmp_path.glob(f"{name}-*.dist-info"):
                (old / "METADATA").unlink()
                old.rmdir()
            if wanted is None:
                (tmp_path / f"{name}.py").unlink(missing_ok=True)
                continue
            (tmp_path / f"{name}.py").write_text(f"__version__ = {wanted!r}\n")
            info = tmp_path / f"{name}-{wanted}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {wanted}\n"
            )

    yield install
    for name in ("pyarrow_x", "jinja_x", "torchao_x"):
        sys.modules.pop(name, None)


def test_nothing_stale_when_nothing_moved_or_nothing_is_loaded(site):
    site(pyarrow_x="18.1.0", jinja_x="3.1.6")
    assert loaded_but_stale() == []
    __import__("pyarrow_x")
    assert loaded_but_stale() == []
    site(jinja_x="3.2.0")  # moved, but not loaded
    assert loaded_but_stale() == []
    check_loaded()


def test_a_loaded_package_that_moved_or_went_is_stale(site):
    site(pyarrow_x="18.1.0", torchao_x="0.10.0", jinja_x="3.1.6")
    for name in ("pyarrow_x", "torchao_x", "jinja_x"):
        __import__(name)
    site(pyarrow_x="26.0.1", torchao_x=None)
    assert loaded_but_stale() == [("pyarrow-x", "18.1.0", "26.0.1", True), ("torchao-x", "0.10.0", None, True)]
    with pytest.raises(RestartNeededError, match="restart this kernel once") as caught:
        check_loaded()
    assert "pyarrow-x 18.1.0 (now 26.0.1), torchao-x 0.10.0 (now removed)" in caught.value.why
    assert "Runtime > Restart session" in caught.value.fix


@pytest.mark.parametrize(
    ("loaded", "on_disk", "stale"),
    [
        ("5.15.0", "5.15.0", False),
        ("18.1.0", "21.0.0", True),
        ("2.11.0+cu130", "2.11.0", False),
        ("2.11.0+cpu", "2.11.0+cu130", True),
        ("2.11.0", "2.12.0+cu130", True),
        ("1.0", None, True),
        (None, "1.0", False),
    ],
)
def test_versions_loaded_against_installed(loaded, on_disk, stale, site, monkeypatch):
    site(jinja_x=on_disk)
    if loaded:
        monkeypatch.setitem(sys.modules, "jinja_x", SimpleNamespace(__version__=loaded))
    assert version("jinja-x") == ("jinja-x", loaded or "not yet", on_disk, stale)


def test_a_module_that_does_not_tell_its_version(site, monkeypatch):
    site(jinja_x="1.0")
    monkeypatch.setitem(sys.modules, "another_name", SimpleNamespace())
    assert version("jinja-x", "another_name") == ("jinja-x", "yes", "1.0", False)
    monkeypatch.setitem(sys.modules, "another_name", None)  # as `import` leaves what it may not load
    assert version("jinja-x", "another_name") == ("jinja-x", "not yet", "1.0", False)


@pytest.mark.slow
def test_real_packages_say_the_version_they_are_installed_as():
    """Else the check would ask for a restart forever. Every package it watches is imported in a fresh process."""
    code = """
import importlib, re, sys, warnings
warnings.simplefilter("ignore")
from llamanb.setup import loaded
lines = [line.partition("#")[0] for line in open("requirements.txt")]
names = [re.match(r"[\\w.-]+", line)[0] for line in lines if line.strip()]
for name in names:
    try:
        importlib.import_module(name.replace("-", "_"))
    except ImportError:
        print("not imported:", name)
loaded._watched = lambda: names
print(loaded.loaded_but_stale())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["not imported: ipython", "not imported: nvidia-ml-py", "[]"]


# --- what moves


IMAGE = {
    "torch": "2.11.0+cu128",
    "numpy": "2.1.3",
    "datasets": "4.0.0",
    "dill": "0.3.8",
    "pyarrow": "18.1.0",
    "cudf-cu12": "26.2.1",
}
WANTED = [Requirement(line) for line in ("torch>=2.10", "datasets>=4.7", "pyarrow>=21", "trl>=1.16", "numpy>=1.26")]
TESTED = [Requirement(line) for line in ("datasets==5.2.0", "pyarrow==26.0.1", "trl==1.16.0", "dill==0.4.1", "x==1")]


def test_only_what_is_missing_or_too_old_is_unmet():
    assert unmet(WANTED, IMAGE) == ["datasets", "pyarrow", "trl"]
    assert unmet(WANTED, {}) == ["torch", "datasets", "pyarrow", "trl", "numpy"]


def test_everything_else_is_held_and_nothing_passes_the_tested_version():
    kept = IMAGE.keys() - {"datasets", "pyarrow"}
    assert write_constraints(IMAGE, kept, ["datasets", "pyarrow"], TESTED) == [
        "cudf-cu12==26.2.1",
        "datasets<=5.2.0",
        "dill==0.3.8",
        "numpy==2.1.3",
        "pyarrow<=26.0.1",
        "torch==2.11.0+cu128",
        "trl<=1.16.0",
        "x<=1",
    ]


@pytest.fixture
def pip(monkeypatch):
    """Stands in for pip: records what it is asked, and answers with the given outcomes in turn."""
    asked, outcomes = [], []

    def answer(*arguments: str) -> subprocess.CompletedProcess:
        constraints = [Path(after).read_text() for before, after in itertools.pairwise(arguments) if before == "-c"]
        asked.append((arguments, *constraints))
        status, error, *said = outcomes.pop(0) if outcomes else (0, "")
        return subprocess.CompletedProcess(arguments, status, "".join(said), error)

    monkeypatch.setattr(environment, "run_pip", answer)
    answer.asked, answer.outcomes = asked, outcomes
    return answer


def test_where_holding_everything_cannot_work_only_torch_and_numpy_are_held(pip, capsys):
    pip.outcomes.append((1, "ERROR: ResolutionImpossible: for help visit"))
    environment.move_packages(IMAGE, ["datasets", "pyarrow"])
    first, second = (constraints.splitlines() for _, constraints in pip.asked)
    assert "dill==0.3.8" in first
    assert [line for line in second if "==" in line] == ["numpy==2.1.3", "torch==2.11.0+cu128"]
    assert "pyarrow<=26.0.1" in second
    assert "other packages stand in the way" in capsys.readouterr().out


def test_who_is_affected_is_in_pips_words(pip):
    broken = "cudf-cu12 26.2.1 has requirement pyarrow<20,>=15, but you have pyarrow 26.0.1."
    pip.outcomes += [(0, "", "No broken requirements found.\n"), (1, "", f"{broken}\n")]
    assert broken_wishes() == set()
    assert broken_wishes() == {broken}
    assert [arguments for (arguments,) in pip.asked] == [("check",), ("check",)]


def test_pips_failure_is_said_once_with_a_way_out(pip):
    pip.outcomes.append((1, "WARNING: Retrying\nERROR: No matching distribution found for trl>=1.16"))
    with pytest.raises(LlamanbError, match="No matching distribution found for trl") as caught:
        environment.move_packages(IMAGE, ["datasets"])
    assert len(pip.asked) == 1
    assert "Internet > On" in caught.value.fix


def test_an_image_with_a_torch_too_old_is_left_alone(pip, monkeypatch):
    monkeypatch.setattr(environment, "read_installed", lambda: IMAGE | {"torch": "2.6.0+cu124"})
    with pytest.raises(LlamanbError, match=r"torch 2\.6\.0\+cu124 is too old") as caught:
        environment.setup()
    assert "make -C" in caught.value.fix
    assert pip.asked == []


# --- the shell's part


def run_script(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "colab_setup.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


@pytest.fixture
def stand_in(tmp_path):
    """A program in Python's place: runs its shell lines first, then this Python."""

    def make(*lines: str) -> str:
        script = tmp_path / "python"
        script.write_text("\n".join(["#!/bin/bash", *lines, f'exec {sys.executable} "$@"']))
        script.chmod(0o755)
        return str(script)

    return make


def test_no_such_python():
    done = run_script("no-such-python")
    assert done.returncode == 1
    assert "no Python at 'no-such-python'" in done.stderr


def test_python_too_old(stand_in):
    done = run_script(
        stand_in('case "$2" in *version_info*) exit 1;; esac', '[ "$1" != --version ] || { echo Python 3.9.2; exit; }')
    )
    assert done.returncode == 1
    assert "Python 3.9.2 is too old" in done.stderr
    assert "fix: " in done.stderr


def test_python_without_pip(stand_in):
    done = run_script(stand_in('[ "$2" != pip ] || { echo "No module named pip" >&2; exit 1; }'))
    assert done.returncode == 1
    assert "has no pip" in done.stderr
    assert "ensurepip" in done.stderr


def test_operating_systems_own_python_is_left_alone(stand_in):
    # The script asks on standard input ("-") whether this Python is managed from outside: say yes.
    python = stand_in('[ "$1" != - ] || exit 0', '[ "$3 $4" != "config list" ] || exit 0')
    done = run_script(python)
    assert done.returncode == 1
    assert "belongs to the operating system" in done.stderr
    assert f"make -C {ROOT} install" in done.stderr
    assert f"bash {ROOT}/colab_setup.sh ~/llamanb-venv/bin/python" in done.stderr
