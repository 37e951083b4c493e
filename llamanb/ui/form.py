"""A form over a recipe's most asked questions: what is trained, rank, batch, length.

It starts from a recipe and hands one back at any time, so a notebook runs the same with it and without a click. Only
widgets that ipywidgets 7.7 (Colab) and 8 share; no text here is read as markup.
"""

from __future__ import annotations

import ipywidgets
from IPython.display import display

from llamanb.errors import RecipeError
from llamanb.html import paragraph
from llamanb.recipe import METHODS, Recipe

CHOICES = {
    "method": tuple(METHODS),
    "rank": (4, 8, 16, 32, 64, 128),
    "effective_batch_size": (1, 2, 4, 8, 16, 32, 64),
    "max_length": (128, 256, 512, 1024, 2048, 4096, 8192),
}
LABELS = {"method": "Train", "rank": "Rank", "effective_batch_size": "Batch", "max_length": "Length"}


class RecipeForm:
    """Widgets over a recipe; `recipe` is what they say now."""

    def __init__(self, recipe: Recipe):
        self._start = recipe
        self.widgets = {name: self._widget(name) for name in CHOICES}
        self._hints = {name: ipywidgets.Label(layout=ipywidgets.Layout(margin="2px 0 2px 1em")) for name in CHOICES}
        self._message = ipywidgets.HTML(layout=ipywidgets.Layout(margin="0.5em 0 0 2px"))  # a Label would not wrap
        for widget in self.widgets.values():
            widget.observe(self._show, names="value")
        rows = [ipywidgets.HBox([self.widgets[name], self._hints[name]]) for name in CHOICES]
        self._box = ipywidgets.VBox([*rows, self._message])
        self._show()

    @property
    def recipe(self) -> Recipe:
        """The recipe as the form stands. Raises RecipeError where its parts do not go together."""
        return self._start.replace(**{name: widget.value for name, widget in self.widgets.items()})

    def hint(self, name: str) -> str:
        """What the present value of a field means."""
        value = self.widgets[name].value
        if name == "method":
            return METHODS[value]
        if name == "rank":
            if self.widgets["method"].value == "full":
                return "not used: full fine-tuning has no adapters"
            start = self._start.rank
            return "size of the adapters" + (
                f": {value / start:.3g} times that of rank {start}" if value != start else ""
            )
        if name == "effective_batch_size":
            return f"rows a step, up to {value * self.widgets['max_length'].value:,} tokens"
        return "tokens in the longest row"

    def _widget(self, name: str):
        value = getattr(self._start, name)
        common = {"value": value, "description": LABELS[name], "layout": ipywidgets.Layout(width="24em")}
        if name == "method":
            return ipywidgets.Dropdown(options=CHOICES[name], **common)
        return ipywidgets.SelectionSlider(options=sorted({*CHOICES[name], value}), **common)

    def _show(self, change=None) -> None:
        for name, label in self._hints.items():
            label.value = self.hint(name)
        self._message.value = paragraph(self._summary())

    def _summary(self) -> str:
        try:
            recipe = self.recipe
        except RecipeError as error:
            return str(error)
        length = f"{recipe.steps} steps" if recipe.steps else f"{recipe.epochs:g} epochs"
        return f"model {recipe.model} · rows {recipe.dataset} · {recipe.method} · {length}"

    def _ipython_display_(self) -> None:
        display(self._box)


def recipe_form(recipe: Recipe) -> RecipeForm:
    """Sliders and a menu that start from `recipe`; read `form.recipe` in a later cell."""
    return RecipeForm(recipe)
