"""Two GPUs that train one model, launched as a notebook and a shell do it: pytest tests/gpu/test_together_gpu.py"""

import shutil

import pytest

from llamanb import launch, plan, train
from llamanb.run import Run
from tests.unit.test_together import BACKWARD, LACK, STEPS, ranks_of, recipe, started

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs that torch can use"),
    pytest.mark.timeout(600),
]
APART = 0.02
"""Of their size, that losses in 16 bits may differ by."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """On one of them; this process has used it when it launches others, as a notebook's kernel has."""
    return train(plan(recipe(eval_rows=6)), runs=tmp_path_factory.mktemp("alone"))


def test_two_gpus_come_to_what_one_comes_to(alone, tmp_path):
    run = launch(recipe(eval_rows=6), 2, runs=tmp_path)
    assert (run.status, run.plan.cards, run.plan.card.is_gpu) == ("finished", 2, True)
    assert run.losses == pytest.approx(alone.losses, rel=APART)
    assert len(run.timeline.cards_gib) == 2
    assert min(run.timeline.cards_gib) > 0
    assert run.scores.after.loss == pytest.approx(alone.scores.after.loss, rel=APART)


def test_a_gpu_whose_rank_is_killed_ends_the_other_and_any_number_goes_on(alone, tmp_path):
    process = started(tmp_path, {"killed": 5}, eval_rows=6)
    said, _ = process.communicate(timeout=200)
    assert process.returncode != 0, said
    assert ranks_of(tmp_path) == []
    assert len(Run.open(tmp_path / "run").losses) < STEPS
    for name in ("one", "four"):
        shutil.copytree(tmp_path / "run", tmp_path / name / "run")
    runs = [train(plan(recipe(eval_rows=6)), runs=tmp_path / "one")]
    if torch.cuda.device_count() >= 4:
        runs.append(launch(recipe(eval_rows=6), 4, runs=tmp_path / "four"))
    for run in runs:
        assert (run.status, run.folder.name) == ("finished", "run")
        assert run.losses == pytest.approx(alone.losses, rel=APART)


@pytest.mark.parametrize("faults", [{}, {BACKWARD: 5}], ids=["whole", BACKWARD])
def test_two_gpus_share_the_layers(alone, tmp_path, faults):
    process = started(tmp_path, faults, sharded=True, eval_rows=6, weights="streamed")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    run = Run.open(tmp_path / "run")
    assert (run.status, run.plan.shards, run.plan.card.is_gpu) == ("finished", 2, True)
    assert (f"{LACK} at step 5" in said) == bool(faults)
    assert run.losses == pytest.approx(alone.losses, rel=APART)
