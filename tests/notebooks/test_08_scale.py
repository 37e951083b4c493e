"""Notebook 08 without a GPU and without a network: plans for several cards, and two processes beside one."""

import re

import pytest

from llamanb import Recipe, plan, show_run
from tests.notebooks.shown import cell, noise, text
from tests.unit.test_canary import CANARY, places

STEPS = 4
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("bare_machine_with_a_token")]


@pytest.mark.timeout(600)
def test_it_plans_for_several_cards_and_trains_on_two_processes(run_notebook, tmp_path):
    notebook = run_notebook("08_scale", steps=STEPS)
    assert noise(notebook) == []
    recipe = Recipe.load(tmp_path / "recipe.json")
    lines = text(notebook, "table").splitlines()
    for card, count in (("T4", 2), ("L4", 4), ("H100", 1)):
        (line,) = (line for line in lines if re.match(rf"{card} +{count} ", line))
        made = plan(recipe, card, cards=count)
        assert f"{made.accumulation} × {made.micro_batch_size} " in line
        assert f"{made.needs_gib:.1f} of {made.limit_gib:.1f} " in line
        assert line.endswith(f"{16 * 1024 / made.step_s:,.0f}")
    assert re.search(r"of 80 of 80 layers in host memory: [\d.]+ GiB", text(notebook, "large"))

    together, alone = (show_run(tmp_path / "runs" / name) for name in ("together", "together-alone"))
    assert (together.plan.cards, alone.plan.cards) == (2, 1)
    assert len(together.losses) == STEPS
    assert together.losses == pytest.approx(alone.losses, rel=1e-5)
    assert text(notebook, "together").count(f"step {STEPS} of {STEPS}") == 1, "one process speaks"
    (apart,) = re.findall(r"differ by (\S+) of their size", text(notebook, "losses"))
    assert float(apart) < 1e-5
    assert any("image/png" in output.get("data", {}) for output in cell(notebook, "losses").outputs)
    assert "metrics.csv" in text(notebook, "result")
    assert places(CANARY, tmp_path) == []
