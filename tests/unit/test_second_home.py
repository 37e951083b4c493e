"""A second home: copies that hold, made beside the training, and a run that goes on elsewhere; whatever
becomes of it, the training comes to its end."""

import errno
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from transformers import TrainerCallback

from llamanb import Card, Recipe, load_adapter, plan, show_run, train
from llamanb.errors import LlamanbError, RecipeError
from llamanb.run import FINISHED
from llamanb.training import second_home, trainer
from llamanb.training.checkpoints import ASIDE, newest
from llamanb.training.resume import CHECKPOINTS
from llamanb.training.second_home import STATUS, copied_to
from tests.unit.cut_off import same

CPU = Card("CPU", None)
STEPS = 5


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(second_home, "LOOK_S", 0.02)


@pytest.fixture(scope="module")
def recipe(mini, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"instruction": f"Say {n}.", "output": f"It is {n}."}) for n in range(12)))
    fields = {"model": str(mini), "dataset": str(path), "max_length": 128, "effective_batch_size": 4, "steps": STEPS}
    fields |= {"micro_batch_size": 2, "dropout": 0.2, "eval_rows": 2, "learning_rate": 1e-2}
    return lambda **more: Recipe(**{**fields, "checkpoint_every_steps": 1, **more})


@pytest.fixture
def at_step(monkeypatch):
    """`at_step(number, call)`: calls that when the optimizer has made so many steps and the next one begins."""
    build, wanted = trainer.build_trainer, {}

    class Calls(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            wanted.pop(state.global_step, lambda: None)()

    monkeypatch.setattr(trainer, "build_trainer", lambda *args: build(*args[:4], [*args[4], Calls()], *args[5:]))
    return wanted.__setitem__


class DiedError(Exception):
    """As good as the end of a process, but for copies that are under way."""


def die():
    raise DiedError


def until(seen, limit_s: float = 60.0) -> None:
    """Waits until something can be seen."""
    end_s = time.monotonic() + limit_s
    while not seen():
        assert time.monotonic() < end_s
        time.sleep(0.005)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_home_has_all_of_a_run_and_shows_it(recipe, tmp_path, capsys):
    run = train(plan(recipe(), CPU), runs=tmp_path / "runs", second_home=tmp_path / "home")
    there = tmp_path / "home" / "run"
    assert newest(there / CHECKPOINTS).name == newest(run.folder / CHECKPOINTS).name == f"step-{STEPS:08d}"
    here, copied = contents(run.folder), contents(there)
    assert {"recipe.json", "plan.json", "metrics.csv", "memory.csv", "scores.json", "report.html"} < copied.keys()
    assert {name for name in here if name.startswith("adapter/")} < copied.keys()
    last = f"{CHECKPOINTS}/step-{STEPS:08d}/"
    assert {name for name in here if name.startswith(last)} < copied.keys()
    assert {name: here.get(name, data) for name, data in copied.items()} == copied, "and nothing else"
    shown = show_run(there)
    assert (shown.status, shown.losses, shown.scores) == (FINISHED, run.losses, run.scores)
    assert load_adapter(there)
    assert "no copy" not in capsys.readouterr().out


def test_two_checkpoints_stay_there(recipe, tmp_path, at_step):
    folder, left = tmp_path / "home" / "run" / CHECKPOINTS, []
    steps = [f"step-{step:08d}" for step in range(STEPS)]

    def there(wanted):
        until(lambda: folder.exists() and sorted(os.listdir(folder)) == wanted)
        left.remove(wanted)

    for step in range(1, STEPS):
        left.append(steps[max(1, step - 1) : step + 1])
        at_step(step, lambda wanted=left[-1]: there(wanted))
    train(plan(recipe(), CPU), runs=tmp_path / "runs", second_home=tmp_path / "home")
    assert left == []


@pytest.mark.parametrize("step", [3, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, STEPS - 1))])
def test_a_machine_that_has_nothing_of_a_run_goes_on_with_it(recipe, tmp_path, at_step, step, capsys):
    whole = train(plan(recipe(), CPU), name="whole", runs=tmp_path)
    at_step(step, die)
    with pytest.raises(DiedError):
        train(plan(recipe(), CPU), runs=tmp_path / "runs", second_home=tmp_path / "home")
    shutil.rmtree(tmp_path / "runs")
    capsys.readouterr()
    run = train(plan(recipe(), CPU), runs=tmp_path / "runs", second_home=str(tmp_path / "home"))
    out = capsys.readouterr().out
    assert f"fetching {tmp_path / 'home' / 'run'}\npicking up {run.folder} at step {step} of {STEPS}\n" in out
    assert run.folder == tmp_path / "runs" / "run"
    same(run, whole)
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["run"]
    assert show_run(tmp_path / "home" / "run").losses == whole.losses


