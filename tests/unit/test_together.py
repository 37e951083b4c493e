"""Several processes that train together: one card's numbers, and what becomes of all when one fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.launcher.api import LaunchConfig

from llamanb import Card, Recipe, plan, train
from llamanb.run import Run
from llamanb.scale import launch as launching
from llamanb.scale.launch import LaunchError, command, launch
from llamanb.tiny import DEFAULTS
from llamanb.training.saves import IN_A_ROW
from llamanb.training.step import StepTrainer
from tests.conftest import ROOT

CPU = Card("CPU", None)
PATH = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
"""Where the processes look for modules: as this one, and in the project."""
LACK = "out of memory"
BACKWARD = f"{LACK} in the backward pass"
LONG = "not a number for long"
STEPS = 8


def recipe(**more):
    """Steps of 5 rows: uneven shares."""
    few = {"steps": STEPS, "eval_rows": 0, "effective_batch_size": 5, "checkpoint_every_steps": 2}
    return Recipe(**{**DEFAULTS, **few, **more})


def started(folder, faults=None, cards=2, sharded=False, **more):
    """Launched as `launch` does it, with faults on rank 1, each in its step."""
    path = folder / "recipe.json"
    path.write_text(recipe(**more).to_json())
    arguments = command(path, cards, "run", folder, module="tests.rank_process")
    environment = os.environ | {"FAULTS": json.dumps(faults or {}), "OMP_NUM_THREADS": "1", "PYTHONPATH": PATH}
    environment |= {"SHARDED": "1"} if sharded else {}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(arguments, env=environment, start_new_session=True, cwd=ROOT, **pipes)


def ranks_of(folder) -> list[int]:
    """Processes that still train there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:
            continue
        if str(folder / "recipe.json") in words:
            found.append(int(path.parent.name))
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train(plan(recipe(), CPU), runs=tmp_path_factory.mktemp("alone"))


