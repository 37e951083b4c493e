"""A training that goes on where it was: to the same result, bit for bit, or not at all and with the reason."""

import csv
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from llamanb import Recipe, load_adapter, load_data, plan, show_run, train
from llamanb.errors import RecipeError
from llamanb.run import FINISHED, RUNNING
from llamanb.training import trainer
from llamanb.training.checkpoints import MANIFEST, lock, newest
from llamanb.training.resume import CHECKPOINTS, FREE, Progress, pick_up
from tests.unit.cut_off import CPU, PASS, STEPS, Ends, ending, files, recipes, same


@pytest.fixture(scope="module")
def recipe(mini, tmp_path_factory):
    return recipes(mini, tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("ended")


@pytest.fixture
def ended(monkeypatch, kept):
    return ending(monkeypatch, kept)


VARIANTS = {
    "nf4": {},
    "whole": {"method": "full", "optimizer": "adamw_torch_fused", "micro_batch_size": 1, "schedule": "cosine"},
    "lora": {"method": "lora", "dora": True, "effective_batch_size": 6, "micro_batch_size": 3, "dropout": 0.5},
    "int8": {"method": "qlora-int8", "optimizer": "adamw_8bit", "rank": 128, "micro_batch_size": 4},
    "checkpointed": {"method": "lora", "checkpointing": "all", "epochs": 1.5, "steps": None, "warmup": 0.5},
}


QUICK = ("nf4", "whole")


@pytest.mark.parametrize("variant", [pytest.param(v, marks=[pytest.mark.slow] * (v not in QUICK)) for v in VARIANTS])
def test_a_run_that_died_comes_to_what_it_would_have_come_to(recipe, tmp_path, ended, variant):
    r = recipe(checkpoint_every_steps=1, **VARIANTS[variant])
    whole = train(plan(r, CPU), name="whole", runs=tmp_path)
    steps = len(whole.losses)
    for step in (2, PASS, steps - 1):  # within a pass, at its edge, before the last
        ended(r, tmp_path, step, f"after-{step}")
        run = train(plan(r, CPU), name=f"after-{step}", runs=tmp_path)
        assert run.folder == tmp_path / f"after-{step}"
        same(run, whole)


@pytest.mark.slow
def test_one_that_dies_again_and_again_does_too(recipe, tmp_path, ended):
    r = recipe(checkpoint_every_steps=1)
    whole = train(plan(r, CPU), name="whole", runs=tmp_path)
    for step in range(1, STEPS):
        ended(r, tmp_path, step)
    assert not (tmp_path / "run-2").exists()
    run = train(plan(r, CPU), runs=tmp_path)
    same(run, whole)
    times = [step.time_s for step in run.timeline.steps]
    assert times == sorted(times)


def test_it_says_where_it_goes_on_and_scores_the_untrained_model_once(recipe, tmp_path, ended, capsys):
    folder = ended(recipe(), tmp_path, 3)
    assert "scoring 2 held-out rows before training" in capsys.readouterr().out
    run = train(plan(recipe(checkpoint_every_steps=1), CPU), runs=tmp_path)
    out = capsys.readouterr().out
    assert f"picking up {folder} at step 3 of {STEPS}\n" in out
    assert "before training" not in out
    assert f"step 4 of {STEPS}, loss" in out
    assert "\nstep 3 of" not in out
    assert run.scores.before.loss > run.scores.after.loss


def test_what_was_watched_goes_on_after_the_checkpoint(recipe, tmp_path, monkeypatch):
    """Rows of steps that were lost go; time goes on from the last step that counts."""
    monkeypatch.setattr("llamanb.watch.sampler.INTERVAL_S", 0.01)
    r = recipe(checkpoint_every_steps=3)

    class Dies(Ends):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise SystemExit

    build = trainer.build_trainer
    with monkeypatch.context() as patch:
        patch.setattr(
            trainer, "build_trainer", lambda p, m, d, f, cbs, *rest: build(p, m, d, f, [*cbs, Dies(9)], *rest)
        )
        with pytest.raises(SystemExit):
            train(plan(r, CPU), runs=tmp_path)
    died = show_run(tmp_path / "run")
    assert len(died.losses) == 4
    run = train(plan(r, CPU), runs=tmp_path)
    assert [step.step for step in run.timeline.steps] == list(range(1, STEPS + 1))
    third, fourth = run.timeline.steps[2:4]
    assert run.timeline.steps[:3] == died.timeline.steps[:3]
    assert third.time_s < fourth.time_s
    kept = [sample for sample in died.timeline.samples if sample.time_s <= third.time_s]
    assert run.timeline.samples[: len(kept)] == kept
    assert run.timeline.samples[len(kept)].time_s > third.time_s
    assert [s.time_s for s in run.timeline.samples] == sorted(s.time_s for s in run.timeline.samples)
    again = show_run(run.folder)
    assert (again.timeline.steps, again.timeline.samples) == (run.timeline.steps, run.timeline.samples)
    with (run.folder / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(1, STEPS + 1))
    before = Progress.load(run.folder / CHECKPOINTS / "step-00000006").train_s
    assert run.train_s > before > 0


@pytest.mark.parametrize("name", ["metrics.csv", "memory.csv", "timeline.json", "run.json", "recipe.json"])
@pytest.mark.parametrize("content", [None, b"", b"\0\0\0", b"step\nstep\n"])
def test_no_work_is_lost_with_a_file_that_only_tells_of_it(recipe, tmp_path, ended, name, content):
    folder = ended(recipe(steps=4), tmp_path, 3)
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    run = train(plan(recipe(steps=4, checkpoint_every_steps=1), CPU), runs=tmp_path)
    assert run.folder == folder
    assert len(run.losses) == 4
    assert show_run(folder).losses == run.losses


def test_a_damaged_checkpoint_is_passed_over(recipe, tmp_path, ended, capsys):
    r = recipe(checkpoint_every_steps=1)
    whole = train(plan(r, CPU), name="whole", runs=tmp_path)
    folder = ended(r, tmp_path, 4)
    path = folder / CHECKPOINTS / "step-00000004" / "trained.safetensors"
    spoiled = bytearray(path.read_bytes())
    spoiled[-5] ^= 4  # safetensors would not notice
    path.write_bytes(spoiled)
    load_file(path)
    run = train(plan(r, CPU), runs=tmp_path)
    assert "at step 3 of" in capsys.readouterr().out
    same(run, whole)


def test_what_fails_while_it_scores_is_picked_up_after_the_last_step(recipe, tmp_path, monkeypatch, capsys):
    r = recipe(steps=3)
    whole = train(plan(r, CPU), name="whole", runs=tmp_path)

    def fails(*args):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("llamanb.evaluate.compare", fails)
        with pytest.raises(MemoryError):
            train(plan(r, CPU), runs=tmp_path)
    shutil.rmtree(tmp_path / "run" / "adapter")
    run = train(plan(r, CPU), runs=tmp_path)
    assert f"picking up {run.folder} at step 3 of 3" in capsys.readouterr().out
    same(run, whole)
    assert run.train_s > 0
    assert load_adapter(run.folder)


def test_a_run_is_finished_only_when_it_has_been_scored(recipe, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "llamanb.evaluate.compare", lambda *args: seen.append(show_run(tmp_path / "run").status) or (1 / 0)
    )
    with pytest.raises(ZeroDivisionError):
        train(plan(recipe(steps=2), CPU), runs=tmp_path)
    assert seen == [RUNNING]


def test_a_finished_run_is_left_alone(recipe, tmp_path, capsys):
    p = plan(recipe(steps=2), CPU)
    first = train(p, runs=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    second = train(p, runs=tmp_path)
    assert second.folder.name == "run-2"
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == before
    with pytest.raises(RecipeError, match="nothing to resume") as caught:
        train(p, runs=tmp_path, resume=True)
    assert "run-2 is finished, and no more steps are asked for" in caught.value.why
    assert "beginning a new run" not in capsys.readouterr().out


def test_a_finished_run_goes_on_for_more_steps_when_it_is_asked_to(recipe, tmp_path, capsys, monkeypatch):
    run = train(plan(recipe(steps=4), CPU), runs=tmp_path)
    assert train(plan(recipe(steps=5), CPU), runs=tmp_path).folder.name == "run-2", "not by itself"
    shutil.rmtree(tmp_path / "run-2")
    used, build = [], trainer.build_trainer

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            used.append(optimizer.param_groups[0]["lr"])

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "build_trainer", lambda *args: build(*args[:4], [*args[4], Look()], *args[5:]))
        more = train(plan(recipe(steps=6), CPU), runs=tmp_path, resume=True)
    assert more.folder == run.folder
    assert more.losses[:4] == run.losses
    assert len(more.losses) == 6
    assert "at step 4 of 6" in capsys.readouterr().out
    whole = train(plan(recipe(steps=6), CPU), name="whole", runs=tmp_path)
    rates, wanted = ([step.learning_rate for step in run.timeline.steps] for run in (more, whole))
    assert rates[4:] == wanted[4:] == used, "the schedule is that of six steps from there on"
    assert rates[:4] == [step.learning_rate for step in run.timeline.steps]
    assert more.train_s > run.train_s
    assert Recipe.load(run.folder / "recipe.json").steps == 6
    assert show_run(run.folder).status == FINISHED


def test_asked_for_more_steps_and_killed_it_goes_on_by_itself(recipe, tmp_path, ended):
    train(plan(recipe(steps=2, checkpoint_every_steps=1), CPU), runs=tmp_path)
    ended(recipe(steps=6), tmp_path, 2, resume=True)  # before its first checkpoint
    run = train(plan(recipe(steps=6, checkpoint_every_steps=1), CPU), runs=tmp_path)
    assert (run.folder.name, len(run.losses)) == ("run", 6)


def test_it_does_not_become_shorter(recipe, tmp_path, ended):
    ended(recipe(), tmp_path, 5)
    with pytest.raises(RecipeError, match="cannot become shorter") as caught:
        train(plan(recipe(steps=3, checkpoint_every_steps=1), CPU), runs=tmp_path, resume=True)
    assert "of step 5, and 3 are asked for" in caught.value.why


def test_another_recipe_is_refused_with_the_difference_before_any_data_is_read(recipe, tmp_path, ended, monkeypatch):
    folder = ended(recipe(), tmp_path, 3)
    changed = recipe(rank=4, learning_rate=3e-3, steps=20, checkpoint_every_steps=1)
    asked = plan(changed, CPU)
    monkeypatch.setattr("llamanb.training.load_data", None)
    before = files(folder)
    for resume in (None, True):
        with pytest.raises(RecipeError) as caught:
            train(asked, runs=tmp_path, resume=resume)
        error = caught.value
        assert error.what == f"{folder} is there already, unfinished, with another recipe"
        assert error.why == "rank: 16 there, 4 now; steps: 8 there, 20 now; learning_rate: 0.01 there, 0.003 now"
        assert "another name=, or resume=False" in error.fix
        assert "rank, learning_rate decided what is trained" in error.fix
        (table,) = error.details
        assert table.rows == [["rank", 16, 4], ["steps", 8, 20], ["learning_rate", 0.01, 3e-3]]
    assert files(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_fields_that_decide_nothing_may_change_when_that_is_asked_for(recipe, tmp_path, ended, capfd):
    ended(recipe(), tmp_path, 3)
    r = recipe(micro_batch_size=4, checkpointing="all", checkpoint_every_steps=2, checkpoint_every_min=5, steps=7)
    with pytest.raises(RecipeError, match="unfinished") as caught:
        train(plan(r, CPU), runs=tmp_path)
    assert caught.value.fix.endswith("or resume=True to go on")
    run = train(plan(r, CPU), runs=tmp_path, resume=True)
    assert len(run.losses) == 7
    assert show_run(run.folder).plan.micro_batch_size == 4
    assert capfd.readouterr().err == ""


def test_where_weights_lie_is_not_asked_about(recipe, tmp_path, ended):
    """A run of before says `resident`, and no bit depends on it."""
    ended(recipe(weights="resident"), tmp_path, 3)
    run = train(plan(recipe(checkpoint_every_steps=1), CPU), runs=tmp_path)
    assert (run.folder.name, run.plan.recipe.weights) == ("run", "auto")


def test_every_other_field_decides(recipe, tmp_path, ended):
    """A new field of a recipe is thought of as one that decides until it is named in FREE."""
    fields = {name: getattr(recipe(), name) for name in recipe().__dataclass_fields__}
    assert fields.keys() >= FREE
    assert {"eval_rows", "seed", "max_length", "effective_batch_size", "targets", "dataset", "warmup"}.isdisjoint(FREE)


def test_another_card_s_arithmetic_or_optimizer_is_another_recipe(recipe, tmp_path, ended):
    ended(recipe(), tmp_path, 2)
    other = plan(recipe(checkpoint_every_steps=1), CPU)
    for name, value in (("dtype", "bf16"), ("optimizer", "paged_adamw_8bit")):
        with pytest.raises(RecipeError, match="another recipe") as caught:
            train(other.replace(**{name: value}), runs=tmp_path, resume=True)
        assert f"{value!r} now" in caught.value.why


def test_other_rows_are_refused(recipe, tmp_path, ended):
    r = recipe(checkpoint_every_steps=1)
    data = load_data(r)
    ended(r, tmp_path, 2)
    rows = Path(r.dataset).read_text()
    try:
        Path(r.dataset).write_text(rows.replace("Say 3.", "Say 4."))
        with pytest.raises(RecipeError, match="trained on other rows"):
            train(plan(r, CPU), runs=tmp_path)
    finally:
        Path(r.dataset).write_text(rows)
    assert train(plan(r, CPU), data, runs=tmp_path).folder.name == "run"


def test_resume_false_begins_a_new_run_beside_it(recipe, tmp_path, ended):
    folder = ended(recipe(), tmp_path, 2)
    run = train(plan(recipe(rank=4, steps=1), CPU), runs=tmp_path, resume=False)
    assert run.folder.name == "run-2"
    assert show_run(folder).status == "ended by SystemExit"
    assert newest(folder / CHECKPOINTS).name == "step-00000002"


def test_where_there_is_nothing_to_go_on_from_it_says_so(recipe, tmp_path, ended, capsys):
    p = plan(recipe(checkpoint_every_steps=1), CPU)
    with pytest.raises(RecipeError, match="nothing to resume") as caught:
        train(p, runs=tmp_path, resume=True)
    assert "there is no run 'run'" in caught.value.why
    folder = ended(recipe(), tmp_path, 2)
    for path in (folder / CHECKPOINTS).glob(f"*/{MANIFEST}"):
        path.unlink()
    with pytest.raises(RecipeError, match="nothing to resume"):
        train(p, runs=tmp_path, resume=True)
    capsys.readouterr()
    assert train(plan(recipe(steps=1), CPU), runs=tmp_path).folder.name == "run-2"
    assert f"{folder} has no checkpoint to go on from; beginning a new run\n" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"recipe": {"model": 3}}', None])
def test_a_plan_that_cannot_be_read_ends_in_a_new_run(recipe, tmp_path, content, capsys):
    run = train(plan(recipe(steps=1), CPU), runs=tmp_path)
    run.replace(status=RUNNING).save()
    (run.folder / "plan.json").unlink() if content is None else (run.folder / "plan.json").write_bytes(content)
    with ExitStack() as held:
        assert pick_up(plan(recipe(steps=1), CPU), tmp_path, "run", None, held) is None
    assert "plan.json cannot be read" in capsys.readouterr().out


def test_a_run_that_lives_is_not_touched(recipe, tmp_path, ended, capsys):
    folder = ended(recipe(), tmp_path, 2)
    before = files(folder)
    p = plan(recipe(checkpoint_every_steps=1, steps=STEPS), CPU)
    with lock(folder):
        with pytest.raises(RecipeError, match="nothing to resume") as caught:
            train(p, runs=tmp_path, resume=True)
        assert "is being trained by another process" in caught.value.why
        run = train(plan(recipe(steps=1), CPU), runs=tmp_path)
    assert run.folder.name == "run-2"
    assert "another process; beginning a new run" in capsys.readouterr().out
    assert files(folder) == before


def test_a_run_is_locked_while_it_trains_and_free_afterwards(recipe, tmp_path, monkeypatch):
    seen = []
    build = trainer.build_trainer

    def look(plan, model, data, folder, *rest):
        with lock(folder) as free:
            seen.append(free)
        return build(plan, model, data, folder, *rest)

    monkeypatch.setattr(trainer, "build_trainer", look)
    run = train(plan(recipe(steps=1), CPU), runs=tmp_path)
    train(plan(recipe(steps=2), CPU), runs=tmp_path, resume=True)
    assert seen == [False, False]
    with lock(run.folder) as free:
        assert free


@pytest.mark.parametrize(
    ("there", "found"),
    [
        ([], None),
        (["run"], "run"),
        (["run", "run-2", "run-10"], "run-10"),
        (["run", "run-3"], "run-3"),
        (["run", "run-1", "run-02", "run-x", "run-2.bak", "runs", "arun-5", "run.2-7"], "run"),
    ],
)
def test_the_newest_of_a_name_is_the_one_with_the_highest_number(tmp_path, there, found):
    from llamanb.run import new_folder, newest_folder

    for name in there:
        (tmp_path / name).mkdir()
    (tmp_path / "run-77").touch()
    (tmp_path / "run-88").symlink_to(tmp_path)
    assert newest_folder(tmp_path, "run") == (tmp_path / found if found else None)
    assert (
        new_folder(tmp_path, "run").name == {None: "run", "run": "run-2", "run-10": "run-11", "run-3": "run-4"}[found]
    )
