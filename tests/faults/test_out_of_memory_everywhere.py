"""Memory that runs out, put everywhere: forward, backward, the optimizer, scoring and saving, in the first, a middle
and the last micro-batch, told in every way that libraries have. Every run recovers and learns what it would have
learned.

`make faults` runs all, CI a sample.
"""

import itertools
import json
import os
import random

import pytest

from llamanb import Card, Recipe, load_data, plan, train
from llamanb.run import FINISHED
from llamanb.tape import STORED
from llamanb.training.checkpoints import holds
from llamanb.training.resume import CHECKPOINTS
from tests.injected import ERRORS, NoMemory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ALL = int(os.environ.get("LLAMANB_KILLS", "10")) >= 500
IN_CI = 12
STEPS, MICRO, ACCUMULATION = 3, 2, 3
SETTINGS = ("padded", "fused", "dropout")
PLACES = ("forward", "backward", "optimizer", "evaluation", "save")
WHICH = ("first", "middle", "last")
CASES = list(itertools.product(SETTINGS, PLACES, WHICH, ERRORS))


@pytest.fixture(scope="module")
def data(mini, tmp_path_factory):
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    text = [json.dumps({"instruction": f"Say {n}.", "output": "It is " + "so " * (n % 7) + f"{n}."}) for n in range(24)]
    rows.write_text("\n".join(text))
    recipe = Recipe(model=str(mini), dataset=str(rows), max_length=128, eval_rows=2, learning_rate=1e-4)
    recipe = recipe.replace(effective_batch_size=MICRO * ACCUMULATION, micro_batch_size=MICRO, steps=STEPS, warmup=0.0)
    recipe = recipe.replace(checkpoint_every_steps=1)
    return recipe, load_data(recipe)


def trained(setting, data, runs):
    recipe, rows = data
    made = plan(recipe.replace(dropout=0.2 if setting == "dropout" else 0.0), Card("CPU", None))
    if setting == "fused":
        made = made.replace(fused=True, layers=(STORED,) * 2)
    return train(made, rows, runs=runs)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """A run of each setting, and how often it comes to each place."""
    found = {}
    for setting in SETTINGS:
        with pytest.MonkeyPatch.context() as patch:
            watched = {place: NoMemory(patch, place) for place in PLACES}
            run = trained(setting, data, tmp_path_factory.mktemp(setting))
        found[setting] = run, {place: one.calls for place, one in watched.items()}
    return found


def test_every_lack_of_memory_is_recovered_from(data, undisturbed, tmp_path, monkeypatch, capsys):
    cases = CASES if ALL else random.Random(0).sample(CASES, IN_CI)
    for i, (setting, place, which, error) in enumerate(cases):
        whole, calls = undisturbed[setting]
        number = {"first": 1, "middle": 1 + calls[place] // 2, "last": calls[place]}[which]
        words = f"{setting}, {place} {number} of {calls[place]}, {error}"
        with monkeypatch.context() as patch:
            injected = NoMemory(patch, place, number, error)
            run = trained(setting, data, tmp_path / str(i))
        assert injected.raised, words
        said = capsys.readouterr().out
        assert run.status == FINISHED, words
        assert [s.step for s in run.timeline.steps] == list(range(1, STEPS + 1)), words
        again = place in ("forward", "backward")
        assert ("out of memory at step" in said) == again, words
        assert run.plan.micro_batch_size * run.plan.accumulation == MICRO * ACCUMULATION, words
        assert (run.plan.micro_batch_size < MICRO) == again, words
        for step_made in range(STEPS - 1, STEPS + 1):
            assert holds(run.folder / CHECKPOINTS / f"step-{step_made:08d}"), words
        if setting == "dropout" and again:
            continue  # other masks are drawn for other micro-batches
        for one, other in zip(run.timeline.steps, whole.timeline.steps, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=1e-6), words
            assert one.tokens == other.tokens, words
        assert run.scores.after.loss == pytest.approx(whole.scores.after.loss, rel=1e-6), words
    if ALL:
        assert len(cases) >= 200
