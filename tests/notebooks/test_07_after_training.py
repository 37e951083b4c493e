"""Notebook 07 on the tiny default: trained, judged, talked to, merged, written as GGUF, loaded from each, and ready to
be pushed; and once more on a run that is there."""

import re

import pytest

from llamanb import Card, Recipe, plan, show_run, train
from tests.notebooks.shown import cell, noise, text
from tests.unit.test_canary import CANARY, places

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("bare_machine_with_a_token")]


@pytest.mark.timeout(600)
def test_everything_made_of_an_adapter_says_what_it_said(run_notebook, tmp_path):
    notebook = run_notebook("07_after_training")
    folder = tmp_path / "runs" / "after"
    assert noise(notebook) == []
    run = show_run(folder)

    shown = text(notebook, "compare")
    assert shown.startswith("better: loss per token")
    assert shown == str(run.compare())
    assert run.compare().after.ended > 0.9, "it stops by itself"

    side, question = text(notebook, "side"), run.compare().questions[0]
    assert "without the adapter" in side
    assert "temperature 0.7, seed 0" in side

    talk = text(notebook, "chat")
    said = re.findall(r"^(you|with the adapter|without it): (.+)$", talk, re.MULTILINE)
    assert [who for who, _ in said] == ["you", "with the adapter", "you", "without it"]
    assert said[0][1] == said[2][1] == question
    assert said[1][1] == run.compare().after.answers[0] != said[3][1]
    assert "application/vnd.jupyter.widget-view+json" in cell(notebook, "form").outputs[0].data

    assert (folder / "merged" / "model.safetensors").is_file()
    assert (folder / "merged-f16.gguf").is_file()
    assert (folder / "merged-f16.Modelfile").is_file()
    same = re.findall(r"^(base and adapter|merged\S*) .* (\d) of (\d)$", text(notebook, "again"), re.MULTILINE)
    assert [(name, ended) for name, ended, _ in same] == [
        ("base and adapter", "8"),
        ("merged", "8"),
        ("merged-f16.gguf", "8"),
    ]
    assert text(notebook, "again").count("8 of 8  ") == 2, "the same answers from both"

    pushed = text(notebook, "push")
    assert "would be sent" in pushed
    assert "adapter_model.safetensors" in pushed
    assert "the tiny Llama of llamanb" in pushed
    assert places(CANARY, tmp_path) == []

    once_more = run_notebook("07_after_training", run=str(folder), question="Note: by noon, Ada would like 3 lamps.")
    assert text(once_more, "compare") == shown
    assert "merged is merged already" in text(once_more, "merge")
    assert text(once_more, "chat").startswith("you: Note: by noon, Ada")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["after"]


@pytest.mark.timeout(600)
def test_a_model_that_was_trained_whole_goes_the_same_way(run_notebook, tmp_path):
    recipe = Recipe(method="full", steps=20, max_length=128, eval_rows=8, learning_rate=1e-3)
    run = train(plan(recipe, Card("CPU", None)), runs=tmp_path / "runs")
    notebook = run_notebook("07_after_training", run=str(run.folder))
    assert noise(notebook) == []
    assert "answer" in text(notebook, "side")
    assert (run.folder / "model-f16.gguf").is_file()
    assert text(notebook, "again").count("8 of 8  ") == 2
    assert "model.safetensors" in text(notebook, "push")
