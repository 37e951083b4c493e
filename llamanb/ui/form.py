"""A form over what a recipe is asked most: a label and a hint for each field, and what it all takes of a card's memory.

It starts from a recipe and hands one back at any time, so a notebook runs the same with it and without a click. A field
counts when it is left or Enter is pressed, not key by key, and no name that is typed makes the kernel wait for the
network. Only widgets that ipywidgets 7.7 (Colab) and 8 share; no text here is read as markup.
"""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path

import ipywidgets
from IPython.display import display

from llamanb import hub, streaming, tiny
from llamanb.architecture import Architecture, architecture, known
from llamanb.card import Card
from llamanb.cards import KNOWN
from llamanb.data.read import READABLE
from llamanb.errors import LlamanbError, ModelError
from llamanb.html import alert, join, paragraph
from llamanb.layout import Plan
from llamanb.nvml import ask, start_nvml
from llamanb.planner import DoesNotFitError, plan
from llamanb.recipe import LINEAR_LAYERS, METHODS, TARGETS, Recipe
from llamanb.starter import FOR_THE_MODEL, SQUAD

FIELDS = {  # label, and what a pointer that rests on it is told
    "model": ("Model", "A name on the Hub, a folder, or tiny. Empty the field to be offered the known names."),
    "dataset": ("Data", "A json, jsonl, csv or parquet file, an address, a name on the Hub, or tiny."),
    "method": ("Train", "What is trained, over weights of how many bits."),
    "rank": ("Rank", "Size of the adapters: more can learn more."),
    "targets": ("Adapters on", "The matrices of a layer that get an adapter."),
    "effective_batch_size": ("Batch", "Rows in an optimizer step: this changes what is learned."),
    "micro_batch_size": ("Micro-batch", "Rows computed at once: this changes memory and time only."),
    "max_length": ("Length", "Tokens of the longest row."),
    "epochs": ("Epochs", "Passes over the rows."),
    "steps": ("Steps", "Optimizer steps, instead of epochs."),
    "card": ("Card", "The GPU that is planned for."),
}
STEPS = {"rank": 8, "effective_batch_size": 1, "micro_batch_size": 1, "max_length": 128, "epochs": 0.5, "steps": 1}
"""What an arrow key adds to a number."""
SUGGESTED = {
    "model": ("tiny", *hub.MIRRORS.values(), "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", *hub.MIRRORS),
    "dataset": ("tiny", SQUAD["dataset"]),
}
ZERO_IS_NONE = ("micro_batch_size", "steps")
THIS_MACHINE = "this machine"


