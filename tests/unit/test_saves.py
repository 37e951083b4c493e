"""When checkpoints are made, what writes them when it cannot, and what is in them."""

import errno
import itertools
import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from llamanb import Recipe, load_data, plan, train
from llamanb.errors import ModelError
from llamanb.run import FINISHED
from llamanb.scores import RowScore, Scores
from llamanb.timeline import Step, Timeline
from llamanb.training import saves, trainer
from llamanb.training.checkpoints import ASIDE, MANIFEST, newest
from llamanb.training.resume import CHECKPOINTS, PROGRESS, Progress, rows_hash
from llamanb.training.saves import Saves
from tests.unit.cut_off import CPU, STATES, STEPS, ending, files, recipes, same


@pytest.fixture(scope="module")
def recipe(mini, tmp_path_factory):
    return recipes(mini, tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("ended")


@pytest.fixture
def ended(monkeypatch, kept):
    return ending(monkeypatch, kept)


class Args:
    def __init__(self, output_dir):
        self.output_dir = output_dir


class Control:
    should_save = should_training_stop = False


class Clock:
    now_s = 100.0

    def monotonic(self):
        return self.now_s


class FakeTrainer:
    """As much of a trainer as `Saves` sees; a save takes `save_s` and fails with `error`."""

    def __init__(self, folder, clock):
        self.args, self.control, self.state = Args(str(folder / CHECKPOINTS / ASIDE)), Control(), Control()
        self.clock, self.save_s, self.error, self.written = clock, 0.0, None, []

    def add_callback(self, callback):
        self.callback = callback

    def _save_checkpoint(self, model, trial):
        made = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        made.mkdir(parents=True)
        self.clock.now_s += self.save_s
        (made / "half").write_text("x")
        if self.error:
            raise self.error
        self.written.append(self.state.global_step)

    def run(self, steps: int, step_s: float) -> list[int]:
        """Steps in which a checkpoint was tried."""
        tried = []
        self.callback.on_train_begin(None, self.state, self.control)
        for step in range(1, steps + 1):
            self.clock.now_s += step_s
            self.state.global_step = step
            self.control.should_save, self.control.should_training_stop = False, step == steps
            self.callback.on_step_end(None, self.state, self.control)
            if self.control.should_save:
                tried.append(step)
                self._save_checkpoint(None, None)
        return tried


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """`fake(**fields)`: a fake trainer with Saves attached."""

    def made(**fields):
        clock = Clock()
        monkeypatch.setattr(saves, "time", clock)
        trainer = FakeTrainer(tmp_path, clock)
        trainer.phases = []
        Saves(Recipe(**fields), Progress("rows"), Timeline("fake"), tmp_path).attach(trainer, trainer.phases.append)
        return trainer

    return made


def test_by_the_clock_and_at_the_end(fake, tmp_path):
    trainer = fake(checkpoint_every_min=10)
    assert trainer.run(100, 30.0) == [20, 40, 60, 80, 100]
    assert sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir()) == ["step-00000080", "step-00000100"]
    assert trainer.phases == ["save"] * 5


def test_ten_minutes_unless_more_is_asked_for(fake):
    assert fake().run(25, 60.0) == [10, 20, 25]


def test_by_steps(fake):
    assert fake(checkpoint_every_steps=4).run(10, 1.0) == [4, 8, 10]


def test_a_checkpoint_that_takes_long_is_made_less_often(fake):
    trainer = fake(checkpoint_every_min=1)
    trainer.save_s = 30.0
    tried = trainer.run(200, 10.0)
    assert tried == [6, 66, 126, 186, 200], "a twentieth of the time at most"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos")])
def test_one_that_fails_stops_nothing_is_told_once_and_tried_again_soon(fake, tmp_path, capsys, error):
    trainer = fake(checkpoint_every_min=10)
    trainer.error = error
    assert trainer.run(30, 30.0) == [20, 22, 24, 26, 28, 30]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2, "the first and, as there is no next try, the last"
    assert lines[0].startswith("no checkpoint at step 20 (")
    assert str(error).split("] ")[-1] in lines[0]
    assert lines[0].endswith("Earlier ones stay; training goes on, and tries again")
    assert lines[1].endswith("Earlier ones stay")
    assert not (tmp_path / CHECKPOINTS / ASIDE).exists(), "what it had written takes no room"
    trainer.error = None
    assert trainer.run(25, 30.0)[0] == 20
    assert newest(tmp_path / CHECKPOINTS).name == "step-00000025"


