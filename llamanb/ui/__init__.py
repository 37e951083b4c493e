"""Widgets: views over a Recipe. The only part that imports ipywidgets, and never the only way in."""

from llamanb.ui.form import PlanForm, RecipeForm, plan_form, recipe_form

__all__ = ["PlanForm", "RecipeForm", "plan_form", "recipe_form"]