@pytest.fixture
def left(recipe, tmp_path, at_step) -> Path:
    """The home of a run that died at its second step, with the machine it ran on."""
    at_step(2, die)
    with pytest.raises(DiedError):
        train(plan(recipe(), CPU), runs=tmp_path / "runs", second_home=tmp_path / "home")
    shutil.rmtree(tmp_path / "runs")
    return tmp_path / "home"


def test_another_recipe_is_refused_with_the_difference_and_nothing_is_fetched(recipe, tmp_path, left):
    before = contents(left)
    for resume in (None, True):
        with pytest.raises(RecipeError) as caught:
            train(plan(recipe(rank=4), CPU), runs=tmp_path / "runs", second_home=left, resume=resume)
        assert caught.value.what == f"{left / 'run'} is there already, unfinished, with another recipe"
        assert "rank: 16 there, 4 now" in caught.value.why
    assert not (tmp_path / "runs").exists()
    assert contents(left) == before


def test_a_new_run_beside_it_takes_nothing_away(recipe, tmp_path, left):
    before = contents(left / "run")
    run = train(plan(recipe(steps=1, rank=4), CPU), runs=tmp_path / "runs", second_home=left, resume=False)
    assert run.folder.name == "run"
    assert contents(left / "run") == before
    assert show_run(left / "run-2").losses == run.losses


@pytest.mark.slow
def test_more_steps_are_asked_for_as_ever(recipe, tmp_path, left):
    with pytest.raises(RecipeError, match="another recipe"):
        train(plan(recipe(steps=6), CPU), runs=tmp_path / "runs", second_home=left)
    assert len(train(plan(recipe(steps=6), CPU), runs=tmp_path / "runs", second_home=left, resume=True).losses) == 6


@pytest.mark.slow
def test_a_finished_run_is_left_alone_and_goes_on_when_it_is_asked_to(recipe, tmp_path):
    home, one = tmp_path / "home", plan(recipe(steps=1), CPU)
    run = train(one, runs=tmp_path / "runs", second_home=home)
    shutil.rmtree(tmp_path / "runs")
    more = train(plan(recipe(steps=2), CPU), runs=tmp_path / "runs", second_home=home, resume=True)
    assert more.losses[:1] == run.losses
    shutil.rmtree(tmp_path / "runs")
    before = contents(home / "run")
    with pytest.raises(RecipeError, match="nothing to resume"):
        train(one, name="other", runs=tmp_path / "runs", second_home=home, resume=True)
    train(one, runs=tmp_path / "runs", second_home=home)
    assert contents(home / "run") == before
    assert sorted(path.name for path in home.iterdir()) == ["run", "run-2"]