class RecipeForm:
    """Widgets over a recipe and a card: `recipe` and `plan` are what they say now.

    `cards` are those of the menu by name, the first one chosen; None is this machine's.
    """

    def __init__(self, recipe: Recipe, cards: dict[str, Card | None]):
        self._start, self._cards = recipe, cards
        self._answers: dict[tuple[str, str], Architecture | LlamanbError | None] = {}
        self._shape: Architecture | None = None
        self._shown: Plan | None = None
        self._showing = threading.Lock()
        self.widgets = {name: self._widget(name) for name in FIELDS}
        margin = ipywidgets.Layout(margin="2px 0 2px 1em")
        self._hints = {name: ipywidgets.Label(layout=margin) for name in self.widgets}
        self._message = ipywidgets.HTML(layout=ipywidgets.Layout(margin="0.5em 0 0 2px"))  # a Label would not wrap
        self._message.add_class("jp-RenderedHTMLCommon")  # as tables look in any other output of JupyterLab
        for widget in self.widgets.values():
            widget.observe(self._show, names="value")
        wrap = ipywidgets.Layout(flex_flow="row wrap")
        rows = [ipywidgets.HBox([widget, self._hints[name]], layout=wrap) for name, widget in self.widgets.items()]
        self._box = ipywidgets.VBox([*rows, self._message])
        self._show()

    @property
    def recipe(self) -> Recipe:
        """The recipe as the form stands. Raises RecipeError where a value, or several together, cannot be."""
        values = {name: widget.value for name, widget in self.widgets.items() if name != "card"}
        values |= {name: values[name].strip() for name in SUGGESTED}
        values |= {name: values[name] or None for name in ZERO_IS_NONE}
        return self._start.replace(**self._left_behind(values), **values)

    @property
    def card(self) -> Card:
        """The card that is chosen. Raises GpuError where this machine's does not answer."""
        return self._cards[self.widgets["card"].value] or self._here

    @property
    def plan(self) -> Plan:
        """The plan as the form stands. Raises what `llamanb.plan` raises, DoesNotFitError first of all."""
        return plan(self.recipe, self.card)

    def hint(self, name: str) -> str:
        """What the present value of a field means."""
        value, shape = self.widgets[name].value, self._shape
        if name in ("rank", "targets") and self.widgets["method"].value == "full":
            return "not used: full fine-tuning has no adapters"
        match name:
            case "model":
                return f"{shape.parameters / 1e6:,.0f} million parameters" if shape else "see below"
            case "dataset":
                return _whereabouts(value.strip())
            case "method":
                stored = shape.quantization if shape else None
                fits = stored is None or value == f"qlora-{stored}"
                return METHODS[value] if fits else f"not possible: this checkpoint is {stored} already"
            case "rank":
                start = self._start.rank
                return "size of the adapters" + (f": {value / start:.3g} times rank {start}" if value != start else "")
            case "targets":
                return f"{len(TARGETS.get(value, value))} of the {len(LINEAR_LAYERS)} matrices in every layer"
            case "effective_batch_size":
                return f"rows a step, up to {value * self.widgets['max_length'].value:,} tokens"
            case "micro_batch_size":
                return f"{'rows computed at once; ' if value else ''}0: the plan chooses"
            case "max_length":
                over = shape and value > shape.max_positions
                return f"not possible: the model has {shape.max_positions:,} positions" if over else "tokens, at most"
            case "epochs":
                return "not used: steps come first" if self.widgets["steps"].value else "passes over the rows"
            case "steps":
                return f"{'optimizer steps; ' if value else ''}0: as many as the epochs need"
        try:
            card = self.card
        except LlamanbError:
            return "does not answer"
        room = f"{card.free_gib:.2f} of {card.vram_gib:.2f} GiB for tensors" if card.is_gpu else "no GPU: the CPU"
        return f"{card.name}: {room}" if value == THIS_MACHINE and card.is_gpu else room

    @functools.cached_property
    def _here(self) -> Card:
        return streaming.in_its_machine(None)

    def _widget(self, name: str) -> ipywidgets.DOMWidget:
        label, tip = FIELDS[name]
        common = {"description": label, "layout": ipywidgets.Layout(width="30em")}
        value = getattr(self._start, name, None)
        if name in SUGGESTED:
            offered = {"options": SUGGESTED[name], "placeholder": "a name, a path, or tiny"}
            widget = ipywidgets.Combobox(value=value, continuous_update=False, **offered, **common)
        elif name in STEPS:
            kind = ipywidgets.FloatText if name == "epochs" else ipywidgets.IntText
            widget = kind(value=value or 0, step=STEPS[name], continuous_update=False, **common)
        else:
            options = {"method": METHODS, "targets": TARGETS, "card": self._cards}[name]
            options = [(option, option) for option in options]
            if isinstance(value, tuple):  # layers named one by one
                options.append((", ".join(value), value))
            widget = ipywidgets.Dropdown(options=options, value=value or options[0][1], **common)
            widget.disabled = len(options) == 1
        setattr(widget, "tooltip" if widget.has_trait("tooltip") else "description_tooltip", tip)  # 8, 7.7
        return widget

    def _left_behind(self, values: dict) -> dict:
        """Settings of the first model or rows that mean nothing for others, back at a recipe's own values."""
        start, gone = self._start, {}
        if values["model"] != start.model:
            gone |= {"revision": start.revision}
            gone |= {name: tiny.DEFAULTS[name] for name in FOR_THE_MODEL} if start.model == "tiny" else {}
        if values["dataset"] != start.dataset:
            gone |= {"dataset_split": start.dataset_split}
            gone |= SQUAD if start.dataset == SQUAD["dataset"] else {}
        own, left = Recipe(), [name for name, value in gone.items() if getattr(start, name) == value]
        return {name: getattr(own, name) for name in left if name not in FIELDS}

    def _show(self, change=None) -> None:
        with self._showing:  # an answer of the Hub comes in a thread
            self._message.value = self._below()
            for name, label in self._hints.items():
                label.value = self.hint(name)

    def _below(self) -> str:
        """HTML of what stands under the widgets: the bar, what the last change did, and words or an error."""
        if self._shape and self._shape.name != self.widgets["model"].value.strip():
            self._shape = None
        try:
            recipe = self.recipe
            self._shape = self._shape_of(recipe.model, recipe.revision)
            made = self.plan
        except DoesNotFitError as error:
            made, changes = error.plan, join(error.changes) if error.changes.rows else ""
            words = alert("does not fit", error.what, {"why": error.why, "how to fix it": error.fix}, changes)
        except LlamanbError as error:
            return join(error)
        except (OSError, RuntimeError) as error:  # of a path that no file system takes
            return paragraph(error)
        else:
            words = paragraph(f"{_verdict(made)}\nlearning rate {recipe.highest_learning_rate:g}")
        before, self._shown = self._shown, made
        return join(made.bar()) + paragraph(_difference(before, made)) + words

    def _shape_of(self, model: str, revision: str) -> Architecture:
        """The model's shape. One that the Hub has to be asked for comes in a thread, which shows the form again."""
        asked = (model, revision)
        if not _needs_the_hub(*asked):
            return architecture(*asked)
        if asked not in self._answers:
            self._answers = {asked: None}  # of no other name: one that was refused is asked for again later
            threading.Thread(target=self._ask, args=asked, daemon=True).start()
        answer = self._answers[asked]
        if isinstance(answer, Architecture):
            return answer
        raise answer or ModelError(
            f"the shape of {model} is not known here",
            "its config.json and tokenizer are being asked for at the Hugging Face Hub",
            "go on: the memory is shown when they have come, and why not if they do not",
        )

    def _ask(self, *asked: str) -> None:
        try:
            answer = architecture(*asked)
        except LlamanbError as error:
            answer = error
        if asked in self._answers:  # still the name that the form shows
            self._answers[asked] = answer
            self._show()

    def _ipython_display_(self) -> None:
        display(self._box)