@pytest.mark.slow
def test_two_processes_come_to_what_one_comes_to(alone, tmp_path, capfd):
    run = launch(recipe(), 2, runs=tmp_path)
    assert run.status == "finished"
    assert (run.plan.cards, run.plan.micro_batch_size * run.plan.accumulation) == (2, 3)
    assert run.losses == pytest.approx(alone.losses, rel=1e-5)
    norms = [[step.grad_norm for step in one.timeline.steps] for one in (run, alone)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    tokens = [[step.tokens for step in one.timeline.steps] for one in (run, alone)]
    assert tokens[0] == tokens[1]
    said = capfd.readouterr().out
    assert said.count("loading tiny") == 1, "one rank speaks"
    assert "DISTRIBUTED" not in said


@pytest.mark.slow
def test_passes_over_few_rows_with_steps_of_fewer_rows_than_ranks(tmp_path):
    """12 rows, 5 a step: each pass is shuffled anew, and its last step has 2 rows for 3 ranks. Dropout too small to
    drop anything draws its numbers all the same."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {i} " + "word " * (i + 5)}) + "\n" for i in range(12)))
    few = recipe(dataset=str(rows), dropout=1e-12, steps=STEPS)
    one, three = train(plan(few, CPU), runs=tmp_path, name="one"), launch(few, 3, runs=tmp_path, name="three")
    assert three.losses == pytest.approx(one.losses, rel=1e-5)
    assert {step.tokens for step in one.timeline.steps} == {step.tokens for step in three.timeline.steps}


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others_and_any_number_goes_on(alone, tmp_path):
    process = started(tmp_path, {"killed": 5})
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0, said
    assert ranks_of(tmp_path) == []
    cut = Run.open(tmp_path / "run")
    assert cut.status in ("running", "ended by RankEnded"), (
        "rank 0 is ended too, or has seen the connection close first"
    )
    assert len(cut.losses) < STEPS
    for name in ("one", "four"):
        shutil.copytree(tmp_path / "run", tmp_path / name / "run")
    runs = [train(plan(recipe(), CPU), runs=tmp_path / "one"), launch(recipe(), 4, runs=tmp_path / "four")]
    for run in runs:
        assert run.status == "finished"
        assert run.folder.name == "run"
        assert run.losses == pytest.approx(alone.losses, rel=1e-5)


@pytest.mark.slow
def test_what_one_rank_lacks_changes_no_number_and_what_is_none_there_takes_all_back(tmp_path, monkeypatch):
    """Memory that runs out in the third step is no matter; losses that stay not finite lead back to a checkpoint and
    half the learning rate, as in one process."""
    process = started(tmp_path, {LACK: 3, LONG: 5}, steps=12)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert f"{LACK} at step 3" in said
    two = Run.open(tmp_path / "run")
    summed, bad, few = StepTrainer._summed, iter(range(IN_A_ROW)), recipe(steps=12)

    def sum_up(self, *arguments):
        spoilt = self.state.global_step + 1 >= 5 and next(bad, None) is not None
        return summed(self, *arguments) * (float("nan") if spoilt else 1)

    monkeypatch.setattr(StepTrainer, "_summed", sum_up)
    one = train(plan(few, CPU), runs=tmp_path, name="one")
    assert two.timeline.returns == one.timeline.returns == [[9, 2]]
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    rates = [[step.learning_rate for step in run.timeline.steps] for run in (two, one)]
    assert rates[0] == pytest.approx(rates[1])


@pytest.mark.slow
def test_an_error_on_one_rank_is_told_and_ends_all(tmp_path):
    process = started(tmp_path, {"broken": 5})
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "this rank is broken" in said
    assert ranks_of(tmp_path) == []


@pytest.mark.slow
def test_an_interrupt_ends_all_ranks_after_the_same_step(alone, tmp_path):
    process = started(tmp_path, steps=10_000, checkpoint_every_steps=1)
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob("run/checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    rank0 = [pid for pid in ranks_of(tmp_path) if b"RANK=0" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
    os.kill(rank0[0], signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    run = Run.open(tmp_path / "run")
    assert run.status == "interrupted"
    assert run.timeline.steps[-1].step < 10_000
    assert ranks_of(tmp_path) == []


STOPS = """
import signal, time
{before}
try:
    print("begun", flush=True)
    time.sleep(10_000)
except KeyboardInterrupt:
    print("saved")
"""


@pytest.mark.parametrize(
    ("before", "end"), [("", "saved"), ("signal.signal(signal.SIGINT, signal.SIG_IGN)", "begun")], ids=["ends", "hangs"]
)
def test_what_ranks_say_after_an_interrupt_is_shown_and_what_does_not_end_is_ended(monkeypatch, before, end):
    """An interrupt of this process, as a notebook's."""
    shown = []

    def show(line, **_):
        shown.append(line.strip())
        if line.strip() == "begun":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(launching, "print", show, raising=False)
    monkeypatch.setattr(launching, "ENDS_S", 60.0 if end == "saved" else 0.5)
    with pytest.raises(KeyboardInterrupt):
        launching._shown([sys.executable, "-c", STOPS.format(before=before)], 1, cpu=True)
    assert shown[-1] == end


@pytest.mark.skipif(not hasattr(LaunchConfig, "shutdown_timeout"), reason="torchrun of torch 2.11 waits for 30 s")
def test_torchrun_waits_for_ranks_that_end_by_themselves(capfd):
    """It would kill them 30 s after an interrupt, in the midst of a checkpoint or of scores."""
    code = "from torch.distributed.launcher.api import LaunchConfig as C; print('waits', C(1, 1, 1).shutdown_timeout)"
    _, said = launching._shown([sys.executable, "-c", code], 1, cpu=True)
    assert said[-1] == f"waits {launching.ENDS_S:g}"


@pytest.mark.slow
def test_layers_that_ranks_share(alone, tmp_path):
    """Each holds a part of every layer; scores are rank 0's alone."""
    faults = {LACK: 3, BACKWARD: 5, "not a number": STEPS}
    process = started(tmp_path, faults, 3, sharded=True, eval_rows=6, weights="streamed")
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    run = Run.open(tmp_path / "run")
    assert (run.status, run.plan.shards) == ("finished", 3)
    assert [f"{LACK} at step {step}" in said for step in (3, 5)] == [True, True]
    assert run.losses[:-1] == pytest.approx(alone.losses[:-1], rel=1e-5)
    assert [step.step for step in run.timeline.steps if step.skipped] == [STEPS]
    assert run.scores.after.loss < run.scores.before.loss


def test_too_many_processes_are_refused_before_any_is_launched(monkeypatch):
    monkeypatch.setattr(launching, "_shown", lambda *args: pytest.fail("launched"))
    for cards in (0, 6, True, "2"):
        with pytest.raises(launching.RecipeError, match="a step has 5 rows"):
            launch(recipe(), cards)


@pytest.mark.slow
def test_what_rank_0_says_is_the_error(tmp_path):
    with pytest.raises(LaunchError, match="no such file"):
        launch(recipe(dataset="no such file.jsonl"), 2, runs=tmp_path)


def accelerated(folder, *options):
    """`accelerate launch`, without a configuration of this machine's."""
    path = folder / "recipe.json"
    path.write_text(recipe().to_json())
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *options, "--num_processes", "2"]
    arguments = [*launcher, "-m", "llamanb", str(path), "--runs", str(folder)]
    environment = os.environ | {"HF_HOME": str(folder), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": PATH}
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, cwd=folder, timeout=120)


@pytest.mark.slow
def test_accelerate_launches_it_too_whatever_precision_it_is_set_to(alone, tmp_path):
    done = accelerated(tmp_path, "--multi_gpu", "--mixed_precision", "bf16", "--main_process_port", "0")
    assert done.returncode == 0, done.stderr
    run = Run.open(tmp_path / "run")
    assert run.plan.cards == 2
    assert run.losses == pytest.approx(alone.losses, rel=1e-5)


@pytest.mark.slow
def test_accelerate_that_starts_one_process_of_two_is_told_so(tmp_path):
    done = accelerated(tmp_path, "--cpu")
    assert done.returncode != 0
    assert "one process was launched where several were asked for" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_by_itself_it_trains_too(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(recipe(steps=2).to_json())
    arguments = [sys.executable, "-m", "llamanb", str(path), "--runs", str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
