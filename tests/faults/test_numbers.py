"""Numbers that are not finite, in any place of any step, once or for ever: each is seen at that step, none reaches
weights, optimizer states or a checkpoint, and a run that cannot go on ends with the reason.

`make faults` tries all, CI a dozen of them.
"""

import itertools
import json
import math
import os
import random

import pytest
import torch
from safetensors.torch import load_file

from llamanb import Card, Recipe, load_adapter, load_data, plan, train
from llamanb.run import FINISHED
from llamanb.training.checkpoints import step_of
from llamanb.training.numbers import MOST_RETURNS, NotFiniteError
from llamanb.training.resume import CHECKPOINTS
from llamanb.training.saves import IN_A_ROW, WEIGHTS
from tests.injected import Untouched, Value, inject, scaled

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
STEPS = 12
PLACES, VALUES = ("loss", "micro-batch", "layer", "gradient"), (math.nan, math.inf, -math.inf)
OPTIMIZERS = ("adamw_torch_fused", "adamw_8bit")
ONCE = [*itertools.product(PLACES, VALUES, (1, 6, STEPS), (False, True), OPTIMIZERS)]
FOR_EVER = [*itertools.product(PLACES, VALUES[:2], (1, 2, 6), (False, True))]
ALL = int(os.environ.get("LLAMANB_KILLS", "10")) >= 100


def drawn(cases: list) -> list:
    source = random.Random(int(os.environ.get("LLAMANB_SEED", "0")))
    return cases if ALL else source.sample(cases, len(cases) // 16)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(...)`: a plan and its data."""
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"instruction": f"Say {n}.", "output": f"It is {n}."}) for n in range(18)))
    fields = {"model": "tiny", "dataset": str(rows), "max_length": 128, "effective_batch_size": 6, "steps": STEPS}
    fields |= {"micro_batch_size": 2, "eval_rows": 0, "learning_rate": 1e-2, "dropout": 0.2, "schedule": "constant"}
    recipe = Recipe(**fields, checkpoint_every_steps=1)
    data = load_data(recipe)
    return lambda **more: (plan(recipe.replace(**more), Card("CPU", None)), data)


def finite_checkpoints(folder) -> list[int]:
    """Steps of the checkpoints in a run's folder; fails where one's weights are not finite."""
    found = sorted((folder / CHECKPOINTS).glob("step-*"))
    for path in found:
        assert all(weight.isfinite().all() for weight in load_file(path / WEIGHTS).values()), path
    return [step_of(path) for path in found]


@pytest.mark.parametrize(("place", "value", "step", "with_scaler", "optimizer"), drawn(ONCE))
def test_once(made, tmp_path, monkeypatch, place, value, step, with_scaler, optimizer):
    fault, look = Value(place, value, lambda trainer: trainer.state.global_step == step - 1), Untouched()
    inject(monkeypatch, fault, look, *[scaled] * with_scaler)
    run = train(*made(optimizer=optimizer), runs=tmp_path)
    assert (run.status, len(run.losses)) == (FINISHED, STEPS)
    assert [s.step for s in run.timeline.steps if s.skipped] == [step], "seen at that step, and at no other"
    seen = run.timeline.steps[step - 1]
    assert math.isfinite(seen.loss) == (place == "gradient")
    assert math.isfinite(seen.grad_norm) == (place == "loss")
    assert look.steps == [step], "weights and states stayed, bit for bit"
    assert look.finite
    assert finite_checkpoints(run.folder)[-1] == STEPS
    assert run.timeline.returns == []
    assert run.timeline.upsets.startswith("1 skipped, not finite")
    scales = [s.scale for s in run.timeline.steps]
    if with_scaler:  # which sees gradients only
        assert scales == [2.0**16] * step + [2.0 ** (16 - (place != "loss"))] * (STEPS - step)
    else:
        assert scales == [1] * STEPS


@pytest.mark.parametrize(("place", "value", "step", "with_scaler"), drawn(FOR_EVER))
def test_for_ever(made, tmp_path, monkeypatch, place, value, step, with_scaler):
    fault, look = Value(place, value, lambda trainer: trainer.state.global_step >= step - 1), Untouched()
    inject(monkeypatch, fault, look, *[scaled] * with_scaler)
    settles = 16 if with_scaler and place == "gradient" else 0
    """From 2^16 down to 1; a loss that is not finite cannot be meant."""
    with pytest.raises(NotFiniteError) as caught:
        train(*made(steps=STEPS + settles), runs=tmp_path)
    error, folder = caught.value, tmp_path / "run"
    assert error.what.endswith(f"not finite at step {step - 1 + settles + IN_A_ROW}")
    assert look.finite
    facts = json.loads((folder / "timeline.json").read_text())
    steps = (folder / "metrics.csv").read_text().splitlines()[1:]
    assert len(steps) == step - 1 + settles + IN_A_ROW
    there = finite_checkpoints(folder)
    if step < 3:  # nothing was learned after a checkpoint
        assert facts["returns"] == []
        assert not (folder / "adapter").exists()
    else:
        assert len(facts["returns"]) == MOST_RETURNS
        assert f"{MOST_RETURNS} returns to earlier checkpoints did not help" in error.why
        assert there
        assert load_adapter(folder)
    assert ("none of its steps was" in error.why) == (step == 1)


def test_an_overflow_that_a_lower_scale_mends_is_no_trouble(made, tmp_path, monkeypatch):
    """fp16's scale settles: skipped steps are counted, and nothing more."""
    fault = Value("gradient", math.inf, lambda trainer: trainer.accelerator.scaler.get_scale() > 2**13)
    inject(monkeypatch, fault, scaled)
    run = train(*made(), runs=tmp_path)
    assert (run.status, run.timeline.returns) == (FINISHED, [])
    assert [s.scale for s in run.timeline.steps[:5]] == [65536, 32768, 16384, 8192, 8192]
    assert "; 3 skipped, not finite (fp16's scale 65536 at first, now 8192); in" in str(run)
    assert "fp16&#x27;s scale 65536 at first, now 8192" in (run.folder / "report.html").read_text()


def test_a_run_that_diverged_goes_on_with_a_lower_rate(made, tmp_path, monkeypatch, capsys):
    first, second = 1e-2, 5e-3
    fault = Value(
        "layer", math.nan, lambda trainer: trainer.args.learning_rate == first and trainer.state.global_step > 4
    )
    look = Untouched()
    inject(monkeypatch, fault, look)
    run = train(*made(), runs=tmp_path)
    assert (run.status, run.timeline.returns) == (FINISHED, [[10, 4]])
    assert [s.step for s in run.timeline.steps] == list(range(1, STEPS + 1))
    assert [s.learning_rate for s in run.timeline.steps[4:]] == [second] * (STEPS - 4)
    assert "not finite at step 10: back to step 4 with half the learning rate\n" in capsys.readouterr().out
    assert "back from step 10 to 4 with half the learning rate" in str(run)
    assert torch.tensor(run.losses).isfinite().all()
