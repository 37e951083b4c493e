"""Forms over a recipe's most asked questions: what is trained, rank, batch, length, and what that takes on a card.

A form starts from a recipe and hands one back at any time, so a notebook runs the same with it and without a click.
Only widgets that ipywidgets 7.7 (Colab) and 8 share; no text here is read as markup.
"""

from __future__ import annotations

import functools
import os

import ipywidgets
from IPython.display import display

from llamanb.card import Card
from llamanb.cards import KNOWN
from llamanb.errors import LlamanbError, RecipeError
from llamanb.html import join, paragraph
from llamanb.layout import Plan
from llamanb.nvml import ask, start_nvml
from llamanb.planner import DoesNotFitError, plan
from llamanb.recipe import LINEAR_LAYERS, METHODS, TARGETS, Recipe

SLIDERS = {
    "rank": (4, 8, 16, 32, 64, 128),
    "effective_batch_size": (1, 2, 4, 8, 16, 32, 64),
    "max_length": (128, 256, 512, 1024, 2048, 4096, 8192),
}
LABELS = {
    "method": "Train",
    "rank": "Rank",
    "targets": "Adapters on",
    "effective_batch_size": "Batch",
    "micro_batch_size": "Micro-batch",
    "max_length": "Length",
    "card": "Card",
}
THIS_MACHINE = "this machine"


class RecipeForm:
    """Widgets over a recipe; `recipe` is what they say now."""

    fields = ("method", "rank", "effective_batch_size", "max_length")

    def __init__(self, recipe: Recipe):
        self._start = recipe
        self.widgets = self._make_widgets()
        margin = ipywidgets.Layout(margin="2px 0 2px 1em")
        self._hints = {name: ipywidgets.Label(layout=margin) for name in self.widgets}
        self._message = ipywidgets.HTML(layout=ipywidgets.Layout(margin="0.5em 0 0 2px"))  # a Label would not wrap
        self._table = ipywidgets.HTML(layout=ipywidgets.Layout(align_self="flex-start"))
        self._table.add_class("jp-RenderedHTMLCommon")  # as tables look in any other output of JupyterLab
        for widget in self.widgets.values():
            widget.observe(self._show, names="value")
        rows = [ipywidgets.HBox([widget, self._hints[name]]) for name, widget in self.widgets.items()]
        self._box = ipywidgets.VBox([*rows, self._message, self._table])
        self._show()

    @property
    def recipe(self) -> Recipe:
        """The recipe as the form stands. Raises RecipeError where its parts do not go together."""
        return self._start.replace(**{name: self.widgets[name].value or None for name in self.fields})

    def hint(self, name: str) -> str:
        """What the present value of a field means."""
        value = self.widgets[name].value
        if name == "method":
            return METHODS[value]
        if name in ("rank", "targets") and self.widgets["method"].value == "full":
            return "not used: full fine-tuning has no adapters"
        if name == "rank":
            start = self._start.rank
            return "size of the adapters" + (
                f": {value / start:.3g} times that of rank {start}" if value != start else ""
            )
        if name == "targets":
            return f"{len(TARGETS.get(value, value))} of the {len(LINEAR_LAYERS)} matrices in every layer"
        if name == "effective_batch_size":
            return f"rows a step, up to {value * self.widgets['max_length'].value:,} tokens"
        if name == "micro_batch_size":
            return f"rows computed at once, of the {self._start.effective_batch_size} in a step"
        return "tokens in the longest row"

    def _make_widgets(self) -> dict:
        return {name: self._widget(name, getattr(self._start, name)) for name in self.fields}

    def _widget(self, name: str, value, options=()):
        common = {"description": LABELS[name], "layout": ipywidgets.Layout(width="24em")}
        if name in SLIDERS:  # a drag counts where it ends: on its way it would ask for plan after plan
            stops = sorted({*SLIDERS[name], value})
            return ipywidgets.SelectionSlider(options=stops, value=value, continuous_update=False, **common)
        return ipywidgets.Dropdown(options=options or self._options(name, value), value=value or 0, **common)

    def _options(self, name: str, value) -> list[tuple[str, object]]:
        """Labels and values of a menu."""
        if name == "method":
            return [(method, method) for method in METHODS]
        if name == "targets":
            own = [] if value in TARGETS else [(", ".join(value), value)]
            return [*((target, target) for target in TARGETS), *own]
        effective = self._start.effective_batch_size  # None would mean that nothing is selected
        return [("the plan chooses", 0), *((str(n), n) for n in range(1, effective + 1) if effective % n == 0)]

    def _show(self, change=None) -> None:
        for name, label in self._hints.items():
            label.value = self.hint(name)
        self._message.value, self._table.value = self._below()

    def _below(self) -> tuple[str, str]:
        """HTML of the words and of the table that stand under the widgets."""
        try:
            recipe = self.recipe
        except RecipeError as error:
            return paragraph(error), ""
        length = f"{recipe.steps} steps" if recipe.steps else f"{recipe.epochs:g} epochs"
        return paragraph(f"model {recipe.model} · rows {recipe.dataset} · {recipe.method} · {length}"), ""

    def _ipython_display_(self) -> None:
        display(self._box)


