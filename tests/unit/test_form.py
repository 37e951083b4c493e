"""The form through its widgets' traits, without a browser."""

import ast
import dataclasses
import inspect
import subprocess
import sys
import threading

import ipywidgets
import pytest

from llamanb import disk, streaming, tiny
from llamanb.architecture import architecture
from llamanb.card import Card
from llamanb.cards import KNOWN
from llamanb.errors import GpuError, ModelError, NoNetworkError, RecipeError
from llamanb.html import escape_text
from llamanb.planner import DoesNotFitError, plan
from llamanb.recipe import METHODS, Recipe
from llamanb.starter import SQUAD, starter_recipe
from llamanb.ui import chat_form, plan_form, recipe_form
from llamanb.ui import form as form_module
from llamanb.ui.form import FIELDS, THIS_MACHINE

IN_BOTH = {"Combobox", "Dropdown", "DOMWidget", "FloatText", "HBox", "HTML", "IntText", "Label", "Layout", "VBox"}
IN_BOTH |= {"Button", "Checkbox", "Textarea"}
"""What a form may use: there in ipywidgets 7.7 and in 8, with the same arguments."""
LLAMA_8B = Recipe(model="meta-llama/Llama-3.1-8B-Instruct")
FOUR_BIT = "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit"
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A form must plan the known models without it."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


HOST_GIB = 30.0
"""Free of a machine's memory."""


@pytest.fixture
def machine(monkeypatch):
    """`machine(gpu)`: a machine with this Card, or without a GPU; counts how often it is looked at."""

    def make(gpu: Card | None) -> list:
        looked = []
        monkeypatch.setattr(form_module, "_has_gpu", lambda: gpu is not None)
        monkeypatch.setattr(Card, "here", classmethod(lambda cls: looked.append(1) or gpu or Card("CPU", None)))
        monkeypatch.setattr(streaming, "host_memory", lambda: (64.0, HOST_GIB, HOST_GIB))
        monkeypatch.setattr(disk, "free_gib", lambda: 50.0)
        return looked

    return make


@pytest.fixture
def no_gpu(machine):
    machine(None)


def test_it_starts_from_the_recipe_and_hands_it_back(no_gpu):
    recipe = Recipe(method="lora", rank=24, effective_batch_size=12, max_length=500, seed=7, dataset="rows.jsonl")
    for form in (recipe_form(recipe), plan_form(recipe), recipe_form(recipe, "T4"), plan_form(recipe, KNOWN["L4"])):
        assert form.recipe == recipe
        shown = {name: widget.value for name, widget in form.widgets.items()}
        shown = {name: shown[name] for name in FIELDS if name not in ("card", "steps", "micro_batch_size")}
        assert shown == {name: getattr(recipe, name) for name in shown}
    assert recipe_form(recipe.replace(steps=5, micro_batch_size=3)).recipe.steps == 5


MOVES = {
    "model": "meta-llama/Llama-3.2-3B-Instruct",
    "dataset": "rajpurkar/squad",
    "method": "qlora-int8",
    "rank": 64,
    "targets": "attention",
    "effective_batch_size": 5,
    "micro_batch_size": 4,
    "max_length": 2000,
    "epochs": 0.5,
    "steps": 30,
    "card": "RTX 4090",
}


@pytest.mark.parametrize(("name", "value"), MOVES.items())
def test_a_widget_that_moves_changes_its_field_only_and_what_is_shown_at_once(name, value):
    form = plan_form(LLAMA_8B, "T4")
    before = message(form)
    form.widgets[name].value = value
    recipe, card = (LLAMA_8B, value) if name == "card" else (LLAMA_8B.replace(**{name: value}), "T4")
    assert form.recipe == recipe
    assert form.plan == plan(recipe, card)
    assert form.plan.bar()._repr_html_() in message(form)
    assert message(form) != before
    assert "the last change: " in message(form)


def test_every_field_has_its_widget_a_label_a_hint_and_a_tooltip():
    assert MOVES.keys() == FIELDS.keys()
    form = plan_form(LLAMA_8B, "T4")
    for (name, widget), (label, tip) in zip(form.widgets.items(), FIELDS.values(), strict=True):
        assert (widget.description, widget.tooltip) == (label, tip)
        assert shown_hint(form, name) == form.hint(name) != ""
        assert getattr(widget, "continuous_update", False) is False, "a field counts when it is left"


