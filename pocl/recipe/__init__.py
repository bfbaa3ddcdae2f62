"""The recipe: everything a run depends on, as validated, immutable models read from YAML.

One file and any number of overrides, `--section.key value`, make a `Recipe`. An unknown key is refused with the nearest
known name, a value out of bounds with the bounds; all problems of a file are told at once.
"""

from pocl.recipe.reader import RecipeError, build_recipe, describe_keys, known_keys, load_recipe, recipe_file
from pocl.recipe.schema import recipe_schema
from pocl.recipe.sections import Recipe

__all__ = [
    "Recipe",
    "RecipeError",
    "build_recipe",
    "describe_keys",
    "known_keys",
    "load_recipe",
    "recipe_file",
    "recipe_schema",
]
