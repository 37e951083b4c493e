"""The form through its widgets' traits, without a browser."""

import ast
import inspect

import ipywidgets
import pytest

from llamanb.errors import RecipeError
from llamanb.recipe import METHODS, Recipe
from llamanb.ui import form as form_module
from llamanb.ui import recipe_form

IN_BOTH = {"Dropdown", "HBox", "HTML", "Label", "Layout", "SelectionSlider", "VBox"}
"""What the form may use: there in ipywidgets 7.7 and in 8, with the same arguments."""


def test_it_starts_from_the_recipe_and_hands_it_back():
    recipe = Recipe(method="lora", rank=8, effective_batch_size=32, max_length=512, seed=7, dataset="rows.jsonl")
    form = recipe_form(recipe)
    assert {name: widget.value for name, widget in form.widgets.items()} == {
        "method": "lora",
        "rank": 8,
        "effective_batch_size": 32,
        "max_length": 512,
    }
    assert form.recipe == recipe


def test_a_widget_that_moves_changes_its_field_only():
    recipe = Recipe(rank=8, seed=7)
    form = recipe_form(recipe)
    form.widgets["rank"].value = 64
    assert form.recipe == recipe.replace(rank=64)
    assert recipe.rank == 8


def test_values_that_are_not_among_the_options_become_one_in_their_place():
    form = recipe_form(Recipe(rank=24, effective_batch_size=3, max_length=100_000))
    assert form.recipe.rank == 24
    assert 24 in form.widgets["rank"].options
    assert form.widgets["max_length"].options[-1] == 100_000
    for name in ("rank", "effective_batch_size", "max_length"):
        assert list(form.widgets[name].options) == sorted(form.widgets[name].options)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_explained(method):
    form = recipe_form(Recipe())
    form.widgets["method"].value = method
    assert form.hint("method") == METHODS[method]
    assert shown_hint(form, "method") == METHODS[method]
    assert form.recipe.method == method


def test_hints_follow_the_widgets():
    form = recipe_form(Recipe(rank=16, effective_batch_size=16, max_length=128))
    assert shown_hint(form, "rank") == "size of the adapters"
    form.widgets["rank"].value = 8
    assert shown_hint(form, "rank") == "size of the adapters: 0.5 times that of rank 16"
    assert shown_hint(form, "effective_batch_size") == "rows a step, up to 2,048 tokens"
    form.widgets["max_length"].value = 1024
    assert shown_hint(form, "effective_batch_size") == "rows a step, up to 16,384 tokens"
    form.widgets["method"].value = "full"
    assert shown_hint(form, "rank").startswith("not used")


def test_a_combination_that_cannot_be_shows_why_and_raises_only_when_read():
    form = recipe_form(Recipe(dora=True))
    form.widgets["method"].value = "full"
    for part in ("dora and rslora need adapters", "why: ", "fix: "):
        assert part in message(form)
    with pytest.raises(RecipeError, match="dora and rslora need adapters"):
        _ = form.recipe
    form.widgets["method"].value = "lora"
    assert "lora" in message(form)
    assert "why: " not in message(form)


def test_the_message_sums_the_recipe_up():
    assert "model tiny · rows rows.csv · qlora-nf4 · 5 steps" in message(
        recipe_form(Recipe(dataset="rows.csv", steps=5))
    )
    assert "0.5 epochs" in message(recipe_form(Recipe(epochs=0.5)))


def test_names_cannot_become_markup():
    form = recipe_form(Recipe(model="<img src=x onerror=alert(1)>", dataset="<script>alert(1)</script>"))
    assert "<img" not in message(form)
    assert "<script" not in message(form)


def test_it_shows_as_one_box_and_takes_nothing_but_widgets_of_both_versions(monkeypatch):
    shown = []
    monkeypatch.setattr(form_module, "display", shown.append)
    recipe_form(Recipe())._ipython_display_()
    (box,) = shown
    assert isinstance(box, ipywidgets.VBox)

    tree = ast.parse(inspect.getsource(form_module))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ipywidgets"
    }
    assert used <= IN_BOTH
    arguments = {keyword.arg for node in ast.walk(tree) if isinstance(node, ast.Call) for keyword in node.keywords}
    assert not arguments & {"tooltip", "description_tooltip", "description_allow_html", "border_top", "border_bottom"}


def shown_hint(form, name: str) -> str:
    """What stands beside a widget."""
    (row,) = (row for row in form._box.children if form.widgets[name] in getattr(row, "children", ()))
    return row.children[1].value


def message(form) -> str:
    """What stands below them all."""
    return form._box.children[-1].value
