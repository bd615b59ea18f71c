"""Recipes: a YAML file that teaches a model something measurable, run from start to end."""

from adapters.train.reading import read_recipe
from adapters.train.recipe import Evaluation, Recipe, Training

__all__ = ["Evaluation", "Recipe", "Training", "read_recipe"]