@pytest.mark.slow
def test_what_is_here_comes_first_and_finds_its_own_again(recipe, tmp_path, at_step, left):
    """Another machine's run has the name there; ours has its own place, also when it goes on."""
    at_step(2, die)
    with pytest.raises(DiedError):
        train(plan(recipe(rank=4), CPU), runs=tmp_path / "runs", second_home=left, resume=False)
    theirs = contents(left / "run")
    run = train(plan(recipe(rank=4), CPU), runs=tmp_path / "runs", second_home=left)
    assert run.folder.name == "run"
    assert contents(left / "run") == theirs
    assert sorted(path.name for path in left.iterdir()) == ["run", "run-2"]
    assert show_run(left / "run-2").losses == run.losses


def test_a_run_here_that_has_no_checkpoint_left_goes_on_from_there(recipe, tmp_path, left, capsys):
    run = train(plan(recipe(steps=1), CPU), runs=tmp_path / "runs")
    run.replace(status="running").save()
    shutil.rmtree(run.folder / CHECKPOINTS)
    assert len(train(plan(recipe(), CPU), runs=tmp_path / "runs", second_home=left).losses) == STEPS
    assert "at step 2 of" in capsys.readouterr().out


def test_a_damaged_copy_is_passed_over(recipe, tmp_path, left, capsys):
    names = sorted(path.name for path in (left / "run" / CHECKPOINTS).iterdir() if path.name != ASIDE)
    if len(names) == 1:  # the first was passed over
        shutil.copytree(left / "run" / CHECKPOINTS / names[0], left / "run" / CHECKPOINTS / "step-00000099")
    path = left / "run" / CHECKPOINTS / "step-00000002" / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    run = train(plan(recipe(), CPU), runs=tmp_path / "runs", second_home=left)
    assert len(run.losses) == STEPS
    out = capsys.readouterr().out
    assert "at step 1 of" in out if len(names) == 2 else "no checkpoint to go on from" in out


# --- beside the training


def test_a_home_that_hangs_delays_no_step_and_is_waited_for_at_the_end_and_not_for_ever(
    recipe, tmp_path, monkeypatch, capsys
):
    hangs = threading.Event()
    monkeypatch.setattr(second_home, "copy_run", lambda source, target: hangs.wait())
    monkeypatch.setattr(second_home, "WAIT_S", 0.3)
    run = train(plan(recipe(), CPU), runs=tmp_path / "runs", second_home=tmp_path / "home")
    hangs.set()
    assert (run.status, len(run.losses)) == (FINISHED, STEPS)
    out = capsys.readouterr().out
    home = tmp_path / "home"
    assert f"waiting up to 0.3 s for the last copy to {home}; an interrupt ends it\n" in out
    assert out.endswith(f"copying to {home} goes on while this process lives\n")


def test_an_interrupt_ends_the_wait_and_not_the_cell(recipe, tmp_path, monkeypatch, capsys):
    hangs = threading.Event()

    def copy(source, target):
        if (source / "report.html").exists():  # the training is over
            until(lambda: "waiting up to" in capsys.readouterr().out)
            os.kill(os.getpid(), signal.SIGINT)
            hangs.wait()

    monkeypatch.setattr(second_home, "copy_run", copy)
    assert train(plan(recipe(steps=1), CPU), runs=tmp_path / "runs", second_home=tmp_path / "home").status == FINISHED
    hangs.set()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_who_asks_to_end_at_once_waits_for_nothing(tmp_path, monkeypatch, kind, capsys):
    hangs = threading.Event()
    monkeypatch.setattr(second_home, "copy_run", lambda source, target: hangs.wait())
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(kind), copied_to(tmp_path / "home", "run", folder):
        raise kind
    hangs.set()
    assert capsys.readouterr().out == ""


