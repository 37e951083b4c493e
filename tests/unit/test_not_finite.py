"""Numbers that are not finite: seen, kept out, and what a run does when they stay. All places and steps are tried in
tests/faults/test_numbers.py."""

import csv
import json
import math
import threading
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from llamanb import Card, Recipe, load_adapter, load_data, plan, show_run, train
from llamanb.errors import ModelError
from llamanb.run import FINISHED
from llamanb.training import second_home
from llamanb.training.checkpoints import MANIFEST, facts, holds, newest, step_of
from llamanb.training.numbers import MOST_RETURNS, NotFiniteError
from llamanb.training.resume import CHECKPOINTS, Progress
from llamanb.training.saves import IN_A_ROW, WEIGHTS
from tests.injected import Ends, Untouched, Value, inject, scaled

STEPS, RATE = 12, 1e-2


@pytest.fixture(scope="module")
def made(mini, tmp_path_factory):
    """`made(...)`: a plan and its data."""
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"instruction": f"Say {n}.", "output": f"It is {n}."}) for n in range(18)))
    fields = {"model": str(mini), "dataset": str(rows), "max_length": 128, "effective_batch_size": 4, "steps": STEPS}
    fields |= {"micro_batch_size": 2, "eval_rows": 0, "learning_rate": RATE, "dropout": 0.2}
    recipe = Recipe(**fields, checkpoint_every_steps=3)
    data = load_data(recipe)
    return lambda **more: (plan(recipe.replace(**more), Card("CPU", None)), data)


def from_step(step: int, *, rate: float | None = None):
    """`when` of a Value: in that step and all later ones, at that learning rate where one is given."""
    return lambda trainer: trainer.state.global_step >= step - 1 and rate in (None, trainer.args.learning_rate)


@pytest.mark.parametrize(("place", "value"), [("loss", math.inf), ("gradient", math.nan), ("micro-batch", -math.inf)])
def test_a_step_is_skipped_shown_and_written_down(made, tmp_path, monkeypatch, capsys, place, value):
    fault, look = Value(place, value, lambda trainer: trainer.state.global_step == 3), Untouched()
    inject(monkeypatch, fault, look)
    run = train(*made(steps=6), runs=tmp_path)
    assert (run.status, look.steps, look.finite) == (FINISHED, [4], True)
    with (run.folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    shown = {name: float(rows[3][name]) for name in ("loss", "grad_norm")}
    assert [math.isfinite(shown["loss"]), math.isfinite(shown["grad_norm"])] == [place == "gradient", place == "loss"]
    assert all(math.isfinite(float(row["loss"])) and row["loss"] != "0.0" for row in rows[:3] + rows[4:])
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("step 4 of 6, "))
    assert f"loss {shown['loss']:.3f}, 1 skipped, not finite" in line
    assert "1 skipped, not finite" in str(show_run(run.folder))
    assert "1 skipped, not finite" in (run.folder / "report.html").read_text()


def test_the_scale_s_fall_is_shown_and_is_no_trouble(made, tmp_path, monkeypatch, capsys):
    steps = IN_A_ROW + 4
    fault = Value("gradient", math.inf, lambda trainer: trainer.accelerator.scaler.get_scale() > 2.0 ** (16 - IN_A_ROW))
    inject(monkeypatch, fault, scaled)
    run = train(*made(steps=steps), runs=tmp_path)
    assert (run.status, run.timeline.returns) == (FINISHED, [])
    assert [s.skipped for s in run.timeline.steps] == [True] * IN_A_ROW + [False] * 4
    assert [s.scale for s in run.timeline.steps] == [2.0 ** (16 - min(n, IN_A_ROW)) for n in range(steps)]
    assert "2 skipped, not finite (fp16's scale 65536 at first, now 32768)" in capsys.readouterr().out