class PlanForm(RecipeForm):
    """Widgets over a recipe and a card; `plan` is how the one runs on the other now."""

    fields = ("method", "rank", "targets", "micro_batch_size", "max_length")

    def __init__(self, recipe: Recipe, card: Card | str | None = None):
        card = Card.known(card) if isinstance(card, str) else card
        self._cards = {THIS_MACHINE: None} if card is None or _has_gpu() else {}
        self._cards |= KNOWN | ({card.name: card} if card else {})
        self._first_card = card.name if card else THIS_MACHINE
        super().__init__(recipe)

    @property
    def card(self) -> Card:
        """The card that is chosen. Raises GpuError where this machine's does not answer."""
        return self._cards[self.widgets["card"].value] or self._here

    @property
    def plan(self) -> Plan:
        """The plan as the form stands. Raises what `llamanb.plan` raises, DoesNotFitError first of all."""
        return plan(self.recipe, self.card)

    def hint(self, name: str) -> str:
        if name != "card":
            return super().hint(name)
        try:
            card = self.card
        except LlamanbError:
            return "does not answer"
        return f"{card.free_gib:.2f} of {card.vram_gib:.2f} GiB for tensors" if card.is_gpu else "no GPU: the CPU"

    @functools.cached_property
    def _here(self) -> Card:
        return Card.here()

    def _make_widgets(self) -> dict:
        card = self._widget("card", self._first_card, [(name, name) for name in self._cards])
        return {**super()._make_widgets(), "card": card}

    def _below(self) -> tuple[str, str]:
        try:
            made = self.plan
        except DoesNotFitError as error:
            changes = join(error.changes) if error.changes.rows else ""
            return paragraph(error) + join(error.plan.bar()), changes
        except LlamanbError as error:
            return paragraph(error), ""
        facts = {fact: (value, why) for fact, value, why in made.table().rows}
        text = "it fits" if made.memory else "no memory is predicted for a CPU"
        text += f": {facts['optimizer step'][0]}, activations {facts['activations'][0]}"
        text += "\n{}, {}".format(*facts["time"]) if made.time else ""
        return paragraph(text) + join(made.bar()), ""


def _has_gpu() -> bool:
    """Whether NVML lists a GPU that is not hidden: an answer without torch, which takes seconds to import."""
    nvml, _ = start_nvml()
    return bool(nvml and ask(nvml.nvmlDeviceGetCount)) and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def recipe_form(recipe: Recipe) -> RecipeForm:
    """Sliders and a menu that start from `recipe`; read `form.recipe` in a later cell."""
    return RecipeForm(recipe)


def plan_form(recipe: Recipe, card: Card | str | None = None) -> PlanForm:
    """Sliders and menus over `recipe` and `card`, the predicted memory below; read `form.plan` in a later cell.

    `card` is a Card, the name of a known one, or None: this machine's. Raises GpuError for a name that is not known.
    """
    return PlanForm(recipe, card)