def test_the_last_copy_is_made_after_the_last_word(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with copied_to(tmp_path / "home", "run", folder):
        (folder / STATUS).write_text("last")
    assert (tmp_path / "home" / "run" / STATUS).read_text() == "last"


# --- a home that is lost


def gone(home: Path) -> None:
    """As a drive that is unmounted."""
    home.parent.rename(home.parent.with_name("away"))


def back(home: Path) -> None:
    home.parent.with_name("away").rename(home.parent)


def test_a_home_that_goes_stops_nothing_and_gets_its_copies_when_it_is_back(recipe, tmp_path, at_step, capsys):
    whole = train(plan(recipe(), CPU), name="whole", runs=tmp_path)
    home, told = tmp_path / "drive" / "home", []
    home.parent.mkdir()

    def said():
        told.append(capsys.readouterr().out)
        return "no copy" in "".join(told)

    at_step(1, lambda: (until((home / "run" / CHECKPOINTS / "step-00000001").exists), gone(home)))
    at_step(3, lambda: until(said))
    at_step(4, lambda: back(home))
    run = train(plan(recipe(), CPU), runs=tmp_path / "runs", second_home=home)
    same(run, whole)
    lines = [line for line in ("".join(told) + capsys.readouterr().out).splitlines() if "no copy" in line]
    assert len(lines) == 1, "it is said once"
    assert lines[0].startswith(f"no copy in {home} (")
    assert lines[0].endswith("); training goes on, and it is tried again at the next checkpoint")
    assert show_run(home / "run").status == FINISHED
    assert newest(home / "run" / CHECKPOINTS).name == f"step-{STEPS:08d}"
    assert not (tmp_path / "drive" / "drive").exists()


OTHERS = (errno.EACCES, errno.EROFS, errno.ENOTCONN, errno.EIO)


@pytest.mark.parametrize("code", [errno.ENOSPC, *(pytest.param(code, marks=pytest.mark.slow) for code in OTHERS)])
def test_one_that_takes_nothing_is_told_once_and_at_the_end(recipe, tmp_path, monkeypatch, code, capsys):
    def refuses(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(second_home, "copy_run", refuses)
    run = train(plan(recipe(), CPU), runs=tmp_path / "runs", second_home=tmp_path / "home")
    assert run.status == FINISHED
    lines = [line for line in capsys.readouterr().out.splitlines() if "no copy" in line]
    assert len(lines) == 2
    assert all(os.strerror(code) in line for line in lines)
    assert not lines[1].endswith("next checkpoint")


def test_a_home_that_is_not_there_is_an_error_where_there_may_be_work_in_it(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("llamanb.training.load_data", None)
    home = tmp_path / "content" / "drive" / "llamanb"
    with pytest.raises(LlamanbError) as caught:
        train(plan(recipe(), CPU), runs=tmp_path / "runs", second_home=home)
    assert caught.value.what == f"the second home {home} cannot be read"
    assert "No such file or directory" in caught.value.why
    assert str(home) in caught.value.why
    assert "mounted" in caught.value.fix
    assert list(tmp_path.iterdir()) == [], "no folder in the way of mounting"


def test_a_disk_here_that_is_full_is_not_blamed_on_the_home(recipe, tmp_path, left, monkeypatch):
    monkeypatch.setattr(second_home, "_copy_files", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(LlamanbError, match="cannot be fetched") as caught:
        train(plan(recipe(), CPU), runs=tmp_path / "another", second_home=left)
    assert "free some room" in caught.value.fix
    assert "resume=False" not in caught.value.fix


def test_and_none_where_there_is_work_here_or_a_new_run_is_asked_for(recipe, tmp_path, at_step, capsys):
    home = tmp_path / "content" / "drive" / "llamanb"
    run = train(plan(recipe(steps=1), CPU), runs=tmp_path / "runs", second_home=home, resume=False)
    run = train(plan(recipe(steps=2), CPU), runs=tmp_path / "runs", second_home=home, resume=True)
    assert (run.status, len(run.losses)) == (FINISHED, 2)
    assert f"no copy in {home} (FileNotFoundError: " in capsys.readouterr().out


def test_a_home_that_is_a_file(recipe, tmp_path):
    (tmp_path / "home").touch()
    with pytest.raises(LlamanbError, match="cannot be read"):
        train(plan(recipe(), CPU), runs=tmp_path / "runs", second_home=tmp_path / "home")
