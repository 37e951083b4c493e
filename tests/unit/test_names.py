"""Names that lead elsewhere, of runs, models and rows: nothing is made, read or asked for under them."""

from contextlib import ExitStack

import pytest

from llamanb import Card, Recipe, hub, plan
from llamanb.data.read import read_rows
from llamanb.errors import LlamanbError
from llamanb.run import new_folder
from llamanb.training.resume import pick_up
from tests.unit.hostile import NAMES

CPU = Card("CPU", None)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_stays_in_its_folder(tmp_path, name):
    runs = tmp_path / "a" / "runs"
    runs.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    asked = plan(Recipe(max_length=64), CPU)
    for make in (lambda: new_folder(runs, name), lambda: pick_up(asked, runs, name, None, ExitStack())):
        with pytest.raises(LlamanbError, match="a run cannot be named"):
            make()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_none_is_asked_of_nobody(tmp_path, name, monkeypatch):
    monkeypatch.setattr("llamanb.hub._download", lambda *args: pytest.fail(f"asked for {args[0]}"))
    with pytest.raises(LlamanbError):
        hub.checkpoint_folder(Recipe(model=name).model)


@pytest.mark.parametrize("name", [*NAMES, "file:///etc/passwd", "ftp://x/rows.jsonl", "owner/name:../../up"])
def test_rows_come_from_where_they_are_said_to(name, monkeypatch):
    import datasets

    def unreachable(what):
        raise LlamanbError(what, "no network here", "none")

    monkeypatch.setattr(hub, "require_network", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail(f"asked for {args}"))
    with pytest.raises(LlamanbError):
        read_rows(Recipe(dataset=name).dataset)
