"""Recipes: what they may hold (`schema`) and how they are read (`load`)."""

from effbackbones.config.load import LoadedRecipe, RecipeError, check, explain, load_recipe
from effbackbones.config.schema import Recipe

__all__ = ["LoadedRecipe", "Recipe", "RecipeError", "check", "explain", "load_recipe"]