def test_the_last_change_is_told_in_memory_layers_and_time():
    form = plan_form(LLAMA_8B, "T4")
    assert "the last change" not in message(form)
    before = form.plan
    form.widgets["max_length"].value = 4096
    after = form.plan
    words = f"the last change: {after.needs_gib - before.needs_gib:.2f} GiB more, "
    words += f"{after.recomputed - before.recomputed} more layers recomputed, "
    words += f"{after.step_s - before.step_s:.1f} s more a step"
    assert words in message(form)
    form.widgets["max_length"].value = 1024
    assert words.replace("more", "less").replace("less layers", "fewer layers") in message(form)
    form.widgets["epochs"].value = 2.0
    assert "the last change: no more memory, no less" in message(form)


REFUSED = {
    "an empty name": ({"model": " "}, "model = &#x27;&#x27; is not possible"),
    "no name of a model": ({"model": "a b"}, "does not exist"),
    "a path no file system takes": ({"model": "a" * 300}, "File name too long"),
    "a stranger's home": ({"model": "~no-such-user/model"}, "home directory"),
    "no rows": ({"dataset": ""}, "dataset = &#x27;&#x27; is not possible"),
    "rank": ({"rank": 0}, "rank is a whole number from 1 to 1024"),
    "batch": ({"effective_batch_size": -1}, "effective_batch_size is a whole number from 1"),
    "micro-batch": ({"micro_batch_size": 3}, "micro_batch_size = 3 does not divide effective_batch_size = 16"),
    "length": ({"max_length": 4}, "max_length is a whole number from 8"),
    "positions": ({"model": "meta-llama/Meta-Llama-3-8B", "max_length": 8193}, "has 8192 positions"),
    "epochs": ({"epochs": 0.0}, "epochs is a number from"),
    "steps": ({"steps": -5}, "steps is a whole number from 1"),
    "quantized already": ({"model": FOUR_BIT, "method": "lora"}, "is already quantized (nf4)"),
}


