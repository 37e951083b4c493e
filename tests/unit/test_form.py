"""The forms through their widgets' traits, without a browser."""

import ast
import dataclasses
import inspect

import ipywidgets
import pytest

from llamanb.card import Card
from llamanb.cards import KNOWN
from llamanb.errors import GpuError, ModelError, RecipeError
from llamanb.html import escape_text
from llamanb.planner import DoesNotFitError, plan
from llamanb.recipe import METHODS, Recipe
from llamanb.ui import form as form_module
from llamanb.ui import plan_form, recipe_form
from llamanb.ui.form import THIS_MACHINE

IN_BOTH = {"Dropdown", "HBox", "HTML", "Label", "Layout", "SelectionSlider", "VBox"}
"""What the forms may use: there in ipywidgets 7.7 and in 8, with the same arguments."""


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


LLAMA_8B = Recipe(model="meta-llama/Llama-3.1-8B-Instruct")
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def no_network(monkeypatch):
    """A form must plan the known models without it."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture
def machine(monkeypatch):
    """`machine(gpu)`: a machine with this Card, or without a GPU; counts how often it is looked at."""

    def make(gpu: Card | None) -> list:
        looked = []
        monkeypatch.setattr(form_module, "_has_gpu", lambda: gpu is not None)
        monkeypatch.setattr(Card, "here", classmethod(lambda cls: looked.append(1) or gpu or Card("CPU", None)))
        return looked

    return make


def test_the_plan_form_is_a_view_of_plan(no_network):
    form = plan_form(LLAMA_8B, "T4")
    assert form.recipe == LLAMA_8B
    assert form.card == KNOWN["T4"]
    assert form.plan == plan(LLAMA_8B, "T4")
    assert form.plan.bar()._repr_html_() in message(form)
    assert "it fits: 16 × 1 rows of up to 1024 tokens" in message(form)
    assert f"{form.plan.step_s:.1f} s a step, " in message(form)


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("method", "qlora-int8", "qlora-int8"),
        ("rank", 64, 64),
        ("targets", "attention", "attention"),
        ("micro_batch_size", 4, 4),
        ("max_length", 2048, 2048),
        ("card", "RTX 4090", "RTX 4090"),
    ],
)
def test_each_widget_moves_the_bar_at_once(name, value, field):
    form = plan_form(LLAMA_8B, "T4")
    before = message(form)
    form.widgets[name].value = value
    assert message(form) != before
    moved = LLAMA_8B if name == "card" else LLAMA_8B.replace(**{name: field})
    wanted = plan(moved, value if name == "card" else "T4")
    assert form.recipe == moved
    assert form.plan == wanted
    assert wanted.bar()._repr_html_() in message(form)


def test_micro_batches_are_those_that_divide_and_none_is_the_plans_choice():
    form = plan_form(LLAMA_8B.replace(effective_batch_size=12), "T4")
    assert form.widgets["micro_batch_size"].options[1:] == tuple((str(n), n) for n in (1, 2, 3, 4, 6, 12))
    assert form.widgets["micro_batch_size"].label == "the plan chooses"
    assert form.recipe.micro_batch_size is None
    form.widgets["micro_batch_size"].value = 3
    assert (form.recipe.micro_batch_size, form.plan.accumulation) == (3, 4)
    form.widgets["micro_batch_size"].value = 0
    assert form.recipe.micro_batch_size is None
    assert plan_form(LLAMA_8B.replace(micro_batch_size=8), "T4").recipe.micro_batch_size == 8


def test_layers_named_one_by_one_are_an_option_of_their_own():
    form = plan_form(LLAMA_8B.replace(targets=("q_proj", "v_proj")), "T4")
    assert form.widgets["targets"].label == "q_proj, v_proj"
    assert form.recipe.targets == ("q_proj", "v_proj")
    assert shown_hint(form, "targets") == "2 of the 7 matrices in every layer"
    form.widgets["targets"].value = "all-linear"
    assert shown_hint(form, "targets") == "7 of the 7 matrices in every layer"
    form.widgets["method"].value = "full"
    assert shown_hint(form, "targets").startswith("not used")


def test_what_does_not_fit_shows_what_takes_the_room_and_what_would():
    form = plan_form(LLAMA_8B, "T4")
    form.widgets["method"].value = "lora"
    with pytest.raises(DoesNotFitError) as caught:
        _ = form.plan
    error = caught.value
    assert escape_text(error) in message(form)
    assert error.plan.bar()._repr_html_() in message(form)
    assert error.changes._repr_html_() in message(form)
    assert "GiB too much" in message(form)
    form.widgets["card"].value = "RTX 4090"
    assert "it fits" in message(form)
    assert "<table" not in message(form)


def test_what_is_over_by_its_margin_only_is_over_in_the_bar_too():
    fits = plan_form(LLAMA_8B, "T4")
    smaller = dataclasses.replace(KNOWN["T4"], free_gib=fits.plan.needs_gib / 0.985)
    form = plan_form(LLAMA_8B.replace(micro_batch_size=1, checkpointing="none"), smaller)
    assert "GiB too much" in message(form)


def test_where_no_single_change_helps_no_empty_table_stands():
    form = plan_form(LLAMA_8B.replace(model="meta-llama/Llama-3.3-70B-Instruct", method="full"), "T4")
    assert "no single change is enough" in message(form)
    assert "<table" not in message(form)


def test_plan_form_explains_combinations_that_cannot_be_and_recovers():
    form = plan_form(LLAMA_8B.replace(dora=True), "T4")
    form.widgets["method"].value = "full"
    assert "dora and rslora need adapters" in message(form)
    with pytest.raises(RecipeError, match="dora and rslora"):
        _ = form.plan
    form.widgets["method"].value = "qlora-nf4"
    assert "it fits" in message(form)

    old = plan_form(LLAMA_8B.replace(precision="bf16"), "T4")
    assert "bf16 matrix units begin at 8.0" in message(old)
    with pytest.raises(GpuError):
        _ = old.plan
    old.widgets["card"].value = "RTX 3060"
    assert "it fits" in message(old)


def test_hostile_names_cannot_become_markup(no_network):
    form = plan_form(Recipe(model=HOSTILE), "T4")
    assert "does not exist" in message(form)
    assert "<img" not in message(form)
    with pytest.raises(ModelError):
        _ = form.plan
    own = plan_form(LLAMA_8B, Card(HOSTILE, (8, 6), 6.0, attention_gqa=("flash",)))
    assert "at the least" in message(own)
    assert escape_text(HOSTILE) in message(own)
    assert "<img" not in message(own)


def test_a_card_of_ones_own_joins_the_menu_under_its_name():
    own = Card("T4", (7, 5), 14.56, 10.0, ("memory-efficient", "math"), ("math",))
    form = plan_form(LLAMA_8B, own)
    assert form.card is own
    assert form.widgets["card"].options.count(("T4", "T4")) == 1
    assert shown_hint(form, "card") == "10.00 of 14.56 GiB for tensors"
    assert " a step" not in message(form), "its speed is not known"
    assert plan_form(LLAMA_8B, Card.known("rtx4090")).widgets["card"].value == "RTX 4090"
    with pytest.raises(GpuError, match="no card called 'T5'"):
        plan_form(LLAMA_8B, "T5")


def test_this_machine_is_offered_where_it_has_a_gpu_and_looked_at_once_when_chosen(machine):
    looked = machine(KNOWN["L4"])
    form = plan_form(LLAMA_8B, "T4")
    assert looked == []
    form.widgets["card"].value = THIS_MACHINE
    form.widgets["rank"].value = 32
    assert form.plan == plan(LLAMA_8B.replace(rank=32), "L4")
    assert looked == [1]

    machine(None)
    assert (THIS_MACHINE, THIS_MACHINE) not in plan_form(LLAMA_8B, "T4").widgets["card"].options


def test_without_a_card_it_starts_from_this_machine(machine):
    machine(KNOWN["L4"])
    assert plan_form(LLAMA_8B).plan == plan(LLAMA_8B, "L4")
    machine(None)
    form = plan_form(LLAMA_8B)
    assert shown_hint(form, "card") == "no GPU: the CPU"
    assert "no memory is predicted for a CPU" in message(form)


def test_a_gpu_that_does_not_answer_is_said_and_another_card_can_be_taken(monkeypatch):
    def broken(cls):
        raise GpuError("The GPU is there but does not answer.", "lost", "restart")

    monkeypatch.setattr(Card, "here", classmethod(broken))
    form = plan_form(LLAMA_8B)
    assert "does not answer" in shown_hint(form, "card")
    assert "why: lost" in message(form)
    form.widgets["card"].value = "T4"
    assert "it fits" in message(form)


def test_a_gpu_counts_when_nvml_lists_it_and_it_is_not_hidden(monkeypatch):
    class Nvml:
        nvmlDeviceGetCount = staticmethod(lambda: 1)

    monkeypatch.setattr(form_module, "start_nvml", lambda: (Nvml, ""))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert form_module._has_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not form_module._has_gpu()
    monkeypatch.setattr(form_module, "start_nvml", lambda: (None, "no driver"))
    assert not form_module._has_gpu()


def shown_hint(form, name: str) -> str:
    """What stands beside a widget."""
    (row,) = (row for row in form._box.children if form.widgets[name] in getattr(row, "children", ()))
    return row.children[1].value


def message(form) -> str:
    """What stands below them all: words, and a table."""
    return "".join(part.value for part in form._box.children[-2:])