def test_a_run_goes_back_and_a_later_session_goes_on_with_its_rate(made, tmp_path, monkeypatch, capsys):
    """Bad from step 7 on: back to 3, for nothing was learned after 6. Undisturbed, and dead right after that."""
    p, data = made()
    fault = Value("layer", math.nan, from_step(7, rate=RATE))
    with monkeypatch.context() as patch:
        inject(patch, fault)
        whole = train(p, data, name="whole", runs=tmp_path)
    bad = 6 + IN_A_ROW
    assert whole.timeline.returns == [[bad, 3]]
    assert f"not finite at step {bad}: back to step 3 with half the learning rate\n" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        inject(patch, fault, Ends(lambda trainer: trainer.state.global_step == 4 and trainer.args.learning_rate < RATE))
        with pytest.raises(SystemExit):
            train(p, data, runs=tmp_path)
    assert Progress.load(newest(tmp_path / "run" / CHECKPOINTS)).returns == [], "no checkpoint knows yet"
    run = train(p, data, runs=tmp_path)
    assert f"picking up {tmp_path / 'run'} at step 3" in capsys.readouterr().out
    assert run.timeline.returns == show_run(run.folder).timeline.returns == [[bad, 3]]
    assert [s._replace(time_s=0) for s in run.timeline.steps] == [s._replace(time_s=0) for s in whole.timeline.steps]
    assert max(s.learning_rate for s in run.timeline.steps[3:]) <= RATE / 2
    for name in (WEIGHTS, "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        last = f"{CHECKPOINTS}/step-{STEPS:08d}/{name}"
        assert (run.folder / last).read_bytes() == (whole.folder / last).read_bytes()
    (run.folder / "timeline.json").unlink()  # which only tells of it
    more = train(*made(steps=STEPS + 2), runs=tmp_path, resume=True)
    assert more.timeline.returns == [[bad, 3]]
    assert max(s.learning_rate for s in more.timeline.steps[STEPS:]) <= RATE / 2
    assert [s.step for s in more.timeline.steps] == list(range(1, STEPS + 3))


class Code:
    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


def test_it_does_not_go_back_to_what_somebody_else_wrote(made, tmp_path, monkeypatch):
    earlier = tmp_path / "run" / CHECKPOINTS / "step-00000003"

    def planted(trainer):
        """In step 7, with a manifest that vouches for it."""
        if trainer.state.global_step == 6:
            torch.save(Code(), earlier / "optimizer.pt")
            manifest = json.loads((earlier / MANIFEST).read_text())
            manifest["files"]["optimizer.pt"] = facts(earlier / "optimizer.pt")
            (earlier / MANIFEST).write_text(json.dumps(manifest))
        return trainer.state.global_step >= 6

    inject(monkeypatch, Value("layer", math.nan, planted))
    with pytest.raises(ModelError, match=f"{earlier / 'optimizer.pt'} is not what"):
        train(*made(), runs=tmp_path)
    assert step_of(newest(earlier.parent)) == 6, "which stays"


def test_a_second_home_goes_back_with_it(made, tmp_path, monkeypatch, capsys):
    """The next machine must not begin with the weights that were left."""
    monkeypatch.setattr(second_home, "LOOK_S", 0.01)
    home, settled = tmp_path / "home", tmp_path / "home" / "run" / CHECKPOINTS

    def dies(trainer):
        limit_s = time.monotonic() + 30
        while trainer.state.global_step == 6 and not holds(settled / "step-00000006") and time.monotonic() < limit_s:
            time.sleep(0.01)
        return trainer.state.global_step == 4 and trainer.args.learning_rate < RATE

    with monkeypatch.context() as patch:
        inject(patch, Value("layer", math.nan, from_step(7, rate=RATE)), Ends(dies))
        with pytest.raises(SystemExit):
            train(*made(), runs=tmp_path / "here", second_home=home)
    for thread in threading.enumerate():
        if thread.name == "second home":
            thread.join(30)
    assert [path.name for path in settled.glob("step-*")] == ["step-00000003"]
    run = train(*made(), runs=tmp_path / "there", second_home=home)
    assert "at step 3 of" in capsys.readouterr().out
    assert run.status == FINISHED
    assert max(s.learning_rate for s in run.timeline.steps[3:]) <= RATE / 2


def test_at_last_it_ends_with_the_reason_and_what_was_learned(made, tmp_path, monkeypatch):
    inject(monkeypatch, Value("layer", math.nan, from_step(5)))
    with pytest.raises(NotFiniteError) as caught:
        train(*made(), runs=tmp_path)
    error, folder = caught.value, tmp_path / "run"
    assert error.what == f"loss, gradients or weights are not finite at step {4 + IN_A_ROW}"
    assert error.why == f"step 4 was the last to learn from; {MOST_RETURNS} returns to earlier checkpoints did not help"
    assert error.fix.startswith(f"a learning_rate well below {RATE / 2**MOST_RETURNS:g}, rows without oddities")
    assert error.fix.endswith(f"or resume=False. What was learned until step 3 is in {folder / 'adapter'}")
    assert "fp32" not in str(error)
    assert load_adapter(folder)
    run = show_run(folder)
    assert run.status == "ended by NotFiniteError"
    assert run.timeline.returns == [[4 + IN_A_ROW, 3]] * MOST_RETURNS
    with pytest.raises(NotFiniteError):  # nor does the same cell begin it all again
        train(*made(), runs=tmp_path)
    assert show_run(folder).timeline.returns == run.timeline.returns


def test_without_a_checkpoint_to_go_back_to_it_ends_at_once(made, tmp_path, monkeypatch):
    """From weights of the last step that was learned from would come the same numbers."""
    inject(monkeypatch, Value("layer", math.nan, from_step(4)))
    with pytest.raises(NotFiniteError) as caught:
        train(*made(), runs=tmp_path)
    assert caught.value.why == "step 3 was the last to learn from; no checkpoint is from before it"
    assert step_of(newest(tmp_path / "run" / CHECKPOINTS)) == 3, "which stays"


def test_a_full_disk_does_not_hide_the_reason(made, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    inject(monkeypatch, Value("layer", math.nan, from_step(5)))
    monkeypatch.setattr("llamanb.training.numbers.save_model", full)
    with pytest.raises(NotFiniteError, match="did not help"):
        train(*made(), runs=tmp_path)


class Spoils(TrainerCallback):
    """Makes a weight NaN in the optimizer's step, though loss and gradients were finite."""

    def __init__(self, step: int):
        self.step = step

    def __call__(self, trainer) -> None:
        self.trainer = trainer
        trainer.add_callback(self)

    def on_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1 and args.learning_rate == RATE:
            next(weight for _, weight in self.trainer._trained()).data[0, 0] = math.nan


@pytest.mark.parametrize(("step", "until"), [(6, 6 + IN_A_ROW), (STEPS, STEPS)])
def test_weights_that_are_not_finite_reach_neither_checkpoint_nor_adapter(
    made, tmp_path, monkeypatch, capsys, step, until
):
    inject(monkeypatch, Spoils(step))
    run = train(*made(), runs=tmp_path)
    assert run.timeline.returns == [[until, 3 if step == 6 else 9]]
    refused = "no checkpoint at step 6 (RuntimeError: weights that are not finite). Earlier ones stay"
    assert (refused in capsys.readouterr().out) == (step == 6)
    assert run.status == FINISHED
    saved = [*run.folder.glob(f"{CHECKPOINTS}/*/{WEIGHTS}"), *run.saved.glob("*.safetensors")]
    assert len(saved) == 3
    assert all(weight.isfinite().all() for path in saved for weight in load_file(path).values())


def test_no_checkpoint_is_made_while_steps_are_skipped(made, tmp_path, monkeypatch):
    """The two that are kept would be of the same weights, with nothing learned in between to undo."""
    inject(monkeypatch, Value("layer", math.nan, lambda trainer: 3 <= trainer.state.global_step < 7))
    run = train(*made(steps=8, checkpoint_every_steps=1), runs=tmp_path)
    assert [step.skipped for step in run.timeline.steps] == [False] * 3 + [True] * 4 + [False]
    assert run.timeline.returns == []
    assert sorted(step_of(path) for path in (run.folder / CHECKPOINTS).iterdir()) == [3, 8]