class Fails:
    """Fails the n-th call of what writes a checkpoint's files, with half a file written."""

    def __init__(self, patch, number: int):
        self.left = number
        for place, name in ((torch, "save"), (saves, "save_file"), (Progress, "save"), (saves, "flush")):
            patch.setattr(place, name, self.watched(getattr(place, name)))

    def watched(self, call):
        def outer(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(*args, **kwargs)

        return outer


@pytest.mark.slow
def test_a_disk_that_fills_up_at_any_write_leaves_the_training_and_the_older_checkpoint(recipe, tmp_path, monkeypatch):
    r = recipe(steps=3, checkpoint_every_steps=1, method="lora", eval_rows=0)
    whole = train(plan(r, CPU), name="whole", runs=tmp_path)
    build = trainer.build_trainer

    class Full(TrainerCallback):
        """The disk is full in the second step, and in no other."""

        def __init__(self, number, patch):
            self.number, self.patch = number, patch

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                self.fails = Fails(self.patch, self.number)
            elif state.global_step == 2:
                self.patch.undo()
                self.found = newest(Path(args.output_dir).parent).name

    for number in itertools.count(1):
        with monkeypatch.context() as patch:
            callbacks = [Full(number, patch)]
            patch.setattr(trainer, "build_trainer", lambda *args, c=callbacks: build(*args[:4], args[4] + c, *args[5:]))
            run = train(plan(r, CPU), name=f"run{number}", runs=tmp_path)
        (full,) = callbacks
        same(run, whole)
        if full.fails.left > 0:
            break
        assert full.found == "step-00000001", number
    assert full.found == "step-00000002"
    assert number > 10


def test_a_file_that_may_not_grow_is_no_end_of_the_training(recipe, tmp_path):
    """The real thing: the system refuses torch's and safetensors' own writes."""
    child = multiprocessing.get_context("fork").Process(target=_train_with_small_files, args=(recipe(), tmp_path))
    child.start()
    child.join(60)
    assert child.exitcode == 0


def _train_with_small_files(recipe, runs):
    import os
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    seen = []
    build = trainer.build_trainer

    class Small(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            limits = {1: 1000, 2: 20_000, 3: 140_000, 4: resource.RLIM_INFINITY}
            if size := limits.get(state.global_step):
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            seen.append(newest(runs / "run" / CHECKPOINTS))

    trainer.build_trainer = lambda p, m, d, f, c, *rest: build(p, m, d, f, [*c, Small()], *rest)
    run = train(plan(recipe.replace(checkpoint_every_steps=1, steps=6), CPU), runs=runs)
    steps = [path and path.name for path in seen]
    first = "step-00000001"
    good = steps == [None, first, first, first, first, "step-00000005"] and run.status == FINISHED
    os._exit(0 if good else 1)


# --- what is in them


def test_a_checkpoint_holds_no_pickled_arguments_no_card_and_asks_nobody(recipe, tmp_path, monkeypatch):
    import socket

    def refuses(*args, **kwargs):
        raise AssertionError("a question to the network")

    monkeypatch.setattr(socket.socket, "connect", refuses)
    r = recipe(steps=1, model=str(recipe().model))
    run = train(plan(r, CPU), runs=tmp_path)
    (checkpoint,) = (run.folder / CHECKPOINTS).iterdir()
    names = {path.name for path in checkpoint.iterdir()}
    assert names == {MANIFEST, PROGRESS, "trainer_state.json", *STATES}
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert b"posix" not in (checkpoint / name).read_bytes()


def test_every_load_is_of_weights_only(recipe, tmp_path, ended, monkeypatch):
    ended(recipe(), tmp_path, 2)
    loads, load = [], torch.load

    def watched(*args, **kwargs):
        loads.append(kwargs.get("weights_only"))
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", watched)
    train(plan(recipe(checkpoint_every_steps=1), CPU), runs=tmp_path)
    assert len(loads) >= 3
    assert set(loads) == {True}


class _Malicious:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('pwned').touch()",))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_that_would_rather_run_does_not(recipe, tmp_path, ended, monkeypatch, name):
    """With a manifest that vouches for it: whoever can write here can write that too."""
    folder = ended(recipe(), tmp_path / "runs", 2)
    monkeypatch.chdir(tmp_path)
    checkpoint = newest(folder / CHECKPOINTS)
    torch.save(_Malicious(), checkpoint / name)
    from llamanb.training.checkpoints import facts

    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"][name] = facts(checkpoint / name)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    assert newest(folder / CHECKPOINTS) == checkpoint
    there = files(folder)
    with pytest.raises(ModelError, match=name) as caught:
        train(plan(recipe(checkpoint_every_steps=1), CPU), runs=tmp_path / "runs")
    assert str(checkpoint) in caught.value.fix
    assert files(folder) == there, "refused before any change"
    shutil.rmtree(checkpoint)
    assert len(train(plan(recipe(checkpoint_every_steps=1), CPU), runs=tmp_path / "runs").losses) == STEPS
    assert not (tmp_path / "pwned").exists()


def test_progress_is_read_as_it_was_written(tmp_path):
    steps = (Step(1, 0.1, float("inf"), 2e-4, 0.5, 10), Step(2, 0.2, 1.0, 1e-4, 0.25, 2**53))
    for before in (None, Scores((RowScore(1.5, 2, "a"), RowScore(0.1, 3, 'b "c"', True, False, 0.25))), Scores(())):
        made = Progress("rows", before, 12.5, steps, [[9, 3], [8, 3]])
        made.save(tmp_path)
        assert Progress.load(tmp_path) == made


def test_rows_are_told_apart(recipe):
    import dataclasses

    data = load_data(recipe())
    known = rows_hash(data)
    assert rows_hash(load_data(recipe())) == known
    first, *rest = data.train
    others = [
        [*rest, first],
        rest,
        [dataclasses.replace(first, labels=first.input_ids), *rest],
        [dataclasses.replace(first, input_ids=first.input_ids[::-1]), *rest],
    ]
    assert len({known, *(rows_hash(dataclasses.replace(data, train=rows)) for rows in others)}) == 5
    moved = dataclasses.replace(data, train=[*data.train, data.held_out[0]], held_out=data.held_out[1:])
    assert rows_hash(moved) != known
