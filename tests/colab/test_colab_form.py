"""The form under Colab's ipywidgets and IPython: every widget moves, and the recipe follows."""

import json
import os

import pytest

from tests.colab.image import ROOT, run

pytestmark = pytest.mark.slow
MOVES = {
    "model": "meta-llama/Llama-3.2-3B-Instruct",
    "dataset": "rows.jsonl",
    "method": "lora",
    "rank": 8,
    "targets": "attention",
    "effective_batch_size": 12,
    "micro_batch_size": 4,
    "max_length": 512,
    "epochs": 2.0,
    "steps": 5,
}
PROGRAM = """
import json, os, sys, warnings
warnings.simplefilter("error")
import ipywidgets, IPython
from llamanb import plan_form, Recipe
form = plan_form(Recipe(model="meta-llama/Llama-3.1-8B-Instruct"), "T4")
assert "it fits" in form._message.value
form.widgets["rank"].value = -1
assert "rank = -1 is not possible" in form._message.value
for name, value in json.loads(os.environ["MOVES"]).items():
    form.widgets[name].value = value
form.widgets["card"].value = "H100"
assert form.plan.bar()._repr_html_() in form._message.value
assert all(widget.description_tooltip for widget in form.widgets.values())
assert "torch" not in sys.modules
IPython.display.display(form)
print(json.dumps([ipywidgets.__version__, IPython.__version__, json.loads(form.recipe.to_json())]))
"""


def test_every_widget_moves_and_the_recipe_follows(pristine, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MOVES": json.dumps(MOVES)}
    done = run(pristine / "bin" / "python", "-c", PROGRAM, cwd=tmp_path, env=env)
    widgets, ipython, recipe = json.loads(done.stdout.splitlines()[-1])
    assert (widgets, ipython) == ("7.7.1", "7.34.0")
    assert {name: recipe[name] for name in MOVES} == MOVES
    assert done.stderr == ""