def _needs_the_hub(model: str, revision: str) -> bool:
    """Whether the model's config.json lies neither in this package nor in a folder."""
    if model == "tiny" or not hub.is_name(model) or Path(model).is_dir():
        return False
    return revision != "main" or known(model) is None


def _whereabouts(dataset: str) -> str:
    """What is known of rows without reading them."""
    if dataset == "tiny":
        return "the tiny Llama's own: notes and tickets"
    if "://" in dataset:
        return "from the web"
    if os.path.isfile(dataset):  # unlike Path's, it takes any text
        return f"a file of {os.path.getsize(dataset):,} bytes"
    named = hub.is_name(dataset.partition(":")[0]) and Path(dataset).suffix.lower() not in READABLE
    return "a name on the Hub" if named else "no such file here"


def _verdict(made: Plan) -> str:
    """That it fits, how, and how long it takes."""
    facts = {fact: (value, why) for fact, value, why in made.table().rows}
    text = "it fits" if made.memory else "no memory is predicted for a CPU"
    text += f": {facts['optimizer step'][0]}, activations {facts['activations'][0]}"
    return text + ("\n{}, {}".format(*facts["time"]) if made.time else "")


def _difference(before: Plan | None, now: Plan) -> str:
    """What the last change did to memory and time."""
    if before is None or before.memory is None or now.memory is None:
        return ""
    gib, layers = now.needs_gib - before.needs_gib, now.recomputed - before.recomputed
    parts = [f"{abs(gib):.2f} GiB {'more' if gib > 0 else 'less'}" if abs(gib) >= 0.005 else "no more memory, no less"]
    if layers:
        parts.append(f"{abs(layers)} {'more' if layers > 0 else 'fewer'} layers recomputed")
    if now.time and before.time and abs(seconds := now.step_s - before.step_s) >= 0.05:
        parts.append(f"{abs(seconds):.1f} s {'more' if seconds > 0 else 'less'} a step")
    return f"the last change: {', '.join(parts)}"


def _has_gpu() -> bool:
    """Whether NVML lists a GPU that is not hidden: an answer without torch, which takes seconds to import."""
    nvml, _ = start_nvml()
    return bool(nvml and ask(nvml.nvmlDeviceGetCount)) and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def _menu(card: Card | str | None) -> dict[str, Card | None]:
    """The card to plan for, under its name in the menu: a Card, the name of a known one, or None, this machine's."""
    card = Card.known(card) if isinstance(card, str) else card
    return {card.name if card else THIS_MACHINE: card}


def recipe_form(recipe: Recipe, card: Card | str | None = None) -> RecipeForm:
    """A form that starts from `recipe`, for one card: None is this machine's. Read `form.recipe` in a later cell."""
    return RecipeForm(recipe, _menu(card))


def plan_form(recipe: Recipe, card: Card | str | None = None) -> RecipeForm:
    """The same with a menu of cards, `card` chosen; read `form.recipe` and `form.plan` in a later cell.

    `card` is a Card, the name of a known one, or None: this machine's. Raises GpuError for a name that is not known.
    """
    first, here = _menu(card), {THIS_MACHINE: None} if _has_gpu() else {}
    return RecipeForm(recipe, first | here | KNOWN | first)