@pytest.mark.parametrize(("values", "why"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_says_why_and_the_form_goes_on(values, why):
    form = plan_form(LLAMA_8B, "T4")
    for name, value in values.items():
        form.widgets[name].value = value
    assert why in message(form)
    assert "role='img'" not in message(form)
    with pytest.raises((RecipeError, ModelError, OSError, RuntimeError)):
        _ = form.plan
    for name in values:
        form.widgets[name].value = getattr(LLAMA_8B, name) or 0
    assert form.plan == plan(LLAMA_8B, "T4")
    assert form.plan.bar()._repr_html_() in message(form)


def test_fields_say_themselves_what_is_not_possible_or_not_used(no_gpu):
    form = recipe_form(Recipe(model=FOUR_BIT))
    form.widgets["method"].value = "qlora-fp4"
    assert shown_hint(form, "method") == "not possible: this checkpoint is nf4 already"
    form.widgets["model"].value = "meta-llama/Meta-Llama-3-8B"
    assert shown_hint(form, "method") == METHODS["qlora-fp4"]
    form.widgets["max_length"].value = 10_000
    assert shown_hint(form, "max_length") == "not possible: the model has 8,192 positions"
    form.widgets["max_length"].value = 8192
    assert shown_hint(form, "max_length") == "tokens, at most"
    form.widgets["method"].value = "full"
    assert shown_hint(form, "rank") == shown_hint(form, "targets") == "not used: full fine-tuning has no adapters"
    form.widgets["steps"].value = 9
    form.widgets["rank"].value = -1
    assert shown_hint(form, "model") == "8,030 million parameters"
    form.widgets["rank"].value = 1
    assert shown_hint(form, "epochs") == "not used: steps come first"
    assert "learning rate 2e-05" in message(form)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_explained(method, no_gpu):
    form = recipe_form(Recipe())
    form.widgets["method"].value = method
    assert shown_hint(form, "method") == METHODS[method]
    assert form.recipe.method == method


def test_hints_follow_the_widgets(no_gpu, tmp_path):
    form = recipe_form(Recipe(rank=16, effective_batch_size=16, max_length=128))
    assert shown_hint(form, "model") == "2 million parameters"
    assert shown_hint(form, "rank") == "size of the adapters"
    form.widgets["rank"].value = 8
    assert shown_hint(form, "rank") == "size of the adapters: 0.5 times rank 16"
    assert shown_hint(form, "effective_batch_size") == "rows a step, up to 2,048 tokens"
    form.widgets["max_length"].value = 1024
    assert shown_hint(form, "effective_batch_size") == "rows a step, up to 16,384 tokens"
    (tmp_path / "rows.csv").write_text("text\na\n")
    for dataset, words in {
        str(tmp_path / "rows.csv"): "a file of 7 bytes",
        str(tmp_path / "other.csv"): "no such file here",
        "rows.jsonl": "no such file here",
        "https://example.org/rows.jsonl": "from the web",
        "owner/name.v2:config": "a name on the Hub",
        "rows/" + "a" * 300 + ".json": "no such file here",
        "a\0b": "no such file here",
        "": "no such file here",
        "tiny": "the tiny Llama's own: notes and tickets",
    }.items():
        form.widgets["dataset"].value = dataset
        assert shown_hint(form, "dataset") == words


def test_a_name_that_needs_the_hub_is_asked_for_in_a_thread(monkeypatch):
    ask, asked = threading.Event(), []

    def slow(model, revision="main"):
        if model != "someone/llama":
            return architecture(model, revision)
        asked.append(model)
        assert threading.current_thread() is not threading.main_thread(), "the kernel would wait"
        ask.wait(20)
        raise NoNetworkError(f"{model} cannot be fetched", "no network", "check the network")

    monkeypatch.setattr(form_module, "architecture", slow)
    form = plan_form(LLAMA_8B, "T4")
    form.widgets["model"].value = "someone/llama"
    form.widgets["rank"].value = 8
    assert "the shape of someone/llama is not known here" in message(form)
    assert form.recipe.model == "someone/llama"
    assert asked == ["someone/llama"], "once, however often the form is moved"
    form.widgets["model"].value = LLAMA_8B.model
    assert "it fits" in message(form), "nothing waits"
    form.widgets["model"].value = "someone/llama"
    ask.set()
    wait_for_threads()
    assert "someone/llama cannot be fetched" in message(form)


def test_what_the_hub_answers_is_planned_for(monkeypatch):
    fetched = []

    def fetch(model, revision="main"):
        if model == "someone/llama":
            fetched.append(revision)
            return dataclasses.replace(architecture(LLAMA_8B.model), name=model)
        return architecture(model, revision)

    monkeypatch.setattr(form_module, "architecture", fetch)
    monkeypatch.setattr("llamanb.planner.architecture", fetch)
    form = plan_form(LLAMA_8B, "T4")
    form.widgets["model"].value = "someone/llama"
    wait_for_threads()
    assert form.plan.bar()._repr_html_() in message(form)
    assert shown_hint(form, "model") == "8,030 million parameters"


def test_without_a_network_a_name_is_refused_within_seconds():
    form = plan_form(Recipe(model="someone/llama-of-no-cache"), "T4")
    wait_for_threads()
    assert "the Hugging Face Hub is out of reach" in message(form)


def test_what_belongs_to_the_tiny_llama_stays_with_it(no_gpu):
    start = starter_recipe(model="tiny")
    assert start.learning_rate == tiny.DEFAULTS["learning_rate"]
    form = recipe_form(start)
    assert form.recipe == start
    form.widgets["model"].value = LLAMA_8B.model
    assert (form.recipe.learning_rate, form.recipe.alpha) == (None, None)
    form.widgets["model"].value = "tiny"
    assert form.recipe == start
    mine = recipe_form(LLAMA_8B.replace(learning_rate=1e-4, revision="0123abc"), "T4")
    mine.widgets["model"].value = "meta-llama/Llama-3.2-1B"
    assert (mine.recipe.learning_rate, mine.recipe.revision) == (1e-4, "main")


def test_a_split_belongs_to_its_rows():
    form = recipe_form(Recipe(**{**SQUAD, "model": LLAMA_8B.model}), "T4")
    form.widgets["dataset"].value = "someone/rows"
    assert (form.recipe.dataset_split, form.recipe.long_rows) == ("train", "stop")
    form.widgets["dataset"].value = SQUAD["dataset"]
    assert (form.recipe.dataset_split, form.recipe.long_rows) == (SQUAD["dataset_split"], SQUAD["long_rows"])


def test_names_cannot_become_markup():
    form = plan_form(Recipe(model=HOSTILE, dataset="<script>alert(1)</script>"), "T4")
    assert "does not exist" in message(form)
    assert "<img" not in message(form)
    with pytest.raises(ModelError):
        _ = form.plan
    own = plan_form(LLAMA_8B.replace(weights="resident"), Card(HOSTILE, (8, 6), 6.0, attention_gqa=("flash",)))
    assert "at the least" in message(own)
    assert escape_text(HOSTILE) in message(own)
    assert "<img" not in message(own)


def test_it_shows_as_one_box(monkeypatch):
    shown = []
    monkeypatch.setattr(form_module, "display", shown.append)
    recipe_form(Recipe(), "T4")._ipython_display_()
    (box,) = shown
    assert isinstance(box, ipywidgets.VBox)


@pytest.mark.parametrize("module", [form_module, chat_form])
def test_a_form_takes_nothing_but_widgets_of_both_versions(module):
    tree = ast.parse(inspect.getsource(module))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ipywidgets"
    }
    assert used <= IN_BOTH
    arguments = {keyword.arg for node in ast.walk(tree) if isinstance(node, ast.Call) for keyword in node.keywords}
    assert not arguments & {"tooltip", "description_tooltip", "description_allow_html", "border_top", "border_bottom"}


def test_a_form_over_a_known_card_and_its_plan_import_no_torch():
    program = f"""
import sys, warnings
warnings.simplefilter("error")
from llamanb import Recipe, plan_form
form = plan_form(Recipe(model={LLAMA_8B.model!r}), "T4")
form.widgets["method"].value = "lora"
form.widgets["card"].value = "H100"
assert form.plan.memory
print([name for name in ("torch", "transformers", "matplotlib") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_plan_form_is_a_view_of_plan():
    form = plan_form(LLAMA_8B, "T4")
    assert form.recipe == LLAMA_8B
    assert form.card == KNOWN["T4"]
    assert form.plan == plan(LLAMA_8B, "T4")
    assert form.plan.bar()._repr_html_() in message(form)
    assert f"it fits: {form.plan.accumulation} × {form.plan.micro_batch_size} rows of up to 1024 tokens" in message(
        form
    )
    assert f"{form.plan.step_s:.1f} s a step, " in message(form)


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
    for text in (error.what, error.why, error.fix):
        assert escape_text(text) in message(form)
    assert error.plan.bar()._repr_html_() in message(form)
    assert error.changes._repr_html_() in message(form)
    assert "GiB too much" in message(form)
    form.widgets["card"].value = "RTX 4090"
    assert "it fits" in message(form)
    assert "<table" not in message(form)


def test_what_is_over_by_its_margin_only_is_over_in_the_bar_too():
    asked = LLAMA_8B.replace(micro_batch_size=1, checkpointing="none", weights="resident")
    smaller = dataclasses.replace(KNOWN["T4"], free_gib=plan_form(asked, "T4").plan.needs_gib / 0.985)
    form = plan_form(asked, smaller)
    assert "GiB too much" in message(form)


def test_where_no_single_change_helps_no_empty_table_stands():
    form = plan_form(LLAMA_8B.replace(model="meta-llama/Llama-3.1-405B", method="full"), "T4")
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
    assert form.plan.card.host_gib == HOST_GIB
    assert looked == [1]
    assert form.plan == plan(LLAMA_8B.replace(rank=32))

    machine(None)
    assert (THIS_MACHINE, THIS_MACHINE) not in plan_form(LLAMA_8B, "T4").widgets["card"].options


def test_without_a_card_it_starts_from_this_machine(machine):
    machine(KNOWN["L4"])
    assert plan_form(LLAMA_8B).plan == plan(LLAMA_8B)
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
    assert "lost" in message(form)
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


def wait_for_threads() -> None:
    """Until every question to the Hub is answered."""
    for thread in threading.enumerate():
        if "_ask" in thread.name:
            thread.join(20)


def shown_hint(form, name: str) -> str:
    """What stands beside a widget."""
    (row,) = (row for row in form._box.children if form.widgets[name] in getattr(row, "children", ()))
    return row.children[1].value


def message(form) -> str:
    """What stands below them all."""
    return form._box.children[-1].value
