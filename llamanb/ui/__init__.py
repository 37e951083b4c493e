"""Widgets: views over a Recipe. The only part that imports ipywidgets, and never the only way in."""

from llamanb.ui.form import RecipeForm, plan_form, recipe_form

__all__ = ["RecipeForm", "plan_form", "recipe_form"]
